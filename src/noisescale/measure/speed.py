"""Speed and memory of the real training step over micro-batch sizes.

One process climbs the sizes. When a size kills it (out of memory, a crash) a fresh one
takes over: what does not fit is found by trying, in a process that may die, never by
extrapolation. Times that are extrapolated serve to plan the scan only.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.measure.memory import available_bytes
from noisescale.measure.probe_process import Parcel, ProbeProcess, pack
from noisescale.measure.scan_notes import not_probed
from noisescale.measure.sizes import candidate_sizes, collapses, thin
from noisescale.records import SpeedCurve, SpeedFailure, SpeedPoint
from noisescale.workload import Workload

Loader = Callable[[], Workload] | tuple[str, dict[str, Any]]
Progress = Callable[[SpeedPoint | SpeedFailure], None]

# Share of the time that one quick size may take: some 25 sizes fill half of it. (assumed)
_SLICE = 1 / 50
_LONGEST_SLICE = 0.2  # seconds
# Steps that a size is planned to cost when one takes longer than a slice. (assumed)
_PLANNED_STEPS = 6
# Consecutive sizes that raise an exception before the scan stops climbing. (assumed)
_ERRORS_IN_A_ROW = 2
_ERRORS_FROM_THE_START = 3


def scan_speed(
    workload: Workload | Loader,
    *,
    seconds: float = 15.0,
    margin: float = 0.1,
    max_size: int | None = None,
    sizes: Sequence[int] | None = None,
    limit_bytes: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    on_progress: Progress | None = None,
) -> SpeedCurve:
    """Time the real training step at growing micro-batch sizes until memory or data end.

    At each size it runs, in a process of its own: fetch the batch, forward, loss, backward,
    clipping, optimizer step, weight average, and one evaluation batch. Between the last size
    that fits and the first that does not it bisects.

    Args:
        workload: a picklable Workload, a picklable function without arguments that returns
            one (``functools.partial`` serves), or ``("module:function", arguments)``.
        seconds: time for the scan, counted from when the workload is loaded; > 0.
        margin: share of the available memory that stays free, in [0, 1).
        max_size: largest size to try; the number of training examples when None.
        sizes: try exactly these, without bisection; 1, 2, 3, 4, 6, 8, 12, ... when None.
        limit_bytes: memory that may be used above the baseline, if less than what is
            available; ``margin`` is not taken off it.
        threads: torch threads of the child; as many as here when None.
        device: torch device for model and batches; where ``model()`` puts it when None.
        on_progress: called with every point and every failure as it is found.

    Returns:
        The curve. Sizes that were not run are in neither ``points`` nor ``failures``.

    Raises:
        InvalidInputError: an argument or the workload cannot be used, or the step raises the
            user's own error at every size.
    """
    _check_arguments(seconds, margin, max_size, sizes, limit_bytes, threads)
    settings = {
        "threads": threads if threads is not None else _threads_here(),
        "device": device,
        "margin": margin,
        "limit_bytes": limit_bytes,
    }
    scan = _Scan(
        pack(workload), settings, seconds=seconds, sizes=sizes, max_size=max_size, tell=on_progress
    )
    with scan:
        return scan.run()


@dataclass(frozen=True)
class _Trial:
    """What came of one size: a point, or the kind of failure and its reason."""

    size: int
    kind: str  # fits, memory, died, collapsed, error, late
    point: SpeedPoint | None = None
    reason: str = ""
    parts: list[str] | None = None

    @property
    def result(self) -> SpeedPoint | SpeedFailure:
        return self.point or SpeedFailure(micro_batch_size=self.size, reason=self.reason)


@dataclass
class _Scan:
    """The state of one scan: the child at work and what was found."""

    parcel: Parcel
    settings: dict[str, Any]
    seconds: float
    sizes: Sequence[int] | None
    max_size: int | None
    tell: Progress | None
    points: dict[int, SpeedPoint] = field(default_factory=dict)
    failures: dict[int, SpeedFailure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stopped: str = "largest size"

    def __post_init__(self) -> None:
        self._child: ProbeProcess | None = None
        self._ready = False
        self._deadline = math.inf
        self._about: dict[str, Any] = {}
        self._errors: list[_Trial] = []
        self._left_out: list[int] = []
        self._queued: list[float] = []

    def __enter__(self) -> _Scan:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.kill()

    def run(self) -> SpeedCurve:
        self._start_child()
        self._facts = self._about  # those of the first child are the scan's
        self.settings["limit_bytes"] = self._facts["limit_bytes"]
        self._deadline = time.monotonic() + self.seconds
        self._climb(self._sizes_to_try())
        return SpeedCurve(
            points=tuple(self.points[size] for size in sorted(self.points)),
            failures=tuple(self.failures[size] for size in sorted(self.failures)),
            limit_bytes=self._facts["limit_bytes"],
            baseline_bytes=self._facts["baseline_bytes"],
            margin=self.settings["margin"],
            device=self._facts["device"],
            stopped=self.stopped,
            not_probed=(
                *self.notes,
                *not_probed(self._facts, self.points, self._left_out, self._queued),
            ),
            unit=self._facts["unit"],
        )

    def _sizes_to_try(self) -> list[int]:
        train_size = self._facts["train_size"]
        if self.sizes is None:
            return candidate_sizes(min(train_size, self.max_size or train_size))
        if max(self.sizes) > train_size:
            raise InvalidInputError(
                f"micro-batch size {max(self.sizes)}",
                f"the training data has {train_size} examples",
                "give smaller sizes",
            )
        return sorted(set(self.sizes))

    def _climb(self, pending: list[int]) -> None:
        while pending:
            size = self._next_size(pending)
            self._left_out += [other for other in pending if other < size]
            trial = self._try_confirmed(size)
            if trial.kind == "late":
                self.stopped = "time"
                self.notes.append(f"micro-batch sizes from {size} up: the time ended")
                return
            self._keep(trial)
            pending = [other for other in pending if other > size]
            if trial.kind != "fits" and self._is_the_end(trial, pending):
                self.stopped = "does not fit"
                self._bisect()
                return

    def _is_the_end(self, trial: _Trial, pending: list[int]) -> bool:
        """Whether a failure ends the climb; an exception may concern one size only.

        Batch normalisation refuses size 1, a model may want even sizes.
        """
        if trial.kind != "error":
            return True
        self._errors.append(trial)
        if not self.points:
            if len(self._errors) >= _ERRORS_FROM_THE_START or not pending:
                raise _step_fails(self._errors)
            return False
        row = [size for size in self.failures if size > max(self.points)]
        return len(row) >= _ERRORS_IN_A_ROW or not pending

    def _bisect(self) -> None:
        """Close in on the largest size that fits, to 1 example or 3 %."""
        if self.sizes is not None or not self.points:
            return
        low = max(self.points)
        high = min(size for size in self.failures if size > low)
        while high - low > max(1, low // 32):
            middle = (low + high) // 2
            trial = self._try(middle)
            if trial.kind == "late":
                self.notes.append(f"micro-batch sizes between {low} and {high}: the time ended")
                return
            self._keep(trial)
            low, high = (middle, high) if trial.kind == "fits" else (low, middle)

    def _keep(self, trial: _Trial) -> None:
        if trial.point is not None:
            self.points[trial.size] = trial.point
        else:
            self.failures[trial.size] = SpeedFailure(
                micro_batch_size=trial.size, reason=trial.reason
            )
        if self.tell is not None:
            self.tell(trial.result)

    def _next_size(self, pending: list[int]) -> int:
        """Return the next size, passing over some when the time will not do for all.

        Step times are extrapolated for this plan only; no result rests on them.
        """
        if self.sizes is not None or len(self.points) < 2:
            return pending[0]
        left = self._deadline - time.monotonic()
        for factor in (1.0, 2.0, 4.0):
            kept = thin([max(self.points), *pending], factor)[1:]
            if sum(self._planned_seconds(size) for size in kept) <= left:
                return kept[0]
        return thin([max(self.points), *pending], 2.0)[1]

    def _planned_seconds(self, size: int) -> float:
        """Return what a size may cost if step time goes on along its last slope."""
        *_, before, last = (self.points[size] for size in sorted(self.points))
        rise = max(0.0, last.seconds_per_step - before.seconds_per_step)
        slope = rise / (last.micro_batch_size - before.micro_batch_size)
        step = last.seconds_per_step + slope * (size - last.micro_batch_size)
        return max(self._slice(), _PLANNED_STEPS * step)

    def _slice(self) -> float:
        return min(_LONGEST_SLICE, self.seconds * _SLICE)

    def _try_confirmed(self, size: int) -> _Trial:
        """Run a size; a failure that may be a mishap is repeated, in a fresh child if killed."""
        first = self._try(size)
        if first.kind not in ("memory", "died", "collapsed"):
            return first
        second = self._try(size)
        return first if second.kind == "late" else second

    def _try(self, size: int) -> _Trial:
        left = self._deadline - time.monotonic()
        if left <= 0 or (not self._ready and not self._start_child()):
            return _Trial(size, "late")
        assert self._child is not None
        # The child ends a size by itself a little earlier than it would be killed.
        self._child.send(size=size, slice_seconds=self._slice(), seconds_left=0.9 * left)
        message = self._child.receive(
            until=self._deadline, resident_limit=self._about["resident_limit"]
        )
        trial = self._judge(size, message)
        if trial.kind in ("memory", "died", "late") or (
            trial.kind == "error" and self._about["device_type"] != "cpu"
        ):
            # Also where the child lives: frames of the failed step keep memory, and a CUDA
            # error makes every later call fail.
            self._ready = False
        return trial

    def _judge(self, size: int, message: dict[str, Any]) -> _Trial:
        event, reason = message.pop("event"), message.get("reason", "")
        limit = self._facts["limit_bytes"]
        if event == "measured":
            undisturbed = message.pop("undisturbed_seconds")
            self._queued.append(message.pop("queued_share"))
            return self._judge_point(_point(size, message), undisturbed)
        if event == "late":
            return _Trial(size, "late")
        if event == "over limit":
            return _Trial(size, "memory", reason=f"over the limit of {_mb(limit)}")
        if event == "out of memory":
            return _Trial(size, "memory", reason=f"out of memory: {reason}")
        if event == "died":
            return _Trial(size, "died", reason=reason)
        return _Trial(size, "error", reason=reason, parts=message["parts"])

    def _judge_point(self, point: SpeedPoint, undisturbed: float) -> _Trial:
        size, limit = point.micro_batch_size, self._facts["limit_bytes"]
        if point.peak_bytes > limit:
            reason = f"over the limit: {_mb(point.peak_bytes)} of {_mb(limit)}"
            return _Trial(size, "memory", reason=reason)
        smaller = [other for other in self.points.values() if other.micro_batch_size < size]
        if collapses(size, undisturbed, smaller):
            best = max(smaller, key=lambda other: other.examples_per_second)
            reason = (
                f"throughput collapsed: {size / undisturbed:.3g} examples/s, "
                f"{best.examples_per_second:.3g} at size {best.micro_batch_size}"
            )
            return _Trial(size, "collapsed", reason=reason)
        return _Trial(size, "fits", point=point)

    def _start_child(self) -> bool:
        """Start a child and wait until the workload is loaded; False when time ends."""
        host_limit = int(available_bytes() * (1 - self.settings["margin"]))
        if self._child is None or not self._child.restart():
            if self._child is not None:
                self._child.kill()
            self._child = ProbeProcess(self.parcel, self.settings)
        until = None if math.isinf(self._deadline) else self._deadline
        message = self._child.receive(until=until, resident_limit=host_limit)
        if message["event"] == "late":
            return False
        if message["event"] == "invalid":
            raise InvalidInputError(*message["parts"])
        if message["event"] != "ready":
            raise InvalidInputError(
                f"workload: {message['reason']}",
                "model and data must load in a process of their own",
                "make the workload smaller or correct it",
            )
        if message["device_type"] == "cpu":
            host_limit = min(self.settings["limit_bytes"] or sys.maxsize, message["limit_bytes"])
        self._about = {**message, "resident_limit": message["resident_bytes"] + host_limit}
        self._ready = True
        return True


def _point(size: int, message: dict[str, Any]) -> SpeedPoint:
    per_second = size / message["seconds_per_step"]
    return SpeedPoint(micro_batch_size=size, examples_per_second=per_second, **message)


def _step_fails(trials: list[_Trial]) -> InvalidInputError:
    first = trials[0]
    if first.parts is not None:
        return InvalidInputError(*first.parts)
    sizes = ", ".join(str(trial.size) for trial in trials)
    return InvalidInputError(
        f"training step at micro-batch size {sizes}: {first.reason}",
        "the step must run at some size",
        "correct the workload's model or loss",
    )


def _mb(amount: int) -> str:
    return f"{amount / 1e6:,.0f} MB"


def _threads_here() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None


def _check_arguments(
    seconds: float,
    margin: float,
    max_size: int | None,
    sizes: Sequence[int] | None,
    limit_bytes: int | None,
    threads: int | None,
) -> None:
    if not 0 < seconds < math.inf:
        raise InvalidInputError(f"seconds {seconds!r}", "a positive time is required", "give 15")
    if not 0 <= margin < 1:
        raise InvalidInputError(f"margin {margin!r}", "a share in [0, 1) is required", "give 0.1")
    if sizes is not None and len(sizes) == 0:
        raise InvalidInputError("no sizes", "at least one is required", "leave sizes out")
    counts = [("max_size", max_size), ("limit_bytes", limit_bytes), ("threads", threads)]
    for name, value in counts + [("micro-batch size", size) for size in sizes or ()]:
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InvalidInputError(
                f"{name} {value!r}", "a whole number of at least 1 is required", "correct it"
            )
