"""Does accumulation, or the number of replicas, change the gradient of a workload?"""

from noisescale.run.audit.driver import audit

__all__ = ["audit"]
