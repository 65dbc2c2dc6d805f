"""From differences and causes to a verdict."""

from __future__ import annotations

from collections.abc import Mapping

from noisescale.measure.inventory import Inventory
from noisescale.records import AuditCause, AuditGroup, AuditReplicas
from noisescale.run.audit.differences import Sizes, ratio
from noisescale.run.audit.replicas import Averaged
from noisescale.run.audit.sentences import REMEDIES

ONLY_RANDOM = {"dropout", "random"}
"""Causes that vanish on average."""

_NAMES = {
    "token_mean": "a loss averaged over something else than examples",
    "sum": "a loss that depends on the size of the batch",
    "partial_window": "a last micro-batch of another size",
    "collate": "examples that are padded, or made, by what else is in their batch",
    "batch_norm": "BatchNorm",
    "mixing": "a loss or model that mixes the examples of a batch",
    "state": "buffers that change in every pass",
    "dropout": "dropout",
    "random": "random numbers",
    "replicas": "gradients that the replicas do not share",
    "unexplained": "something that no experiment here names",
}


def rows(
    inventory: Inventory,
    whole: Sizes,
    *,
    allowed: Sizes,
    replicas: Sizes | None,
    **others: Sizes,
) -> tuple[AuditGroup, tuple[AuditGroup, ...]]:
    """Return the row of all parameters and one per group.

    Args:
        inventory: the parameters.
        whole: norms of the gradient of one pass.
        allowed: differences that say nothing.
        replicas: norms of the replicas' difference, if they ran.
        **others: ``accumulated``, ``weighted``, ``floating_point``, ``rng``.
    """
    named = {**others, **({"replicas": replicas} if replicas is not None else {})}
    counts: dict[str, int] = {}
    for slot in inventory.slots:
        counts[slot.group] = counts.get(slot.group, 0) + slot.tensor.numel()
    groups = tuple(
        _row(
            name,
            count,
            {key: value.groups[name] for key, value in named.items()},
            whole.groups[name],
            allowed.groups[name],
        )
        for name, count in counts.items()
    )
    totals = {key: value.total for key, value in named.items()}
    total = _row("", sum(counts.values()), totals, whole.total, allowed.total)
    return total, groups


def _row(
    name: str, count: int, gaps: Mapping[str, float], whole: float, allowed: float
) -> AuditGroup:
    compared = [gaps[key] for key in ("accumulated", "replicas") if key in gaps]
    shown = {key: ratio(value, whole) for key, value in gaps.items()}
    return AuditGroup(
        name=name,
        parameters=count,
        accumulated=shown["accumulated"],
        weighted=shown["weighted"],
        replicas=shown.get("replicas"),
        floating_point=shown["floating_point"],
        tolerance=ratio(allowed, whole),
        rng=shown["rng"],
        same=all(value <= allowed for value in compared),
    )


def replica_causes(averaged: Averaged, difference: float | None, *, same: bool) -> list[AuditCause]:
    """Return what is wrong with the replicas beyond how the batch was split."""
    if averaged.apart:
        shown = ", ".join(averaged.apart[:3])
        return [
            AuditCause(
                kind="replicas",
                affects=("replicas",),
                where=averaged.apart,
                difference=None,
                evidence=(
                    "after DistributedDataParallel's backward pass the replicas hold different"
                    f" gradients of {shown}{', ...' if len(averaged.apart) > 3 else ''}"
                ),
                remedy=REMEDIES["replicas"],
            )
        ]
    if same:
        return []
    return [
        AuditCause(
            kind="replicas",
            affects=("replicas",),
            difference=difference,
            evidence=(
                "the same parts averaged in one process give another gradient than replicas do,"
                " without random numbers too"
            ),
            remedy="look for what depends on the process: its rank, its data, its environment",
        )
    ]


def complete(
    causes: tuple[AuditCause, ...], total: AuditGroup, groups: tuple[AuditGroup, ...]
) -> tuple[AuditCause, ...]:
    """Add that something is left unexplained, where it is."""
    if causes or all(row.same for row in (total, *groups)):
        return causes
    return (
        AuditCause(
            kind="unexplained",
            affects=("accumulation",),
            difference=total.accumulated,
            evidence="the gradients differ though everything that was tried makes them equal",
            remedy=REMEDIES["unexplained"],
        ),
    )


def verdict(causes: tuple[AuditCause, ...], *, known: bool) -> str:
    """Return ``same``, ``same_in_expectation``, ``different`` or ``undetermined``."""
    if not known:
        return "undetermined"
    if not causes:
        return "same"
    return "same_in_expectation" if {c.kind for c in causes} <= ONLY_RANDOM else "different"


def sentence(verdict: str, causes: tuple[AuditCause, ...], replicas: AuditReplicas) -> str:
    """Say the verdict in one sentence."""
    several = replicas.outcome == "compared"
    both = "accumulation and replicas give" if several else "accumulation gives"
    if verdict == "undetermined":
        return "the gradient of one pass is not finite at these weights: nothing can be compared"
    if verdict == "same":
        return f"{both} the gradient of one pass, up to rounding"
    names = [_NAMES[cause.kind] for cause in causes]
    listed = ", ".join(names[:-1]) + (" and " if names[:-1] else "") + names[-1]
    if verdict == "same_in_expectation":
        makes = "make" if names[:-1] or listed == "random numbers" else "makes"
        return f"{both} the gradient of one pass on average; {listed} {makes} each draw differ"
    affected = dict.fromkeys(side for cause in causes for side in cause.affects)
    verb = "changes" if len(affected) == 1 else "change"
    return f"{' and '.join(affected)} {verb} the gradient, through {listed}"


def resolution(verdict: str, total: AuditGroup, *, left: bool) -> str:
    """Limit what was said where random numbers could not be switched off."""
    if verdict not in ("same", "same_in_expectation") or not left or total.tolerance is None:
        return ""
    return f" (a difference below {total.tolerance:.1%} of it could not be seen)"


def failure(replicas: AuditReplicas) -> tuple[str, ...]:
    """Warn of replicas that did not run."""
    if replicas.outcome == "failed":
        return (f"replicas were not compared: {replicas.detail}",)
    return (replicas.detail,) if replicas.outcome == "not_run" and replicas.detail else ()
