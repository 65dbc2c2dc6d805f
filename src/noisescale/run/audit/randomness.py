"""Random numbers in a pass: whether they matter, who draws them, and how to do without."""

from __future__ import annotations

import pickle
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from noisescale.measure.compiled import plain, plain_name
from noisescale.run.audit.bench import ROUNDING, SEEDS_LEFT, Bench
from noisescale.run.audit.conditions import QUIET, Condition
from noisescale.run.audit.differences import Sizes

SEEDS = 3
"""Other seeds that show what random numbers change. (assumed)"""

LOSS = "(outside of modules)"


@dataclass(frozen=True)
class Randomness:
    """Random numbers that change the gradient.

    Attributes:
        quiet: the condition that draws none; None where none has to be switched off, or where
            none helps.
        left: whether some are drawn in that condition all the same.
        dropout: modules that draw for dropout.
        other: modules that draw for something else.
        floor: mean difference of a pass with other numbers.
    """

    quiet: str | None
    left: bool
    dropout: tuple[str, ...]
    other: tuple[str, ...]
    floor: Sizes

    @property
    def any(self) -> bool:
        """Whether random numbers change the gradient."""
        return self.left or self.quiet is not None


def find_randomness(bench: Bench) -> Randomness:
    """Try other seeds, then one way after the other to draw nothing.

    Where nothing helps, the bench averages over seeds from here on.
    """
    floor = _floor(bench)
    if not any(floor.groups.values()) or not _varies(bench, Condition()):
        return Randomness(None, False, (), (), floor)
    quiet = next((q for q in QUIET if not _varies(bench, Condition(quiet=q))), None)
    drawn = _drawing(bench, Condition())
    remaining = _drawing(bench, Condition(quiet="functions"))
    if quiet in ("layers", "functions"):
        remaining = ()
    if quiet is None:
        bench.seeds = tuple(bench.seeds[0] + i for i in range(SEEDS_LEFT))
    return Randomness(
        quiet=quiet,
        left=quiet is None,
        dropout=tuple(name for name in drawn if name not in remaining),
        other=remaining,
        floor=floor,
    )


def _floor(bench: Bench) -> Sizes:
    """Root mean square difference from the first seed's gradient."""
    found = [_one(bench, Condition(), i) for i in range(SEEDS + 1)]
    gaps = [bench.gap(other, found[0]) for other in found[1:]]
    return Sizes(
        {
            name: (sum(one.groups[name] ** 2 for one in gaps) / len(gaps)) ** 0.5
            for name in gaps[0].groups
        }
    )


def _varies(bench: Bench, condition: Condition) -> bool:
    """Whether another seed changes more than repeating the same one does."""
    first, again, other = (_one(bench, condition, i) for i in (0, 0, 1))
    repeated, changed = bench.gap(first, again), bench.gap(first, other)
    return any(value > ROUNDING * repeated.groups[name] for name, value in changed.groups.items())


def _one(bench: Bench, condition: Condition, number: int) -> Any:
    seed = bench.seeds[0] + number
    return bench.run([bench.everything()], [1.0], condition, seed).gradient


def _drawing(bench: Bench, condition: Condition) -> tuple[str, ...]:
    """Return the innermost modules during whose forward pass a random state moved."""
    model = plain(bench.model)
    before: dict[nn.Module, bytes] = {}
    drew: list[str] = []
    names = {module: plain_name(name) for name, module in model.named_modules()}

    def enter(module: nn.Module, _args: Any) -> None:
        before[module] = _state(model)

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        inner = any(_inside(name, names[module]) for name in drew)
        if not inner and before.get(module) != _state(model) and names[module] not in drew:
            drew.append(names[module])

    handles = [
        handle
        for module in names
        for handle in (
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        )
    ]
    try:
        with bench.held(condition, bench.seeds[0]), torch.no_grad():
            start = _state(model)
            bench.workload.loss(bench.model, bench.batch(bench.everything()))
            if not drew and _state(model) != start:
                drew.append(LOSS)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(name or "(model)" for name in drew)


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _state(model: nn.Module) -> bytes:
    """Spell all random states that a pass may move."""
    held = [value for module in model.modules() for value in vars(module).values()]
    cuda = torch.cuda.is_available() and next(model.parameters()).is_cuda
    return pickle.dumps(
        (
            torch.get_rng_state().numpy().tobytes(),
            torch.cuda.get_rng_state().cpu().numpy().tobytes() if cuda else b"",
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002 - the user's code may draw from it
            [v.get_state().numpy().tobytes() for v in held if isinstance(v, torch.Generator)],
            [v.bit_generator.state for v in held if isinstance(v, np.random.Generator)],
        )
    )
