from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from noisescale import Recipe
from noisescale.plan.convert import convert
from noisescale.plan.live import convert_live
from noisescale.report.conversion_terminal import (
    label,
    render_conversion,
    render_conversion_briefly,
    render_live_conversion,
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


def test_data_of_another_size_are_told_with_both_answers():
    found = convert(WHOLE, new_dataset_size=100_000)
    text = " ".join(shown(found, 80).split())
    assert "The data grow from 50,000 to 100,000 examples (x2); the rate stays 0.1." in text
    assert "keep-rate, recommended: early in training" in text
    assert "(--data-rule NAME) long-run lr 0.05, weight_decay 0.0001 Holds: late" in text
    assert "(--rule NAME)" not in text
    both = " ".join(shown(convert(WHOLE, batch_size=1024, new_dataset_size=100_000), 80).split())
    assert "and the data grow from 50,000 to 100,000 examples (x2); the rate goes" in both
    assert "(--rule NAME)" in both


@pytest.mark.parametrize("width", range(40, 124, 3))
def test_data_and_batch_at_any_width(width):
    found = convert(WHOLE, batch_size=1024, new_dataset_size=100_000, data_rule="long-run")
    text = shown(found, width)
    assert all(len(line) <= width for line in text.splitlines())
    words = set(text.replace(",", " ").split())
    assert {"keep-momentum", "long-run", "0.2", "0.1"} <= words


def test_a_conversion_prints_as_the_command_does(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for found in (convert(WHOLE, **what) for what in ({"batch_size": 1024}, {"batch_size": 256})):
        lines = [line.rstrip() for line in shown(found, 80).rstrip("\n").splitlines()]
        assert str(found).splitlines() == lines


def live(*groups, scheduler=None, batch_size=1024, **options):
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], **group}
                                   for group in groups])  # fmt: skip
    driven = None if scheduler is None else scheduler(optimizer)
    return convert_live(
        optimizer, old_batch_size=256, batch_size=batch_size, scheduler=driven,
        scheduler_per=None if driven is None else "step", **options,
    )  # fmt: skip


def steps(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3000, 6000])


@pytest.mark.parametrize("width", [10, *range(40, 124, 7)])
def test_a_live_conversion_says_what_changes(width):
    found = live({"lr": 1e-3, "weight_decay": 0.1}, scheduler=steps)
    text = shown(found, width, render_live_conversion)
    assert width < 40 or all(len(line) <= width for line in text.splitlines())
    flat = " ".join(text.split())
    if width > 20:
        assert "AdamW with MultiStepLR, stepped once per step, global batch 256" in flat
        assert "Parameter group 0" in flat
        assert {"0.002", "0.2"} <= set(flat.split())
        assert "(750, 1,500)" in flat
        assert 'What other rules say (rule="NAME")' in flat
        assert "give noise_scale=X" in flat


def test_groups_that_change_alike_are_told_of_once():
    groups = [{"lr": 1e-3 * 0.5**i, "weight_decay": 0.1 * (i % 2)} for i in range(4)]
    flat = " ".join(shown(live(*groups), 100, render_live_conversion).split())
    assert "the rates of 4 parameter groups are multiplied by 2." in flat
    assert "Parameter groups 0, 2 " in flat
    assert "Parameter groups 1, 3 " in flat
    assert "0.00025 to 0.001" in flat
    assert "What other rules say of the first group" in flat
    named = live({"lr": 1e-3, "name": "decayed"})
    assert "Parameter group decayed" in shown(named, 100, render_live_conversion)


def test_what_a_live_conversion_leaves_and_warns_of():
    found = live({"lr": 1e-3}, scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, float))
    flat = " ".join(shown(found, 100, render_live_conversion).split())
    assert "Left as it is: LambdaLR multiplies the rate by a function of the step" in flat
    same = shown(live({"lr": 1e-3}, batch_size=256), 100, render_live_conversion)
    assert "Nothing changes: the global batch is the same (256 examples)." in same
    assert "Why" not in same


def test_a_live_conversion_prints_as_it_renders(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    found = live({"lr": 1e-3}, scheduler=steps)
    lines = shown(found, 72, render_live_conversion).rstrip("\n").splitlines()
    assert str(found).splitlines() == [line.rstrip() for line in lines]
