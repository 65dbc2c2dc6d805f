from __future__ import annotations

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from noisescale.records import Interval, Outcome, SweepResult
from noisescale.report import sweep_figures, sweep_wording
from noisescale.report.sweep_page import render_sweep_page, write_sweep_page
from noisescale.report.sweep_terminal import render_sweep
from report.test_page import Outline
from sweep_examples import example

pytest.importorskip("matplotlib")
KINDS = ("whole", "unreached", "nothing")


def on_a_terminal(sweep: SweepResult, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    render_sweep(sweep, console)
    return console.file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_records_survive_json(kind):
    sweep = example(kind)
    # as dictionaries: a number that is not known, NaN in the record, is null in JSON
    assert SweepResult.from_json(sweep.to_json()).to_dict() == sweep.to_dict()


def test_the_terminal_shows_every_batch_size_and_goal():
    sweep = example()
    text = on_a_terminal(sweep, 100)
    assert "Critical batch" in text.splitlines()[2]
    for row in sweep.batch_sizes:
        assert re.search(rf"^{row.batch_size} ", text, re.MULTILINE)
    assert text.count("for good") >= 2
    assert "Slope at small batch" in text
    assert max(map(len, text.splitlines())) <= 100


def test_too_few_batch_sizes_are_not_called_too_few_steps():
    sweep = example()
    law = dataclasses.replace(
        sweep.tradeoff,
        outcome=Outcome.TOO_FEW_STEPS,
        critical_batch=Interval(point=None, low=None, high=None),
        detail="2 rows at 2 batch sizes reached the target",
    )
    text = sweep_wording.headline(dataclasses.replace(sweep, tradeoff=law))
    assert text == "Critical batch not known: 2 rows at 2 batch sizes reached the target"


def test_a_target_out_of_reach_says_how_close_it_came():
    text = on_a_terminal(example("unreached"))
    assert "not reached" in text
    assert "closest came to" in " ".join(text.split())


def test_nothing_done_says_so_and_what_to_do():
    text = " ".join(on_a_terminal(example("nothing")).split())
    assert "No steps law" in text
    assert "the same command again" in text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", ["steps_figure", "rate_figure", "collapse_figure"])
def test_figures_are_drawn_at_both_widths(kind, draw):
    for width in (4.3, 7.6):
        figure = getattr(sweep_figures, draw)(example(kind), width=width)
        assert figure.axes
        assert figure.get_size_inches()[0] == width


def test_the_curve_shows_points_law_and_critical_batch():
    axes = sweep_figures.steps_figure(example()).axes[0]
    labels = axes.get_legend_handles_labels()[1]
    assert {"tuned", "steps law"} <= set(labels)
    assert any("critical batch" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_whole_and_holds_its_record(kind):
    page = render_sweep_page(example(kind))
    outline = Outline(page)
    assert outline.open == []
    assert json.loads(outline.scripts[-1]) == example(kind).to_dict()
    loads = [a for _, attrs in outline.tags for a in attrs if a in ("src", "href")]
    links = [v for _, attrs in outline.tags for k, v in attrs.items() if k in ("src", "href")]
    assert all(link.startswith(("#", "data:")) for link in links), loads


def test_names_are_text_not_markup(tmp_path):
    evil = dataclasses.replace(example(), workload="</script><b>[red]x[/red]")
    page = render_sweep_page(evil)
    assert "<b>[red]" not in page
    assert "[red]x[/red]" in on_a_terminal(evil)


def test_the_page_speaks_of_the_wide_line_only_where_it_is_drawn():
    sweep = example()
    names = ("perfect_end", "useful_end", "examples", "plateau")
    sizes = (8.0, 64.0, 1000.0, 60.0)
    known = {n: Interval(point=v, low=v, high=v) for n, v in zip(names, sizes, strict=True)}
    for open_, said in (({}, True), ({"plateau": Interval(point=None, low=0.0, high=9.0)}, False)):
        regimes = dataclasses.replace(sweep.regimes, **{**known, **open_})
        page = render_sweep_page(dataclasses.replace(sweep, regimes=regimes))
        assert ("the wide line" in page) is said
        assert ("three regimes</text>" in page or "<!-- three regimes -->" in page) is said


def test_a_page_replaces_another_at_once(tmp_path):
    path = tmp_path / "sweep.html"
    path.write_text("old")
    write_sweep_page(example("nothing"), path)
    assert path.read_text().startswith("<!doctype html>")
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.html"]


def test_open_ends_are_worded():
    assert sweep_wording.ends(Interval(point=None, low=0.0, high=12.0), "steps").startswith(
        "at most"
    )
    assert sweep_wording.ends(Interval(point=3.0, low=2.0, high=4.0), "steps") == (
        "3.00 steps (2.00 to 4.00)"
    )
