"""Planned schedules on a terminal and as a figure."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.plan import plan_schedule
from noisescale.records import Recipe, SchedulePlan
from noisescale.report.schedule_terminal import headline, render_schedule, strip


def plan_of(kind: str, **options: object) -> SchedulePlan:
    table = {"kind": "step", "milestones": [200, 300], "gamma": 0.2}
    recipe = Recipe(
        lr=0.1, momentum=0.9, batch_size=128, total_steps=400, warmup_steps=40,
        dataset_size=50_000, schedule=table if kind == "step" else {"kind": kind},
    )  # fmt: skip
    return plan_schedule(recipe, **options)  # type: ignore[arg-type]


def rendered(plan: SchedulePlan, width: int = 80, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    render_schedule(plan, Console(file=file, width=width, color_system=None))
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_says_all_and_fits(width: int) -> None:
    text = rendered(plan_of("step", grow=True, micro_batch_size=64, replicas=2), width)
    assert all(len(line) <= width for line in text.splitlines())
    for words in ("224 updates instead of 400: 44 % saved", "25,600", "3,200", "0.100"):
        assert words in " ".join(text.split())
    assert "0:128 25600:640 38400:3200" in text
    assert "Limit: 4,992 examples (a tenth of the data, 5,000, in multiples of 128)" in " ".join(
        text.split()
    )
    assert "arXiv:1711.00489" in text


def test_many_rows_are_thinned_and_said() -> None:
    plan = plan_of("cosine", grow=True, growth_factor=1.05)
    assert len(plan.rows) > 40
    text = rendered(plan)
    assert "rows left out here; --json has all" in text
    assert len(text.splitlines()) < 55


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_plain_terminal_shows_no_question_marks(encoding: str) -> None:
    text = rendered(plan_of("cosine", grow=True), encoding=encoding)
    assert "?" not in text
    assert "▁" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "400 updates, as many as the recipe's"),
        ({"warmup_batch": (32, 12_800)}, "600 updates instead of 400: 50 % more"),
        ({"warmup_batch": (8, 40_000)}, "2,432 updates instead of 400: 6.08× as many"),
        ({"grow": True}, "saved"),
    ],
)
def test_headlines(options: dict[str, object], words: str) -> None:
    assert words in headline(plan_of("step", **options))


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0], [5.0, 5.0], [0.0, 1e-300, 1e300]])
def test_strips_of_odd_values(values: list[float]) -> None:
    assert len(strip(values)) == len(values)


def test_figures_are_drawn_and_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from noisescale.report.schedule_figures import schedule_figure, write_schedule_figure

    plan = plan_of("cosine", grow=True)
    assert len(schedule_figure(plan).axes) == 3
    png = write_schedule_figure(plan, tmp_path / "plan.png")
    assert png.read_bytes()[:4] == b"\x89PNG"
    svg = write_schedule_figure(plan, tmp_path / "plan.SVG")
    words = " | ".join(ElementTree.parse(svg).getroot().itertext())
    for name in ("recipe", "plan", "learning rate", "updates", "examples seen in training"):
        assert name in words
    again = write_schedule_figure(plan, tmp_path / "again.svg")
    assert again.read_bytes() == svg.read_bytes()


@pytest.mark.parametrize("name", ["plan.pdf", "plan", "missing/plan.png", ".", "folder.png"])
def test_where_no_figure_can_be_written(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from noisescale.report.schedule_figures import check_drawable

    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InvalidInputError) as caught:
        check_drawable(tmp_path / name)
    assert "\n" not in str(caught.value)
