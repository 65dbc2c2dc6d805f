"""How far a sweep is, for whoever shows it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from noisescale.records import TrialPlan, TrialResult
from noisescale.run.sweep.race import setting_name
from noisescale.run.sweep.standing import standing


@dataclass(frozen=True, kw_only=True)
class BestSoFar:
    """The best setting at one batch size, as far as is known.

    Attributes:
        steps: to the first target by first passage, over the seeds run so far; None if no
            setting got there.
        lr: its rate; None likewise.
        trials: trials that have ended.
        planned: trials asked for so far.
    """

    steps: float | None
    lr: float | None
    trials: int
    planned: int


@dataclass(frozen=True, kw_only=True)
class SweepProgress:
    """How far a sweep is.

    Attributes:
        batch_size: the one that is being tuned.
        target: what ``bests`` is about.
        bests: by batch size, in the order in which they are tuned.
        share: of the work done, in [0, 1]; rough: every batch size counts alike.
        trials: trials that have ended, those of earlier calls included.
        seconds: since the call began.
        seconds_left: by the share done in this call, and by the time allowed; None at first.
    """

    batch_size: int
    target: str
    bests: Mapping[int, BestSoFar]
    share: float
    trials: int
    seconds: float
    seconds_left: float | None


EVERY = 0.2
"""Seconds between news: counting takes time too."""

OnProgress = Callable[[SweepProgress], None]


@dataclass(kw_only=True)
class Reporter:
    """Keeps count and tells it on.

    Attributes:
        sizes: number of batch sizes.
        target: the first.
        tell: takes the news; None for nobody.
        deadline: monotonic time when the sweep is stopped.
    """

    sizes: int
    target: str
    tell: OnProgress | None
    deadline: float = math.inf
    began: float = field(default_factory=time.monotonic)
    bests: dict[int, BestSoFar] = field(default_factory=dict)
    done: int = 0
    first_share: float | None = None
    share: float = 0.0
    last: float = -math.inf

    def begin(
        self, batch_size: int, plans: Iterable[TrialPlan], results: Mapping[str, TrialResult]
    ) -> None:
        """Take note of a round before it is trained, and tell.

        What a store held is no progress of this call: the time left must not be judged by it.

        Args:
            batch_size: the one that is being tuned.
            plans: asked for there so far, this round's too.
            results: at hand, by key.
        """
        if self.tell is None:
            return
        self._count(batch_size, plans, results)
        share = self._share_at(batch_size)
        before = self.share if self.first_share is not None else 0.0
        self.first_share = (self.first_share or 0.0) + share - before
        self.share = share
        self.tell(self._news(batch_size))

    def report(
        self, batch_size: int, plans: Iterable[TrialPlan], results: Mapping[str, TrialResult]
    ) -> None:
        """Tell how the trials of a batch size stand.

        Args:
            batch_size: the one that is being tuned.
            plans: asked for there so far.
            results: at hand, by key.
        """
        if self.tell is None or time.monotonic() - self.last < EVERY:
            return
        self.last = time.monotonic()
        self._count(batch_size, plans, results)
        self.share = self._share_at(batch_size)
        self.tell(self._news(batch_size))

    def finish(
        self, batch_size: int, plans: Iterable[TrialPlan], results: Mapping[str, TrialResult]
    ) -> None:
        """Tell that a batch size is done."""
        self.done += 1
        if self.tell is not None:
            self._count(batch_size, plans, results)
            self.share = self.done / self.sizes
            self.tell(self._news(batch_size))

    def _count(
        self, batch_size: int, plans: Iterable[TrialPlan], results: Mapping[str, TrialResult]
    ) -> None:
        keys = [plan.key for plan in plans]
        ended = [results[key] for key in keys if key in results]
        self.bests[batch_size] = _best(ended, self.target, len(keys))

    def _share_at(self, batch_size: int) -> float:
        best = self.bests[batch_size]
        return (self.done + min(best.trials / max(best.planned, 1), 1.0)) / self.sizes

    def _news(self, batch_size: int) -> SweepProgress:
        now, share = time.monotonic(), self.share
        gained = 0.0 if self.first_share is None else share - self.first_share
        left = (now - self.began) * (1 - share) / gained if gained > 0 else math.inf
        left = min(left, self.deadline - now)
        return SweepProgress(
            batch_size=batch_size,
            target=self.target,
            bests=dict(self.bests),
            share=share,
            trials=sum(best.trials for best in self.bests.values()),
            seconds=now - self.began,
            seconds_left=max(left, 0.0) if math.isfinite(left) else None,
        )


def _best(results: Iterable[TrialResult], target: str, planned: int) -> BestSoFar:
    settings: dict[str, list[TrialResult]] = {}
    count = 0
    for result in results:
        settings.setdefault(setting_name(result.plan.recipe), []).append(result)
        count += 1
    scores = [(standing(of, target), of[0].plan.recipe.lr) for of in settings.values()]
    score, lr = min(scores, default=(None, None))
    if score is None or not score.reached:
        return BestSoFar(steps=None, lr=None, trials=count, planned=planned)
    return BestSoFar(steps=score.steps, lr=lr, trials=count, planned=planned)
