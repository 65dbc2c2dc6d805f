"""Audit a workload: does accumulation, or the number of replicas, change the gradient?"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from noisescale import __version__
from noisescale.errors import InvalidInputError
from noisescale.measure.compiled import Uncompiled
from noisescale.measure.probe_process import Parcel, pack
from noisescale.measure.untouched import untouched
from noisescale.records import Audit, AuditCause, AuditClipping, AuditGroup, AuditReplicas
from noisescale.run.audit import verdicts
from noisescale.run.audit.bench import Bench, shares
from noisescale.run.audit.causes import Analyst, merge
from noisescale.run.audit.clipping import compare_clipping
from noisescale.run.audit.conditions import AS_IT_IS, Condition
from noisescale.run.audit.differences import Gradient, Sizes, finite, sizes
from noisescale.run.audit.examples import Examples, in_parts
from noisescale.run.audit.randomness import Randomness, find_randomness
from noisescale.run.audit.recipe_units import Counting, unit_warnings
from noisescale.run.audit.replicas import Averaged, ReplicasError, average_over_replicas
from noisescale.run.audit.request import Request, read_request
from noisescale.run.dry_run import fresh_model
from noisescale.run.resolve import resolve_workload
from noisescale.run.users_code import blame_user
from noisescale.workload import Workload

Progress = Callable[[str, float | None], None]

REPLICA_SECONDS = 300.0
"""What replicas get in all, start included. (assumed)"""


def audit(
    workload: str | Workload,
    *,
    micro: int | None = None,
    replicas: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | Iterable[str] | None = None,
    replica_seconds: float = REPLICA_SECONDS,
    on_progress: Progress | None = None,
) -> Audit:
    """Compare the gradient of one batch with that of its parts, and find out why they differ.

    The batch is differentiated in one pass, as accumulated micro-batches, and split over replicas
    in processes of their own. What could make a difference is switched off until none is left,
    then switched on again alone. The model, the caller's random state and its gradients are left
    as they were.

    Args:
        workload: a built-in's name, ``module:attribute``, ``path/to/file.py:attribute`` or a
            Workload; its loss need not be a mean here.
        micro: examples per micro-batch; 8, or half of a smaller batch, by default.
        replicas: processes; 1 runs none. By default 2 where that is possible.
        batch_size: examples of the batch; the recipe's by default.
        seed: of the weights, the batch and the random numbers.
        data: folder of the built-ins that read files.
        overrides: recipe keys to replace.
        replica_seconds: time for the replicas, after which they are ended.
        on_progress: told what is being done.

    Returns:
        Differences in all and per module, what rounding and random numbers do, and the causes.

    Raises:
        InvalidInputError: bad input, replicas asked for of a workload that no other process can
            load, or the user's code raised.
    """
    began = time.monotonic()
    found = resolve_workload(workload, data=data, overrides=overrides)
    _check_seed(seed)
    request = read_request(found, batch_size=batch_size, micro=micro, replicas=replicas)
    tell = on_progress or _nobody
    parcel, refusal = _packed(workload, found, request, data, overrides)
    with torch.random.fork_rng(), _left_alone() as keep:
        torch.manual_seed(seed)
        model = fresh_model(found)
        keep(model)
        return _Audit(found, request, model, seed, tell).record(
            parcel, refusal, seconds=replica_seconds, began=began
        )


@dataclass
class _Compared:
    """What is compared with one pass, as training is."""

    whole: Gradient
    accumulated: Gradient
    weighted: Gradient
    replicas: Gradient | None = None
    causes: list[AuditCause] = field(default_factory=list)


class _Audit:
    """One audit while it goes."""

    def __init__(
        self, workload: Workload, request: Request, model: nn.Module, seed: int, tell: Progress
    ) -> None:
        self._workload, self._request, self._seed, self._tell = workload, request, seed, tell
        self._parts = in_parts(request.batch_size, request.micro)
        self._shards = in_parts(request.batch_size, request.batch_size // request.replicas)
        parts = self._parts if len(self._parts) > 1 else self._shards
        indices = _indices(workload, request.batch_size, seed, 0)
        self._bench = _bench(workload, model, indices, parts, seed)

    def record(self, parcel: Parcel | None, refusal: str, *, seconds: float, began: float) -> Audit:
        """Do all of it."""
        bench = self._bench
        self._tell("one pass", 0.0)
        compared = self._as_it_is()
        whole = compared.whole
        if not finite(whole):
            return self._record(compared, None, [], None, None, refusal, began=began)
        self._tell("random numbers", 0.1)
        randomness = find_randomness(bench)
        quiet = Condition(quiet=randomness.quiet)
        self._tell("causes", 0.2)
        causes = self._causes(randomness)
        self._tell("replicas", 0.6)
        replicas, averaged = self._replicas(parcel, refusal, randomness, seconds)
        if averaged is not None:
            compared.replicas = averaged.found[0]
            causes += self._of_replicas(averaged, quiet)
        clip = self._workload.recipe.clip_norm
        clipping = None if clip is None else compare_clipping(bench, self._parts, clip, quiet)
        return self._record(compared, randomness, causes, clipping, replicas, refusal, began=began)

    def _as_it_is(self) -> _Compared:
        """One pass and its micro-batches, each drawn once, as training would."""
        bench, parts, count = self._bench, self._parts, len(self._parts)
        return _Compared(
            whole=bench.run([bench.everything()], [1.0], AS_IT_IS, self._seed).gradient,
            accumulated=bench.drawn_anew(parts, [1 / count] * count, AS_IT_IS).gradient,
            weighted=bench.drawn_anew(parts, shares(parts), AS_IT_IS).gradient,
        )

    def _causes(self, randomness: Randomness) -> list[AuditCause]:
        found: list[AuditCause] = []
        if len(self._parts) > 1:
            found += Analyst(self._bench, randomness, self._parts, "accumulation").causes()
        if len(self._shards) > 1:
            found += Analyst(self._bench, randomness, self._shards, "replicas").causes()
        return found

    def _replicas(
        self, parcel: Parcel | None, refusal: str, randomness: Randomness, seconds: float
    ) -> tuple[AuditReplicas, Averaged | None]:
        count = self._request.replicas
        if count == 1 or parcel is None:
            words = refusal or _why_no_replicas(self._request)
            return AuditReplicas(processes=count, outcome="not_run", detail=words), None
        passes = [(None, [self._seed]), (randomness.quiet, list(self._bench.seeds))]
        try:
            averaged = average_over_replicas(
                parcel, self._bench, self._shards, passes, timeout=seconds
            )
        except ReplicasError as problem:
            return AuditReplicas(processes=count, outcome="failed", detail=str(problem)), None
        kept = AuditReplicas(
            processes=count,
            outcome="compared",
            through=averaged.through,
            detail=averaged.detail,
        )
        return kept, averaged

    def _of_replicas(self, averaged: Averaged, quiet: Condition) -> list[AuditCause]:
        """What differs in processes and not when the same parts are averaged in this one."""
        bench, shards = self._bench, self._shards
        # Every process begins with the same buffers.
        each = replace(quiet, restored=True)
        here = bench.split(shards, shares(shards), each).gradient
        apart = bench.gap(averaged.found[1], here)
        difference = apart.over(sizes(here, bench.inventory))[0]
        # SyncBatchNorm joins the processes' statistics, which no parts in this one have.
        joined = any(isinstance(m, nn.SyncBatchNorm) for m in bench.model.modules())
        same = joined or bench.same(averaged.found[1], here, quiet)
        return verdicts.replica_causes(averaged, difference, same=same)

    def _record(
        self,
        compared: _Compared,
        randomness: Randomness | None,
        causes: list[AuditCause],
        clipping: AuditClipping | None,
        replicas: AuditReplicas | None,
        refusal: str,
        *,
        began: float,
    ) -> Audit:
        request, workload = self._request, self._workload
        total, groups = self._rows(compared, randomness)
        causes_found = merge(causes)
        if randomness is not None:
            causes_found = verdicts.complete(causes_found, total, groups)
        verdict = verdicts.verdict(causes_found, known=randomness is not None)
        size = workload.train_size
        kept = replicas or AuditReplicas(
            processes=request.replicas, outcome="not_run", detail=refusal
        )
        return Audit(
            workload=workload.name,
            unit=workload.recipe.unit,
            batch_size=request.batch_size,
            micro_batch_size=request.micro,
            micro_batches=request.micro_batches,
            last_micro_batch=len(self._parts[-1]),
            last_window=size % request.batch_size,
            verdict=verdict,
            detail=verdicts.sentence(verdict, causes_found, kept)
            + verdicts.resolution(verdict, total, left=randomness is not None and randomness.left),
            causes=causes_found,
            total=total,
            groups=groups,
            another_batch=self._another_batch(compared.whole),
            replicas=kept,
            clipping=clipping,
            warnings=(
                *verdicts.failure(kept),
                *unit_warnings(
                    workload.recipe,
                    Counting(
                        batch_size=request.batch_size,
                        micro_batches=request.micro_batches,
                        replicas=request.replicas,
                        dataset_size=size,
                    ),
                ),
            ),
            seed=self._seed,
            seconds=time.monotonic() - began,
            version=__version__,
        )

    def _rows(
        self, compared: _Compared, randomness: Randomness | None
    ) -> tuple[AuditGroup, tuple[AuditGroup, ...]]:
        bench = self._bench
        nothing = Sizes(dict.fromkeys(sizes(compared.whole, bench.inventory).groups, 0.0))
        rounding = allowed = floor = nothing
        if randomness is not None:
            quiet = Condition(quiet=randomness.quiet)
            unknown = Sizes(dict.fromkeys(nothing.groups, math.nan))
            rounding = unknown if randomness.left else bench.rounding(quiet)
            allowed, floor = bench.tolerance(quiet), randomness.floor
        return verdicts.rows(
            bench.inventory,
            sizes(compared.whole, bench.inventory),
            allowed=allowed,
            accumulated=bench.gap(compared.accumulated, compared.whole),
            weighted=bench.gap(compared.weighted, compared.whole),
            replicas=None
            if compared.replicas is None
            else bench.gap(compared.replicas, compared.whole),
            floating_point=rounding,
            rng=floor,
        )

    def _another_batch(self, whole: Gradient) -> float | None:
        size = self._request.batch_size
        if self._workload.train_size < 2 * size or not finite(whole):
            return None
        indices = _indices(self._workload, size, self._seed, 1)
        other = _bench(self._workload, self._bench.model, indices, self._parts, self._seed)
        found = other.run([other.everything()], [1.0], AS_IT_IS, self._seed).gradient
        bench = self._bench
        return bench.gap(found, whole).over(sizes(whole, bench.inventory))[0]


def _bench(
    workload: Workload, model: nn.Module, indices: Tensor, parts: list[Tensor], seed: int
) -> Bench:
    with blame_user(f"workload {workload.name!r}: reading its data"):
        examples = Examples(workload, indices)
    return Bench(workload, model, examples, parts, seed)


def _indices(workload: Workload, size: int, seed: int, number: int) -> Tensor:
    """Return the examples of a batch, the first or the next of a shuffled order."""
    order = torch.randperm(workload.train_size, generator=torch.Generator().manual_seed(seed))
    return order[number * size : (number + 1) * size]


def _packed(
    named: str | Workload,
    found: Workload,
    request: Request,
    data: str | os.PathLike[str] | None,
    overrides: Mapping[str, Any] | Iterable[str] | None,
) -> tuple[Parcel | None, str]:
    """Pack the workload for other processes, by name where it has one.

    Raises:
        InvalidInputError: it cannot be sent, and replicas were asked for.
    """
    if request.replicas == 1:
        return None, ""
    source: Any = found
    if isinstance(named, str):
        given = overrides if isinstance(overrides, Mapping | None) else list(overrides)
        arguments = {
            "spec": named,
            "data": None if data is None else os.fspath(data),
            "overrides": None if given is None else given,
        }
        source = ("noisescale.run.resolve:resolve_workload", arguments)
    try:
        return pack(source), ""
    except InvalidInputError as problem:
        if request.replicas_asked:
            raise InvalidInputError(
                problem.value,
                problem.requirement,
                f"{problem.remedy}; or take 1 replica, which runs no other process",
            ) from None
        return None, f"the workload cannot be sent to other processes: {problem.requirement}"


def _why_no_replicas(request: Request) -> str:
    if request.replicas_asked:
        return ""
    return f"a batch of {request.batch_size} does not split over 2 replicas: none was run"


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise InvalidInputError(
            f"seed {seed!r}", "a whole number of at least 0 is required", "give seed=0"
        )


@contextmanager
def _left_alone() -> Iterator[Callable[[nn.Module], None]]:
    """Put a model that the caller holds too into training mode, and back afterwards."""
    held: list[Any] = []
    uncompiled: list[Uncompiled] = []

    def keep(model: nn.Module) -> None:
        context = untouched(model)
        context.__enter__()
        held.append(context)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and loading it takes seconds
            # Every part has another size, for which compiled code would be made anew.
            uncompiled.append(Uncompiled(model))
            uncompiled[-1].hold()
        model.train()

    try:
        yield keep
    finally:
        for holder in uncompiled:
            holder.release()
        for context in held:
            context.__exit__(None, None, None)


def _nobody(_what: str, _share: float | None) -> None:
    """Tell nobody."""
