"""Why a batch size was chosen, in plain sentences with numbers and units."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from noisescale.records import AdviceRow, CriticalBatch, MemoryLimit, Outcome, ThroughputKnee


def judged_time(row: AdviceRow) -> float:
    """Return the relative time that rows are ranked by.

    At the point estimate where there is one, else at the lower end of the wider band;
    infinite where there is neither.
    """
    time = row.relative_time if row.relative_time is not None else row.relative_time_low
    return math.inf if time is None else time


def _short(value: float | None) -> str:
    """Three significant digits, never an exponent; ``?`` for what is not known.

    >>> _short(461234.5), _short(0.12345), _short(2.0)
    ('461,000', '0.123', '2')
    """
    return "?" if value is None else f"{float(f'{value:.3g}'):,.12g}"


def _count(count: int, unit: str) -> str:
    """Count something in its unit.

    >>> _count(1, "examples"), _count(1437, "sequences")
    ('1 example', '1,437 sequences')
    """
    return f"{count:,} {unit.removesuffix('s') if count == 1 else unit}"


def _words(name: str) -> str:
    return name.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class Reasons:
    """What a choice was made of, and why it came out so.

    Attributes:
        table: every row, smallest batch first.
        critical: the critical batch that the table rests on.
        memory: what fits.
        knee: where throughput stops to grow; None when nothing ran.
        max_waste: largest accepted E/Emin.
        tie: relative difference of time that counts as none.
        unit: what sizes count.
        own: the recipe's batch size, to compare with; None when there is none.
        obstacle: what keeps anything from being recommended, with its remedy; None when
            nothing but the numbers does.
    """

    table: tuple[AdviceRow, ...]
    critical: CriticalBatch
    memory: MemoryLimit
    knee: ThroughputKnee | None
    max_waste: float
    tie: float
    unit: str
    own: int | None = None
    obstacle: str | None = None

    def sentences(self, recommended: AdviceRow | None) -> tuple[str, ...]:
        """Return why this row, or why none: the most important sentence first."""
        return tuple(self._against() if recommended is None else self._of(recommended))

    def _of(self, row: AdviceRow) -> Iterator[str]:
        allowed = [other for other in self.table if other.allowed]
        quickest = min(allowed, key=judged_time)
        choice = f"Global batch {_count(row.global_batch_size, self.unit)}"
        rule = (
            f"of the {len(allowed)} batch sizes whose waste (examples over the fewest) is at most "
            f"{self.max_waste:g} at the lower end of the critical batch"
        )
        if row == quickest:
            yield f"{choice} reaches the target in the least time {rule}."
        else:
            yield (
                f"{choice} is the smallest within {100 * self.tie:g} % of the least time (that of "
                f"{quickest.global_batch_size}) {rule}."
            )
        yield self._critical()
        yield self._cost(row)
        yield from self._recipes(row)
        yield from self._tempting(row)
        yield from self._limits()
        yield from self._not_counted()

    def _against(self) -> Iterator[str]:
        if self.obstacle:
            yield f"Nothing is recommended: {self.obstacle}."
        elif not self.table:
            yield (
                "Nothing is recommended: no micro-batch size that ran and fits makes a global "
                "batch within the training data; test smaller sizes or use fewer devices."
            )
        elif not self.critical.low:
            # What cannot be measured at all needs what its detail says, not more steps.
            more = self.critical.outcome is not Outcome.UNSUPPORTED
            yield (
                "Nothing is recommended: the critical batch has no lower end "
                f"({_words(self.critical.outcome.value)}: {self.critical.detail or 'no detail'})"
                f"{'; measure more steps' if more else ''}."
            )
        else:
            first = self.table[0]
            yield (
                f"Nothing is recommended: even the smallest batch that can be made, "
                f"{_count(first.global_batch_size, self.unit)}, may take "
                f"{_short(first.examples_ratio_high)} times the fewest examples, more than "
                f"{self.max_waste:g}; allow more waste or test smaller micro-batch sizes."
            )
            yield self._critical()
        yield from self._limits()

    def _critical(self) -> str:
        critical = self.critical
        basis = f"basis {_words(critical.basis)}, {critical.phase}"
        if critical.point is None:
            return (
                f"The critical batch is known only to be at least {_short(critical.low)} "
                f"{self.unit} ({basis}): time and waste are judged there."
            )
        high = "no upper end" if critical.high is None else f"{_short(critical.high)}"
        return (
            f"The critical batch is about {_short(critical.point)} {self.unit}, band "
            f"{_short(critical.low)} to {high} ({basis}): there both steps and examples are twice "
            "the fewest."
        )

    def _cost(self, row: AdviceRow) -> str:
        waste, steps = row.examples_ratio_high, row.steps_ratio_high or row.steps_ratio
        if row.examples_ratio is None or row.steps_ratio is None:
            return f"It takes at most {_short(waste)} times the fewest examples."
        return (
            f"It takes {_short(row.examples_ratio)} times the fewest examples (at most "
            f"{_short(waste)} over the band) and {_short(row.steps_ratio)} times the fewest steps "
            f"(at most {_short(steps)})."
        )

    def _recipes(self, row: AdviceRow) -> Iterator[str]:
        """Compare the recipe's own batch size with the recommended one."""
        for other in self.table:
            if other.global_batch_size != self.own or other == row:
                continue
            if other == self._ruled_out(row):
                return  # told as the tempting one
            yield (
                f"The recipe's own batch, {_count(other.global_batch_size, self.unit)}, would take "
                f"{_short(judged_time(other) / judged_time(row))} times as long and at most "
                f"{_short(other.examples_ratio_high)} times the fewest examples."
            )

    def _ruled_out(self, row: AdviceRow) -> AdviceRow | None:
        """Return the faster row that the limit on waste rules out."""
        fastest = min(self.table, key=judged_time)
        share = judged_time(fastest) / judged_time(row)
        return None if fastest.allowed or share > 1 - self.tie else fastest

    def _tempting(self, row: AdviceRow) -> Iterator[str]:
        fastest = self._ruled_out(row)
        if fastest is None:
            return
        share = judged_time(fastest) / judged_time(row)
        yield (
            f"Global batch {fastest.global_batch_size} would need {share:.2g} of that time but "
            f"may take {_short(fastest.examples_ratio_high)} times the fewest examples; allow more "
            "waste to have it (--max-waste)."
        )

    def _limits(self) -> Iterator[str]:
        memory, knee = self.memory, self.knee
        if memory.micro_batch_size is not None:
            failed = memory.largest_tested > memory.micro_batch_size
            what = f"{memory.largest_tested} does not fit" if failed else "none larger was run"
            yield (
                "The largest micro-batch that ran and fits is "
                f"{_count(memory.micro_batch_size, self.unit)} ({what})."
            )
        if knee is not None:
            yield (
                f"From micro-batch {knee.micro_batch_size} on throughput is within 10 % of the "
                f"best ({_short(knee.examples_per_second)} {self.unit} per second there)."
            )
            if knee.data_bound:
                yield "More than half of the step there is waiting for data: speed up the loader."

    def _not_counted(self) -> Iterator[str]:
        if any(row.accumulation > 1 for row in self.table):
            yield (
                "Steps with accumulation are that many measured steps of one micro-batch: an upper "
                "estimate, since the optimizer update is counted each time."
            )
        if any(row.replicas > 1 for row in self.table):
            yield (
                "Steps on several replicas are taken to last as long as on one: communication "
                "between them is not counted."
            )
