"""A training recipe: flat keys with torch's names; absent keys stay absent."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from noisescale.errors import InvalidInputError, nearest
from noisescale.records.serial import Record

OPTIMIZERS = ("sgd", "adam", "adamw", "lars", "lamb", "rmsprop", "lion")

_COUNTS = (
    "batch_size",
    "sequence_length",
    "dataset_size",
    "total_steps",
    "warmup_steps",
    "evaluate_every",
    "total_examples",
    "warmup_examples",
)
_FRACTIONS = ("momentum", "alpha", "ema_decay", "batchnorm_momentum")
_UNITS = ("examples", "sequences", "tokens")


@dataclass(frozen=True, kw_only=True)
class Recipe(Record):
    """How a model is trained.

    Attributes:
        optimizer: ``sgd``, ``adam``, ``adamw`` or ``rmsprop``, as torch.optim means them;
            ``lars`` or ``lamb``, as :mod:`noisescale.train` does; ``lion``, as Chen et al. 2023
            (arXiv:2302.06675). RMSProp and Lion are converted, not trained here.
        lr: learning rate.
        batch_size: global batch size, in ``unit``.
        momentum: heavy-ball momentum per step, in [0, 1).
        dampening: torch's dampening.
        nesterov: torch's nesterov.
        betas: Adam's decay rates per step, each in [0, 1).
        alpha: RMSProp's decay rate per step, in [0, 1).
        eps: Adam's epsilon.
        weight_decay: as the optimizer means it (coupled for sgd and adam).
        trust_coefficient: LARS's trust coefficient, the eta of its paper.
        ema_decay: decay per step of an average of the weights.
        clip_norm: largest norm of the global gradient.
        batchnorm_momentum: torch's momentum of batch statistics.
        unit: what batch sizes count: ``examples``, ``sequences`` or ``tokens``.
        sequence_length: tokens per sequence.
        dataset_size: training examples.
        total_steps: length of the training in optimizer steps.
        warmup_steps: steps of linear warm-up.
        schedule: table with ``kind`` and its milestones in steps.
        evaluate_every: steps between evaluations.
        total_examples: twin of ``total_steps`` in ``unit``.
        warmup_examples: twin of ``warmup_steps`` in ``unit``.
    """

    optimizer: str = "sgd"
    lr: float
    batch_size: int
    momentum: float | None = None
    dampening: float | None = None
    nesterov: bool | None = None
    betas: tuple[float, float] | None = None
    alpha: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    trust_coefficient: float | None = None
    ema_decay: float | None = None
    clip_norm: float | None = None
    batchnorm_momentum: float | None = None
    unit: str = "examples"
    sequence_length: int | None = None
    dataset_size: int | None = None
    total_steps: int | None = None
    warmup_steps: int | None = None
    schedule: dict[str, Any] | None = None
    evaluate_every: int | None = None
    total_examples: int | None = None
    warmup_examples: int | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise InvalidInputError(
                f"optimizer {self.optimizer!r}",
                "an optimizer that noisescale knows is required",
                nearest(str(self.optimizer), OPTIMIZERS),
            )
        if self.unit not in _UNITS:
            raise InvalidInputError(f"unit {self.unit!r}", "not a unit", nearest(self.unit, _UNITS))
        _require_number("lr", self.lr, positive=True)
        for name in _COUNTS:
            _require_count(name, getattr(self, name))
        for name in _FRACTIONS:
            _require_fraction(name, getattr(self, name))
        for value in self.betas or ():
            _require_fraction("betas", value)
        for name in ("eps", "weight_decay", "dampening"):
            _require_number(name, getattr(self, name), positive=False)
        for name in ("clip_norm", "trust_coefficient"):
            _require_number(name, getattr(self, name), positive=True)

    def with_changes(self, **changes: Any) -> Self:
        """Return the recipe with some keys replaced.

        Raises:
            InvalidInputError: a key is unknown or a value cannot be used.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for key in changes:
            if key not in names:
                raise InvalidInputError(
                    f"recipe key {key!r}", "not a key of a recipe", nearest(key, names)
                )
        return dataclasses.replace(self, **changes)

    @property
    def optimizer_kind(self) -> str:
        """What the noise does to the steps depends on it.

        ``sgd``, ``momentum``, ``adam`` (AdamW too), ``lars``, ``lamb``, ``rmsprop`` or ``lion``.
        """
        if self.optimizer == "sgd":
            return "momentum" if self.momentum else "sgd"
        return "adam" if self.optimizer == "adamw" else self.optimizer


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _require_number(name: str, value: Any, *, positive: bool) -> None:
    if value is None:
        return
    enough = _is_number(value) and (value > 0 if positive else value >= 0) and value != float("inf")
    if not enough:
        kind = "a positive number" if positive else "a number of at least 0"
        raise InvalidInputError(f"{name} {value!r}", f"{kind} is required", f"change {name}")


def _require_count(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInputError(
            f"{name} {value!r}", "a whole number of at least 1 is required", f"change {name}"
        )


def _require_fraction(name: str, value: Any) -> None:
    if value is None:
        return
    if not _is_number(value) or not 0 <= value < 1:
        raise InvalidInputError(
            f"{name} {value!r}", "a number in [0, 1) is required", f"change {name}"
        )
