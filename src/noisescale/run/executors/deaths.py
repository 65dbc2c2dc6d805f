"""What becomes of a trial whose worker died."""

from __future__ import annotations

from collections import Counter

from noisescale.records import TrialPlan, TrialResult
from noisescale.run.executors.executor import without_result


class Deaths:
    """Counts how often each trial lost its worker, which may not have been its own fault.

    Args:
        retries: times that a trial is tried again.
    """

    def __init__(self, retries: int) -> None:
        self._retries = retries
        self._counts: Counter[str] = Counter()
        self._starved: set[str] = set()

    def verdict(
        self,
        plan: TrialPlan,
        detail: str,
        *,
        for_memory: bool = False,
        its_own: bool = False,
        seconds: float = 0.0,
    ) -> TrialResult | None:
        """Return the trial's result, or None when it is to be tried again.

        Args:
            plan: the trial.
            detail: one line on the death.
            for_memory: there is evidence that memory did not suffice.
            its_own: the death was the trial's own doing: it is not tried again.
            seconds: wall time of this try.
        """
        key = plan.key
        self._counts[key] += 1
        if for_memory:
            self._starved.add(key)
        if not its_own and self._counts[key] <= self._retries:
            return None
        starved = key in self._starved
        words = detail + (", for want of memory" if starved else "")
        if self._counts[key] > 1:
            words += f", {self._counts[key]} times"
        why = "memory" if starved else "crash"
        return without_result(plan, why=why, detail=words, seconds=seconds)
