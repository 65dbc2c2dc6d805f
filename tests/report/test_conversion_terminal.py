from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from noisescale import Recipe
from noisescale.plan.convert import convert
from noisescale.report.conversion_terminal import (
    label,
    render_conversion,
    render_conversion_briefly,
    value,
)

WHOLE = Recipe(
    lr=0.1, momentum=0.9, batch_size=256, dataset_size=50_000, total_steps=9000, warmup_steps=500,
    evaluate_every=200, ema_decay=0.999, clip_norm=1.0, batchnorm_momentum=0.1, weight_decay=1e-4,
    schedule={"kind": "step", "milestones": [3000, 6000], "gamma": 0.1},
)  # fmt: skip
SIZES = [(1024, {}), (64, {"noise_scale": 400.0}), (256, {})]


def shown(conversion, width: int, render=render_conversion) -> str:
    file = io.StringIO()
    render(conversion, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize(("size", "facts"), SIZES)
@pytest.mark.parametrize("width", range(40, 124, 3))
def test_at_any_width_nothing_is_cut(size, facts, width):
    found = convert(WHOLE, batch_size=size, **facts)
    text = shown(found, width, render_conversion_briefly)
    assert all(len(line) <= width for line in text.splitlines())
    words = {word.rstrip(":") for word in text.split()}
    for row in found.changes:
        assert {*row.rule.split("-"), row.rule} & words
        if isinstance(row.new, int | float):
            assert {value(row.old), value(row.new)} <= words
    if not found.unchanged:
        assert {"Goyal", "2017", "Busbridge", "2023", "arithmetic"} <= words


@pytest.mark.parametrize("width", range(70, 124))
def test_papers_are_whole_beside_long_names(width):
    old = Recipe(optimizer="adamw", lr=1e-4, weight_decay=0.01, batch_size=64)
    found = convert(old, batch_size=128)
    rows = [dataclasses.replace(c, key=f"optimizer.params.{c.name}") for c in found.changes]
    text = shown(dataclasses.replace(found, changes=tuple(rows)), width, render_conversion_briefly)
    assert all(len(line) <= width for line in text.splitlines())
    assert {"Malladi", "al.", "2022", "Wang", "Aitchison", "2024", "timescale"} <= {
        word.rstrip(":") for word in text.split()
    }


@pytest.mark.parametrize(("size", "facts"), SIZES[:2])
def test_reasons_and_other_rules_follow(size, facts):
    found = convert(WHOLE, batch_size=size, **facts)
    text = " ".join(shown(found, 100).split())
    for row in (*found.changes[1:], *found.kept):
        assert f"{label(row)}" in text
        assert " ".join(row.why.split()[:4]) in text
    for one in found.alternatives:
        assert one.rule in text


def test_of_a_table_only_what_differs_is_shown():
    text = shown(convert(WHOLE, batch_size=1024), 100, render_conversion_briefly)
    assert "schedule.milestones" in text
    assert "gamma" not in text


@pytest.mark.parametrize("width", [1, 5, 10, 19])
def test_absurd_widths_do_not_fail(width):
    assert shown(convert(WHOLE, batch_size=1024), width)


def test_markup_of_others_is_text():
    found = convert(Recipe(lr=0.1, batch_size=8), batch_size=16)
    rows = tuple(dataclasses.replace(row, key="[bold]lr[/]") for row in found.changes)
    text = shown(dataclasses.replace(found, changes=rows, notes=("[red]note[/]",)), 90)
    assert "[bold]lr[/]" in text
    assert "Note: [red]note[/]." in text
