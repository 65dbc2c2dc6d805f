"""The bounds of `overhead.py`, its rows, verdicts and tables.

The bounds were fixed before the first full run. A verdict is of the median; `open` says that
the interval holds the bound too.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from overhead_methods import BLOCK, METHODS
from overhead_models import PROBLEMS, Problem

EXACT = dict(zip(PROBLEMS, (1.10, 1.05, 1.45, 1.28, 1.32, 1.75), strict=True))
BEST = dict(zip(PROBLEMS, (1.08, 1.03, 1.22, 1.06, 1.10, 1.40), strict=True))
SKETCH = {"cnn": 1.11, "resnet": 1.26}
EVERY_TEN = {name: 1 + (bound - 1) / BLOCK + 0.005 for name, bound in EXACT.items()}
IDLE = dict.fromkeys(PROBLEMS, 1.005)
ADAM = dict(zip(PROBLEMS, (1.15, 1.06, 1.35, 1.6, 1.6, 1.7), strict=True))
ERROR = 1e-5
MEMORY, MEMORY_OF = 1.25, {"mlp-1024": ("exact", "fused")}
EXACT_MODES = ("exact", "fused")
BEATEN_BY_DEFAULT = ("backpack", "opacus", "opacus-ghost")
OWN_BOUNDS = {
    "exact": EXACT, "fused": BEST, "sketch": SKETCH, "every-10": EVERY_TEN, "idle": IDLE,
    "adam": ADAM,
}  # fmt: skip


@dataclass
class Row:
    """What one method did on one problem.

    Attributes:
        method: its name.
        kind: plain, ours or peer.
        status: why there are no figures; empty where there are.
        note: what a reader must know about them.
        error: relative error of the sum of squared norms.
        spread: relative standard deviation of it from step to step (sketch).
        ratios: of each pair.
        plain_seconds: of the plain steps, per step.
    """

    method: str
    kind: str
    status: str = ""
    note: str = ""
    error: float | None = None
    spread: float | None = None
    ratios: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median ratio; infinite if there is none, so that no comparison favours it."""
        return statistics.median(self.ratios) if self.ratios else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the median ratio."""
        return median_interval(self.ratios)


@dataclass(frozen=True)
class Verdict:
    """One bound on one problem."""

    bound_of: str
    problem: str
    value: float
    bound: float
    met: bool
    open: bool
    what: str = ""


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Order statistics that enclose the median with this probability, whatever the distribution.

    The number of values below the median is binomial(n, 1/2); infinite below six values.
    """
    ordered, n = sorted(values), len(values)
    below, tail = 0, 0.5**n
    while 2 * tail <= 1 - level and below < n // 2:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    if not below:
        return -math.inf, math.inf
    return ordered[below - 1], ordered[n - below]


def hold(bound_of: str, problem: str, row: Row, bound: float) -> Verdict:
    """Hold a row's median ratio against a bound."""
    low, high = row.interval
    met = row.median <= bound
    return Verdict(bound_of, problem, row.median, bound, met, low <= bound <= high, row.method)


def beat(bound_of: str, problem: str, row: Row, peers: Sequence[Row]) -> list[Verdict]:
    """Hold a row against the fastest of its peers; `open` where the two intervals meet."""
    fastest = min((peer for peer in peers if peer.ratios), key=lambda p: p.median, default=None)
    if fastest is None:
        return []
    (low, high), (other_low, other_high) = row.interval, fastest.interval
    met, meets = row.median < fastest.median, low <= other_high and other_low <= high
    return [Verdict(bound_of, problem, row.median, fastest.median, met, meets, row.method)]


def judge(problem: str, rows: Sequence[Row]) -> list[Verdict]:
    """Hold the rows of one problem against the bounds."""
    by_name = {row.method: row for row in rows if not row.status.startswith("not available")}
    exact = [by_name[mode] for mode in EXACT_MODES if mode in by_name]
    verdicts = [
        hold(method, problem, by_name[method], bounds[problem])
        for method, bounds in OWN_BOUNDS.items()
        if method in by_name and method != "fused" and problem in bounds
    ]
    if exact:
        best = min(exact, key=lambda row: row.median)
        peers = [row for row in by_name.values() if row.kind == "peer"]
        verdicts.append(hold("best exact", problem, best, BEST[problem]))
        verdicts += beat("best < all peers", problem, best, peers)
    if "exact" in by_name:
        named = [by_name[peer] for peer in BEATEN_BY_DEFAULT if peer in by_name]
        verdicts += beat("default < three", problem, by_name["exact"], named)
    for row in exact:
        error = math.inf if row.error is None else row.error
        label = f"error, {row.method}"
        verdicts.append(Verdict(label, problem, error, ERROR, error <= ERROR, False, row.method))
    return verdicts


def word(verdict: Verdict) -> str:
    """Spell a verdict."""
    return ("met" if verdict.met else "MISSED") + (", open" if verdict.open else "")


def show(problem: Problem, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Print the table of one problem."""
    plain = [s for row in rows for s in row.plain_seconds]
    middle = f"{statistics.median(plain) * 1e3:.2f} ms" if plain else "-"
    print(f"\n{problem.name}, B {problem.batch_size}: plain step {middle}")
    print(f"  {'method':13}{'ratio':>8}  {'95 % interval':17}{'pairs':>6}{'error':>10}")
    own = {v.what: v for v in verdicts if v.bound_of == v.what}
    best = next((v for v in verdicts if v.bound_of == "best exact"), None)
    for row in rows:
        if row.status:
            print(f"  {row.method:13} {row.status}")
            continue
        error = "-" if row.error is None else f"{row.error:.1e}"
        error = f"std {row.spread:.1%}" if row.spread is not None else error
        held = [own[row.method]] if row.method in own else []
        held += [best] if best and best.what == row.method else []
        said = "; ".join(
            f"{'best exact ' if v.bound_of == 'best exact' else ''}at most {v.bound:.4g}: {word(v)}"
            for v in held
        )
        wrong = f" error above {ERROR:g}: MISSED" if _wrong(row) else ""
        print(
            f"  {row.method:13}{row.median:8.3f}  {_ends(row):17}"
            f"{len(row.ratios):6}{error:>10}  {said}{wrong}"
            + (f" [{row.note}]" if row.note else "")
        )
    sys.stdout.flush()


def _ends(row: Row) -> str:
    low, high = row.interval
    return f"{low:.3f} to {high:.3f}" if math.isfinite(low) else "-"


def _wrong(row: Row) -> bool:
    return METHODS[row.method].exact and (row.error is None or row.error > ERROR)


def summary(verdicts: Sequence[Verdict], problems: Sequence[str]) -> None:
    """Print every bound's row over the problems, and the count."""
    print(f"\n{'bound':17}" + "".join(f"{name:>27}" for name in problems))
    for label in dict.fromkeys(v.bound_of for v in verdicts):
        cells = []
        for name in problems:
            found = next((v for v in verdicts if (v.bound_of, v.problem) == (label, name)), None)
            cells.append("-" if found is None else _cell(found))
        print(f"{label:17}" + "".join(f"{cell:>27}" for cell in cells))
    missed = sum(not v.met for v in verdicts)
    print(f"{len(verdicts) - missed} of {len(verdicts)} bounds met, {missed} MISSED")


def _cell(verdict: Verdict) -> str:
    form = ".0e" if verdict.bound_of.startswith("error") else ".3f"
    return f"{verdict.value:{form}} ({verdict.bound:{form}}) {word(verdict)}"
