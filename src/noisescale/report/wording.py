"""How outcomes and numbers are put into words, the same in the terminal and on the page.

Numbers carry three significant digits and their unit; intervals say both ends; a half-line
says "at least". Nothing here knows where the words will be shown.
"""

from __future__ import annotations

import math
import re

from noisescale.records import (
    Advice,
    AdviceRow,
    BatchSplit,
    Curvature,
    MemoryLimit,
    NoiseScale,
    Outcome,
    ParametersSeen,
    RateCheck,
    Recipe,
    ThroughputKnee,
)

NOT_KNOWN = "not known"

_VERDICT = {
    "near_best": "near its best",
    "too_low": "too low",
    "too_high": "too high",
    "unclear": "unclear",
}
_OUTCOME = {
    Outcome.DETERMINED: "determined",
    Outcome.LOWER_BOUND: "lower bound only",
    Outcome.TOO_FEW_STEPS: "too few steps",
    Outcome.NOT_FINITE: "not finite",
    Outcome.UNSUPPORTED: "not supported",
}
_SOURCE = {
    "examples": "per-example gradients",
    "microbatches": "micro-batch gradients",
    "ranks": "gradients of the ranks",
}
_POPULATION = {
    "infinite": "an infinite population of data",
    "train_set": "the training set as the population",
}


def number(value: float | None, *, digits: int = 3) -> str:
    """Write a number with so many significant digits and thousands separated.

    >>> number(1234.5), number(0.012345), number(9.996), number(2.5e-7), number(None)
    ('1,230', '0.0123', '10.0', '2.50e-7', 'not known')
    """
    if value is None:
        return NOT_KNOWN
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    if not -5 < power < 12:
        return f"{mantissa}e{power}"
    return f"{float(f'{mantissa}e{power}'):,.{max(0, digits - 1 - power)}f}"


def setting(value: object) -> str:
    """Write a value of a recipe as the user would: no rounding, no trailing zeros.

    >>> setting(0.5), setting(32), setting((0.9, 0.99)), setting(True)
    ('0.5', '32', '(0.9, 0.99)', 'true')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, tuple | list):
        return f"({', '.join(setting(item) for item in value)})"
    return str(value)


def noun(count: float | None, plural: str) -> str:
    """Return the unit as it is said after a count.

    >>> noun(1, "examples"), noun(2, "devices"), noun(1, "passes")
    ('example', 'devices', 'pass')
    """
    if count != 1:
        return plural
    return plural[:-2] if plural.endswith("sses") else plural.removesuffix("s")


def count(value: int | None, unit: str) -> str:
    """Write a whole number in full, with its unit.

    >>> count(1437, "examples"), count(1, "devices")
    ('1,437 examples', '1 device')
    """
    return NOT_KNOWN if value is None else f"{value:,} {noun(value, unit)}"


def quantity(value: float | None, unit: str) -> str:
    """Write a measured number with its unit.

    >>> quantity(91.27, "examples")
    '91.3 examples'
    """
    return NOT_KNOWN if value is None else f"{number(value)} {unit}"


def interval(low: float | None, high: float | None, unit: str = "") -> str:
    """Write both ends; an end that is None is open.

    >>> interval(70.21, 121.4, "examples"), interval(120, None, "examples"), interval(None, None)
    ('70.2 to 121 examples', 'at least 120 examples', 'not known')
    """
    tail = f" {unit}" if unit else ""
    if low is None and high is None:
        return NOT_KNOWN
    if high is None:
        return f"at least {number(low)}{tail}"
    if low is None:
        return f"at most {number(high)}{tail}"
    return f"{number(low)} to {number(high)}{tail}"


def ratio(value: float | None) -> str:
    """Write a multiple.

    >>> ratio(1.333)
    '1.33×'
    """
    return NOT_KNOWN if value is None else f"{number(value)}×"


def ratio_interval(low: float | None, high: float | None) -> str:
    """Write the band of a multiple, short enough for a table's cell; nothing where there is none.

    >>> ratio_interval(1.1, 1.9), ratio_interval(2, None), ratio_interval(None, None)
    ('1.10–1.90', 'at least 2.00', '')
    """
    if low is None and high is None:
        return ""
    if low is None or high is None:
        return interval(low, high)
    return f"{number(low)}–{number(high)}"


def sentence(text: str) -> str:
    """Start with a capital, unless a file's or a key's name begins it, and end with a stop.

    >>> sentence("no size fits"), sentence("base.toml: it says no size")
    ('No size fits.', 'base.toml: it says no size.')
    """
    text = text.strip()
    name = re.match(r"[\w-]+[._]\w", text) is not None
    first = text[:1] if name else text[:1].upper()
    return first + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def percent(share: float) -> str:
    """Write a share.

    >>> percent(0.95)
    '95 %'
    """
    return f"{100 * share:.3g} %"


def duration(seconds: float | None) -> str:
    """Write a time in the unit that suits it.

    >>> duration(0.01234), duration(75), duration(7300), duration(4e-5)
    ('12.3 ms', '1 min 15 s', '2 h 1 min', '40.0 µs')
    """
    if seconds is None:
        return NOT_KNOWN
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (59.95, 1.0, "s")):
        if seconds < limit:
            return f"{number(seconds * scale)} {unit}"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def memory(size: int | None) -> str:
    """Write a number of bytes in binary units.

    >>> memory(1536), memory(3 * 2**30), memory(12)
    ('1.50 KiB', '3.00 GiB', '12 bytes')
    """
    if size is None:
        return NOT_KNOWN
    if size < 1024:
        return count(size, "bytes")
    power = min(4, (size.bit_length() - 1) // 10)
    return f"{number(size / 1024**power)} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def split_sentence(split: AdviceRow | BatchSplit, unit: str) -> str:
    """Spell how a global batch is made.

    >>> from noisescale.records import BatchSplit
    >>> row = BatchSplit(global_batch_size=512, micro_batch_size=64, accumulation=4, replicas=2)
    >>> split_sentence(row, "examples")
    'global batch of 512 examples = micro-batch 64 × accumulation 4 × 2 devices'
    """
    return (
        f"global batch of {count(split.global_batch_size, unit)}"
        f" = micro-batch {split.micro_batch_size:,} × accumulation {split.accumulation:,}"
        f" × {count(split.replicas, 'devices')}"
    )


def split_cell(split: AdviceRow | BatchSplit) -> str:
    """Spell the three factors alone, for a column that names them."""
    return f"{split.micro_batch_size:,} × {split.accumulation:,} × {split.replicas:,}"


def headline(advice: Advice) -> str:
    """Return the answer in one line: the recommended split, or why there is none."""
    if advice.recommended is not None:
        return f"Use a {split_sentence(advice.recommended, advice.unit)}"
    return f"No recommendation. {why_none(advice)}".rstrip()


def why_none(advice: Advice) -> str:
    """Say why nothing is recommended."""
    why = advice.reasons[0] if advice.reasons else advice.limits.critical_batch.detail
    return sentence(why) if why else ""


def outcome(value: Outcome) -> str:
    """Name an outcome."""
    return _OUTCOME[value]


def noise_scale(noise: NoiseScale) -> str:
    """State a noise scale with its interval and level.

    >>> from noisescale.records import NoiseScale, Outcome, ParametersSeen
    >>> seen = ParametersSeen(seen=1, total=1)
    >>> kwargs = dict(grad_sq=1.0, trace_cov=1.0, steps=9, examples=9, source="examples")
    >>> noise_scale(NoiseScale(b_simple=91.27, low=70.0, high=121.0, outcome=Outcome.DETERMINED,
    ...     parameters_seen=seen, **kwargs))
    '91.3 examples (95 % interval 70.0 to 121)'
    >>> noise_scale(NoiseScale(b_simple=None, low=120.0, high=None, outcome=Outcome.LOWER_BOUND,
    ...     parameters_seen=seen, **kwargs))
    'at least 120 examples (95 %)'
    """
    level = percent(noise.level)
    if noise.b_simple is not None:
        return (
            f"{quantity(noise.b_simple, noise.unit)} ({level} interval"
            f" {interval(noise.low, noise.high)})"
        )
    if noise.low is not None:
        return f"{interval(noise.low, noise.high, noise.unit)} ({level})"
    return f"not determined: {outcome(noise.outcome)}"


def noise_scale_short(noise: NoiseScale | None) -> str:
    """State a noise scale in a few words."""
    if noise is None:
        return "not measured"
    if noise.b_simple is not None:
        return quantity(noise.b_simple, noise.unit)
    return interval(noise.low, noise.high, noise.unit) if noise.low else outcome(noise.outcome)


def parameters_seen(seen: ParametersSeen) -> str:
    """Say how many parameters a measurement covered, and name what it left out."""
    if seen.complete:
        return f"all {count(seen.total, 'parameters')}"
    names = ", ".join(seen.missing[:3]) + (", ..." if len(seen.missing) > 3 else "")
    return f"{seen.seen:,} of {count(seen.total, 'parameters')} (without {names})"


def rests_on(noise: NoiseScale) -> str:
    """Say what a measurement was made from."""
    source = _SOURCE.get(noise.source, noise.source)
    population = _POPULATION.get(noise.population, noise.population)
    text = f"{count(noise.steps, 'steps')}, {count(noise.examples, noise.unit)}, {source},"
    text += f" {population}, {parameters_seen(noise.parameters_seen)}"
    text += "" if noise.preconditioner == "none" else f", {noise.preconditioner} norm"
    skipped = noise.skipped_steps
    return f"{text}, {count(skipped, 'steps')} left out as not finite" if skipped else text


def memory_point(limit: MemoryLimit, unit: str) -> str:
    """State the memory limit in a few words."""
    if limit.micro_batch_size is None:
        return "no size fits"
    return f"micro-batch {count(limit.micro_batch_size, unit)}"


def memory_lines(limit: MemoryLimit, unit: str) -> list[tuple[str, str]]:
    """Return what stands under the memory limit."""
    lines = []
    if limit.peak_bytes is not None:
        lines.append(("peak there", memory(limit.peak_bytes)))
    lines.append(("may use", memory(limit.limit_bytes)))
    lines.append(("largest tried", count(limit.largest_tested, unit)))
    return lines


def memory_note(limit: MemoryLimit) -> str:
    """Say when the true limit may be higher than the one found."""
    if limit.micro_batch_size is not None and limit.micro_batch_size >= limit.largest_tested:
        return "the largest size tried still fits"
    return ""


def knee_point(knee: ThroughputKnee | None, unit: str) -> str:
    """State the throughput knee in a few words."""
    return "not known" if knee is None else f"micro-batch {count(knee.micro_batch_size, unit)}"


def knee_lines(knee: ThroughputKnee | None, unit: str) -> list[tuple[str, str]]:
    """Return what stands under the throughput knee."""
    if knee is None:
        return []
    bound = "waiting for data" if knee.data_bound else "compute"
    return [
        ("throughput there", f"{number(knee.examples_per_second)} {unit}/s"),
        ("limited by", bound),
    ]


def rate_verdict(check: RateCheck) -> str:
    """State the verdict on the learning rate in one line."""
    verdict = _VERDICT.get(check.verdict, check.verdict)
    best = "" if check.best_lr is None else f" (best tried: {setting(check.best_lr)})"
    return f"lr {setting(check.lr)} is {verdict}{best}"


def rate_consequence(check: RateCheck, unit: str) -> str:
    """Say at which rate the noise scale was measured, where that is not the recipe's."""
    if check.measured_lr == check.lr:
        return ""
    text = f"The noise scale was measured at lr {setting(check.measured_lr)}"
    if check.b_simple_at_lr is None:
        return f"{text}."
    given = quantity(check.b_simple_at_lr, unit)
    return f"{text}; at lr {setting(check.lr)} it would have read {given}."


def recipe_line(recipe: Recipe) -> str:
    """State the parts of a recipe that matter most."""
    momentum = f" with momentum {setting(recipe.momentum)}" if recipe.momentum else ""
    parts = [f"{recipe.optimizer}{momentum}", f"lr {setting(recipe.lr)}"]
    if recipe.trust_coefficient is not None:
        parts.append(f"trust coefficient {setting(recipe.trust_coefficient)}")
    parts.append(f"global batch {count(recipe.batch_size, recipe.unit)}")
    return ", ".join(parts)


def not_allowed(max_waste: float) -> str:
    """Say why a row of the table is not allowed."""
    return (
        f"may need more than {setting(float(max_waste))}× the fewest examples"
        " (judged at the lower end of the wider band)"
    )


def curvature(found: Curvature) -> str:
    """Say how large the Hessian's largest eigenvalue was along the run."""
    norm = "" if found.preconditioner == "none" else f" ({found.preconditioner} norm)"
    looks = count(len(found.points), "looks")
    return (
        f"largest eigenvalue of the Hessian{norm}: {number(found.upper)} at its"
        f" {found.quantile:.0%} quantile over the steps, median {number(found.median)}, at most"
        f" {number(found.largest)} ({looks})"
    )
