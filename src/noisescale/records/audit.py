"""What ``noisescale audit`` returns: whether splitting a batch changes its gradient, and why."""

from __future__ import annotations

from dataclasses import dataclass

from noisescale.records.serial import Record


@dataclass(frozen=True, kw_only=True)
class AuditGroup(Record):
    """Relative differences of one parameter group's gradient from that of the batch in one pass.

    Each is a norm of a difference over the norm of the gradient of the one pass; None where that
    gradient is zero and the difference is not, or where a gradient is not finite.

    Attributes:
        name: of the module that holds the parameters; empty for all parameters together.
        parameters: how many numbers are trained in it.
        accumulated: mean of the micro-batches' gradients.
        weighted: the same mean, weighted by their examples.
        replicas: mean of the replicas' gradients; None also where none ran.
        floating_point: the same pass on the examples in another order, without random numbers:
            what rounding alone does; None also where random numbers cannot be switched off.
        tolerance: what is taken for rounding: several times that, or spacings of the numbers
            that the passes compute in; or for chance, where random numbers cannot be switched off.
        rng: the same pass with other random numbers; 0 where none are drawn.
        same: whether accumulation and replicas, as they are, stay within the tolerance here.
    """

    name: str
    parameters: int
    accumulated: float | None
    weighted: float | None
    replicas: float | None
    floating_point: float | None
    tolerance: float | None
    rng: float | None
    same: bool


@dataclass(frozen=True, kw_only=True)
class AuditCause(Record):
    """One reason why the gradients differ, found by taking it away.

    Attributes:
        kind: ``token_mean``, ``sum``, ``partial_window``, ``collate``, ``batch_norm``,
            ``mixing``, ``state``, ``dropout``, ``random``, ``replicas`` or ``unexplained``.
        affects: ``accumulation``, ``replicas`` or both.
        where: modules, or parts of the batch, that it was traced to.
        difference: relative difference that it makes alone, every other cause taken away; the
            larger one of accumulation and replicas; None where it cannot be separated.
        ratio: norm of the split gradient over that of the one pass, where that is the point.
        weights: shares of the micro-batches that make both equal, where unequal ones do.
        evidence: the experiment and what it gave, one sentence.
        remedy: what to do, one sentence.
    """

    kind: str
    affects: tuple[str, ...]
    where: tuple[str, ...] = ()
    difference: float | None = None
    ratio: float | None = None
    weights: tuple[float, ...] = ()
    evidence: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class AuditReplicas(Record):
    """The run in several processes.

    Attributes:
        processes: how many.
        outcome: ``compared``, ``failed`` or ``not_run``.
        through: ``DistributedDataParallel``, or ``all_reduce`` where that did not work.
        detail: one sentence; empty when all went well.
    """

    processes: int
    outcome: str
    through: str | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class AuditClipping(Record):
    """What the place of clipping does, at the recipe's ``clip_norm``.

    Attributes:
        clip_norm: largest norm of the gradient.
        norm: of the gradient of the batch in one pass.
        micro_norms: of the micro-batches' gradients.
        clipped_micro_batches: how many of those are above ``clip_norm``.
        after: relative difference of accumulating first and clipping once.
        each: relative difference of clipping every micro-batch's gradient before adding.
        before_dividing: relative difference of clipping the sum and dividing it afterwards.
    """

    clip_norm: float
    norm: float
    micro_norms: tuple[float, ...]
    clipped_micro_batches: int
    after: float | None
    each: float | None
    before_dividing: float | None


@dataclass(frozen=True, kw_only=True)
class Audit(Record):
    """What ``noisescale audit`` returns.

    Attributes:
        workload: the workload's name.
        unit: what batch sizes count.
        batch_size: global batch size.
        micro_batch_size: examples per pass when accumulating.
        micro_batches: passes per step.
        last_micro_batch: examples of the last one.
        last_window: examples that an epoch has left for its last batch; 0 where it is whole.
        verdict: ``same`` (within rounding), ``same_in_expectation`` (random numbers only),
            ``different``, or ``undetermined`` (a gradient that is not finite).
        detail: the verdict in one sentence.
        causes: the largest difference first.
        total: differences over all parameters.
        groups: differences per module.
        another_batch: relative difference of the gradient of another batch of the same size: the
            gradient noise, for scale.
        replicas: the run in several processes.
        clipping: None without ``clip_norm`` in the recipe.
        warnings: what else may be wrong, above all schedules in the wrong unit.
        seed: of the weights, the batch and the random numbers.
        seconds: wall time.
        version: of noisescale.
    """

    workload: str
    unit: str
    batch_size: int
    micro_batch_size: int
    micro_batches: int
    last_micro_batch: int
    last_window: int
    verdict: str
    detail: str
    causes: tuple[AuditCause, ...]
    total: AuditGroup
    groups: tuple[AuditGroup, ...]
    another_batch: float | None
    replicas: AuditReplicas
    clipping: AuditClipping | None
    warnings: tuple[str, ...]
    seed: int
    seconds: float
    version: str
