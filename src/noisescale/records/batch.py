"""What "batch size" means: global = micro x accumulation x replicas."""

from __future__ import annotations

from dataclasses import dataclass

from noisescale.records.serial import Record


@dataclass(frozen=True, kw_only=True)
class BatchSplit(Record):
    """One global batch, and how it is made.

    Attributes:
        global_batch_size: examples per optimizer step over all devices.
        micro_batch_size: examples per forward and backward pass on one device.
        accumulation: passes per optimizer step on one device.
        replicas: devices that average their gradients.
        unit: what is counted: ``examples``, ``sequences`` or ``tokens``.
    """

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    replicas: int
    unit: str = "examples"

    def __str__(self) -> str:
        """Spell the split in one line.

        >>> str(BatchSplit(global_batch_size=512, micro_batch_size=8, accumulation=8, replicas=8))
        'global 512 = micro 8 x accumulation 8 x replicas 8 (examples)'
        """
        return (
            f"global {self.global_batch_size} = micro {self.micro_batch_size}"
            f" x accumulation {self.accumulation} x replicas {self.replicas} ({self.unit})"
        )
