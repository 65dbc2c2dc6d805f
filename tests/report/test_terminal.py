from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from noisescale.records import Advice, BatchSplit, Measurement, Tradeoff
from noisescale.report.costs import thinned
from noisescale.report.terminal import (
    render_advice,
    render_measurement,
    render_split,
    render_tradeoff,
)
from noisescale.theory.tradeoff import fit_tradeoff


def printed(render: object, record: object, width: int = 100, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    render(record, Console(file=file, width=width))  # type: ignore[operator]
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_every_outcome_fits_its_width_and_is_plain_when_piped(
    any_advice: Advice, width: int
) -> None:
    text = printed(render_advice, any_advice, width)
    assert max(map(len, text.splitlines())) <= min(width, 100)
    assert "\x1b" not in text
    assert "None" not in text
    assert "nan" not in text


def test_the_answer_comes_first_and_numbers_carry_units(advices: dict[str, Advice]) -> None:
    text = printed(render_advice, advices["determined"])
    answer = "Use a global batch of 16 examples = micro-batch 16 × accumulation 1 × 1 device"
    assert text.index(answer) < text.index("Fits in memory")
    for words in (
        "global batch 91.3 examples",
        "sampling band (95 %): 71.9 to 118",
        "with model error: 41.2 to 205",
        "micro-batch 512 examples",
        "throughput there: 461,000",
        "4.09 MiB",
        "factor for sgd: 1.00 (0.570 to 1.75)",
        "lr 0.5 is near its best",
        "> 16",
        "1.18× (1.39×)",
        "361 µs",
        "2.75× (1.47–5.67)",
    ):
        assert words in text


def test_refused_rows_are_marked_without_colours(advices: dict[str, Advice]) -> None:
    lines = printed(render_advice, advices["determined"]).splitlines()
    assert any(line.startswith("- 24 ") for line in lines)
    assert any(line.startswith("- may need more than 1.5×") for line in lines)


def test_without_a_lower_end_nothing_is_marked_and_nothing_invented(
    advices: dict[str, Advice],
) -> None:
    text = printed(render_advice, advices["lower_bound"])
    assert "No recommendation. " in text
    assert "has no lower end" in " ".join(text.split())
    assert "at least 120" in text
    assert "over best" not in text
    assert "> recommended" not in text


def test_a_terminal_without_unicode_gets_plain_letters(any_advice: Advice) -> None:
    text = printed(render_advice, any_advice, encoding="ascii")
    assert "micro x" in text or not any_advice.table


def test_markup_in_names_is_text(advices: dict[str, Advice]) -> None:
    assert "<script>alert(1)</script>&[bold]$x$" in printed(render_advice, advices["hostile"])


def test_colour_is_used_on_a_terminal(advices: dict[str, Advice]) -> None:
    file = io.StringIO()
    render_advice(advices["determined"], Console(file=file, force_terminal=True, width=100))
    assert "\x1b[" in file.getvalue()


def test_thinning_keeps_ends_and_the_recommended_with_its_neighbours(
    advices: dict[str, Advice],
) -> None:
    advice = advices["many_rows"]
    rows = thinned(advice.table, advice.recommended, 6)
    assert advice.recommended is not None
    place = advice.table.index(advice.recommended)
    assert {advice.table[0], advice.table[-1], *advice.table[place - 1 : place + 2]} <= set(rows)
    assert len(rows) <= 9
    assert list(rows) == sorted(rows, key=lambda row: row.global_batch_size)


def test_measurement(measurement: Measurement) -> None:
    text = printed(render_measurement, measurement, 80)
    for words in (
        "Noise scale: 91.3 examples (95 % interval 71.9 to 118)",
        "412 steps, 13,184 examples",
        "all 4,810 parameters",
        "at least 65.1",
        "2.bias",
        "the rate was not checked",
    ):
        assert words in text


def test_split() -> None:
    split = BatchSplit(
        global_batch_size=512, micro_batch_size=64, accumulation=4, replicas=2, unit="sequences"
    )
    text = printed(render_split, split, 80)
    assert "Global batch of 512 sequences = micro-batch 64 × accumulation 4 × 2 devices" in text


def test_tradeoff(tradeoff: Tradeoff) -> None:
    text = printed(render_tradeoff, tradeoff, 80)
    for words in ("92.9 examples", "68.0 to 127", "98.2 steps", "2 more that did not reach"):
        assert words in text


def test_too_few_rows_have_no_fit_to_judge() -> None:
    none = fit_tradeoff(batch_size=[8, 16], steps=[100, 60])
    text = printed(render_tradeoff, none, 80)
    assert "2 runs at 2 batch sizes" in text
    for words in ("rms log error", "not finite", "one side of", "Fit:"):
        assert words not in text


def test_steps_that_rise_are_on_no_side_of_a_critical_batch() -> None:
    rising = fit_tradeoff(batch_size=[8, 16, 32, 64], steps=[100, 130, 200, 300])
    text = " ".join(printed(render_tradeoff, rising, 80).split())
    assert "Steps rise with the batch size, by a factor 3.06 from 8 to 64" in text
    assert "one side of" not in text


def test_the_terminal_needs_no_matplotlib_and_no_torch() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from noisescale.report import drawing, figures, page, terminal\n"
        "from noisescale.records import BatchSplit\n"
        "assert not {'torch', 'scipy', 'rich', 'jinja2'} & set(sys.modules), sys.modules\n"
        "terminal.render_split(BatchSplit(global_batch_size=4, micro_batch_size=2,"
        " accumulation=2, replicas=1))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "global batch" in done.stdout.lower()
