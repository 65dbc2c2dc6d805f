"""Why a split changes the gradient: every suspect is taken away, and put back alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from noisescale.errors import InvalidInputError
from noisescale.measure.compiled import plain, plain_name
from noisescale.records import AuditCause
from noisescale.run.audit import sentences
from noisescale.run.audit.bench import Bench, Found, shares
from noisescale.run.audit.conditions import Condition, batch_norms
from noisescale.run.audit.counts import explain_weights
from noisescale.run.audit.differences import Gradient, ratio, sizes
from noisescale.run.audit.fit import Fitter
from noisescale.run.audit.mixing import Mixers, find_mixers
from noisescale.run.audit.randomness import Randomness
from noisescale.run.audit.verdicts import ONLY_RANDOM


class Analyst:
    """Finds the causes of one way to split a batch.

    Args:
        bench: the batch.
        randomness: what is known of its random numbers.
        parts: the split.
        side: ``accumulation`` or ``replicas``.
    """

    def __init__(
        self, bench: Bench, randomness: Randomness, parts: Sequence[Tensor], side: str
    ) -> None:
        self._bench, self._random = bench, randomness
        self._parts, self._side = parts, side
        norms = batch_norms(bench.model)
        # Between replicas SyncBatchNorm has the statistics of the whole batch.
        self._norms = tuple(
            name
            for name, module in norms.items()
            if side != "replicas" or not isinstance(module, nn.SyncBatchNorm)
        )
        # Everything switched off that can be.
        self._fixed = Condition(quiet=randomness.quiet, frozen=bool(norms), restored=True)
        self._fit = Fitter(bench, self._fixed).fit(parts)
        if self._fit.kind == "none" and bench.examples.collated:
            self._try_cut()

    def causes(self) -> list[AuditCause]:
        """Return what makes a difference."""
        return [
            *self._reduction(),
            *self._partial_window(),
            *self._collation(),
            *self._batch_norm(),
            *self._mixing(),
            *self._state(),
            *self._randomness(),
        ]

    @property
    def _mixed(self) -> bool:
        """Whether no weights restore equality, so that no other cause can be judged by it."""
        return self._fit.kind in ("none", "sum_and_constant")

    def _cause(
        self, kind: str, evidence: str, *, remedy: str | None = None, **fields: object
    ) -> AuditCause:
        return AuditCause(
            kind=kind,
            affects=(self._side,),
            evidence=evidence,
            remedy=sentences.REMEDIES[remedy or kind],
            **fields,  # type: ignore[arg-type]
        )

    def _reduction(self) -> list[AuditCause]:
        """A loss that is no mean over the examples."""
        kind = self._fit.kind
        scales = ("sum", "scaled", "rescaled", "sum_and_constant")
        found = [self._scale()] if kind in scales else []
        return [*found, self._weighting()] if kind in ("weighted", "rescaled") else found

    def _scale(self) -> AuditCause:
        """A loss whose size goes with that of the batch."""
        total = sum(self._fit.weights)
        if self._fit.kind == "rescaled":
            times, difference = 1 / total, abs(1 / total - 1)
        else:
            whole, mean = self._bench.whole(self._fixed), self._mean_of_means(self._fixed)
            norms = [sizes(one.gradient, self._bench.inventory).total for one in (mean, whole)]
            known = ratio(norms[0], norms[1])
            times = 1 / total if known is None else known
            relative = self._relative(mean.gradient, whole.gradient)
            difference = abs(times - 1) if relative is None else relative
        evidence = sentences.summed(self._fit.kind, times, len(self._parts))
        scaled = self._fit.kind in ("scaled", "rescaled")
        return self._cause(
            "sum",
            evidence,
            remedy="scaled" if scaled else "sum",
            difference=difference,
            ratio=times,
        )

    def _weighting(self) -> AuditCause:
        """A mean over something else than examples."""
        whole, total = self._bench.whole(self._fixed), sum(self._fit.weights)
        weights = tuple(weight / total for weight in self._fit.weights)
        by_examples = self._bench.split(
            self._parts, [total * share for share in shares(self._parts)], self._fixed
        )
        batches = [self._bench.batch(part, cut=self._fixed.cut) for part in self._parts]
        counted = explain_weights(batches, weights)
        return self._cause(
            "token_mean",
            sentences.weighted(weights, self._fit.empty, counted),
            difference=self._relative(by_examples.gradient, whole.gradient),
            weights=weights,
        )

    def _partial_window(self) -> list[AuditCause]:
        lengths = [len(part) for part in self._parts]
        if len(set(lengths)) == 1 or self._fit.kind.startswith("sum"):
            return []
        mean = self._mean_of_means(self._fixed)
        weighted = self._bench.split(self._parts, shares(self._parts), self._fixed)
        if self._bench.same(mean.gradient, weighted.gradient, self._fixed):
            return []
        whole = self._bench.whole(self._fixed)
        size = sizes(whole.gradient, self._bench.inventory)
        between = self._bench.gap(mean.gradient, weighted.gradient)
        return [
            self._cause(
                "partial_window",
                sentences.partial(lengths, sure=not self._mixed),
                difference=between.over(size)[0],
            )
        ]

    def _try_cut(self) -> None:
        """Take parts out of the batch as it is, if that explains what collating anew does not."""
        cut = dataclasses.replace(self._fixed, cut=True)
        try:
            found = Fitter(self._bench, cut).fit(self._parts)
        except InvalidInputError:  # it cannot be cut
            return
        if found.kind != "none":
            self._fixed, self._fit = cut, found

    def _collation(self) -> list[AuditCause]:
        if not self._fixed.cut:
            return []
        difference = self._alone(dataclasses.replace(self._fixed, cut=False))
        if difference is None:
            return []
        return [self._cause("collate", sentences.collation(), difference=difference[0])]

    def _batch_norm(self) -> list[AuditCause]:
        if not self._norms:
            return []
        live = dataclasses.replace(self._fixed, frozen=False)
        if self._mixed:
            # Equality cannot be restored, so the modules themselves are tried.
            mixing = find_mixers(self._bench, live).modules
            where = tuple(name for name in self._norms if plain_name(name) in mixing)
            if not where:
                return []
            return [self._cause("batch_norm", sentences.batch_norm_tried(), where=where)]
        difference = self._alone(live)
        if difference is None:
            return []
        return [
            self._cause(
                "batch_norm", sentences.batch_norm(), where=self._norms, difference=difference[0]
            )
        ]

    def _mixing(self) -> list[AuditCause]:
        if self._fit.kind != "none":
            return []
        mixers: Mixers = find_mixers(self._bench, self._fixed)
        whole = self._bench.whole(self._fixed)
        found = self._bench.split(self._parts, shares(self._parts), self._fixed)
        evidence = sentences.mixing(
            mixers, frozen=self._fixed.frozen, order_matters=self._bench.order_matters
        )
        return [
            self._cause(
                "mixing",
                evidence,
                where=mixers.modules,
                difference=self._relative(found.gradient, whole.gradient),
            )
        ]

    def _state(self) -> list[AuditCause]:
        if self._side == "replicas":  # every process has buffers of its own
            return []
        moved = self._moved_buffers()
        if not moved or self._mixed:
            return []
        difference = self._alone(dataclasses.replace(self._fixed, restored=False))
        if difference is None:
            return []
        return [self._cause("state", sentences.state(moved), where=moved, difference=difference[0])]

    def _randomness(self) -> list[AuditCause]:
        known = self._random
        if not known.any:
            return []
        drawing = dataclasses.replace(self._fixed, quiet=None)
        difference = self._one_draw(drawing)
        found = []
        if known.dropout:
            alone = difference if not known.other else None
            evidence = sentences.dropout(separable=not self._mixed and not known.left)
            found.append(self._cause("dropout", evidence, where=known.dropout, difference=alone))
        if known.other or not known.dropout:
            if known.dropout:
                difference = self._one_draw(dataclasses.replace(drawing, quiet="functions"))
            evidence = sentences.random(known.quiet, seeds=len(self._bench.seeds))
            found.append(
                self._cause(
                    "random",
                    evidence,
                    remedy="random_left" if known.left else "random",
                    where=known.other,
                    difference=difference,
                )
            )
        return found

    def _alone(self, condition: Condition) -> tuple[float | None] | None:
        """Return the relative difference in a condition; None where there is none."""
        whole = self._bench.whole(condition).gradient
        found = self._bench.split(self._parts, self._fit.weights, condition).gradient
        if self._bench.same(found, whole, condition):
            return None
        return (self._relative(found, whole),)

    def _one_draw(self, condition: Condition) -> float | None:
        """Return the relative difference of two single passes, which draw differently."""
        seed, everything = self._bench.seeds[0], [self._bench.everything()]
        whole = self._bench.run(everything, [1.0], condition, seed).gradient
        found = self._bench.drawn_anew(self._parts, self._fit.weights, condition).gradient
        return self._relative(found, whole)

    def _mean_of_means(self, condition: Condition) -> Found:
        count = len(self._parts)
        return self._bench.split(self._parts, [1 / count] * count, condition)

    def _relative(self, found: Gradient, whole: Gradient) -> float | None:
        size = sizes(whole, self._bench.inventory)
        return self._bench.gap(found, whole).over(size)[0]

    def _moved_buffers(self) -> tuple[str, ...]:
        """Name the buffers that a pass changes, other than a frozen BatchNorm's."""
        model, bench = self._bench.model, self._bench
        with bench.held(self._fixed, bench.seeds[0]):
            before = {name: value.clone() for name, value in plain(model).named_buffers()}
            bench.workload.loss(model, bench.batch(bench.everything()))
            after = dict(plain(model).named_buffers())
            return tuple(
                plain_name(name)
                for name, value in before.items()
                if name not in after or not _equal(after[name], value)
            )


def merge(found: Sequence[AuditCause]) -> tuple[AuditCause, ...]:
    """Join what accumulation and replicas have in common.

    The largest difference comes first, after them what vanishes on average.
    """
    by_kind: dict[str, AuditCause] = {}
    for cause in found:
        other = by_kind.get(cause.kind)
        if other is None:
            by_kind[cause.kind] = cause
            continue
        larger = max(other, cause, key=lambda one: one.difference or 0.0)
        affects = tuple(dict.fromkeys((*other.affects, *cause.affects)))
        by_kind[cause.kind] = dataclasses.replace(larger, affects=affects)
    return tuple(
        sorted(
            by_kind.values(),
            key=lambda one: (
                one.kind in ONLY_RANDOM,
                one.difference is None,
                -(one.difference or 0.0),
            ),
        )
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
