from __future__ import annotations

import dataclasses
import functools
import html.parser
import json
import os
import re
import shutil
import stat
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from noisescale.errors import InvalidInputError, MissingExtraError
from noisescale.records import Advice, AdviceRow
from noisescale.report import drawing
from noisescale.report.page import check_ready, check_writable, render_page, write_page

pytest.importorskip("matplotlib")
NODE = shutil.which("node")
WHATIF = resources.files("noisescale.report").joinpath("templates/whatif.js")


@functools.cache
def _rendered(record: str) -> str:
    return render_page(Advice.from_json(record))


def page_of(advice: Advice) -> str:
    """Render each record once: most of the time goes into its figures."""
    return _rendered(advice.to_json())


class Outline(html.parser.HTMLParser):
    """Tags, attributes and scripts of a page, and whether its tags are balanced."""

    VOID = frozenset({"meta", "link", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def test_page_of_every_outcome_is_whole_and_loads_nothing(any_advice: Advice) -> None:
    page = page_of(any_advice)
    outline = Outline(page)
    assert outline.open == []
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", page)
    for tag, attributes in outline.tags:
        assert tag not in {"iframe", "img", "object", "embed", "base"}
        assert "src" not in attributes
        target = attributes.get("href") or "#"
        assert target == "data:," if tag == "link" else target.startswith("#")
    assert "None" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_ids_are_unique(any_advice: Advice) -> None:
    ids = [a["id"] for _, a in Outline(page_of(any_advice)).tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_embedded_json_is_the_record(any_advice: Advice) -> None:
    embedded = Outline(page_of(any_advice)).scripts[0]
    assert Advice.from_json(embedded) == any_advice


def test_text_from_users_is_escaped(advices: dict[str, Advice]) -> None:
    page = page_of(advices["hostile"])
    assert "<script>alert(1)" not in page
    assert page.count("<script") == 2
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;[bold]$x$") >= 8


def test_the_page_says_the_answer_the_limits_and_the_bands(advices: dict[str, Advice]) -> None:
    page = page_of(advices["determined"])
    for words in (
        "Global batch of 16 examples",
        "micro-batch 16 examples × accumulation 1 × 1 device",
        "91.3 examples",
        "71.9 to 118",
        "41.2 to 205",
        "461,000 examples/s",
        "4.09 MiB",
        "lr 0.5 is near its best",
        "2.bias",
        "noisescale 0.1.0",
        "dataset_size",
    ):
        assert words in page


def test_without_a_recommendation_the_reason_is_the_headline(advices: dict[str, Advice]) -> None:
    page = page_of(advices["lower_bound"])
    assert "<h1>Nothing is recommended: the critical batch has no lower end" in page
    assert "recommended</span>" not in page
    assert 'id="whatif"' not in page


def test_writing_replaces_at_once_and_leaves_nothing_else(
    advices: dict[str, Advice], tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    mask = os.umask(0o022)
    try:
        assert write_page(advices["nothing_fits"], path) == path
    finally:
        os.umask(mask)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_failed_write_keeps_the_old_page(
    advices: dict[str, Advice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InvalidInputError, match="No space left on device"):
        write_page(advices["nothing_fits"], path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("name", ["", ".", "missing/report.html", "file/report.html"])
def test_paths_that_cannot_be_written_are_refused_before_anything_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="report path"):
        check_writable(name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_check_ready_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingExtraError("the report", package="matplotlib", extra="report")

    assert check_ready(tmp_path / "report.html") == tmp_path / "report.html"
    monkeypatch.setattr(drawing, "require_matplotlib", missing)
    with pytest.raises(MissingExtraError):
        check_ready(tmp_path / "report.html")


# The what-if panel: the template's own script, run by node where there is one.

needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")


def what_if(advice: Advice, **settings: Any) -> dict[str, Any]:
    chosen = {
        "devices": list(advice.devices),
        "maxWaste": advice.max_waste,
        "price": None,
        "knownSteps": None,
        "knownBatch": advice.recipe.batch_size,
    } | settings
    program = f"console.log(JSON.stringify(whatIf({advice.to_json()}, {json.dumps(chosen)})));"
    source = WHATIF.read_text("utf-8") + program
    assert NODE is not None
    done = subprocess.run([NODE, "-"], input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def split_of(row: dict[str, Any] | AdviceRow) -> tuple[int, ...]:
    values = row if isinstance(row, dict) else row.to_dict()
    names = ("global_batch_size", "micro_batch_size", "accumulation", "replicas")
    return tuple(values[name] for name in names)


@needs_node
def test_at_the_defaults_the_panel_says_what_python_says(any_advice: Advice) -> None:
    result = what_if(any_advice)
    assert len(result["rows"]) == len(any_advice.table)
    for ours, row in zip(result["rows"], any_advice.table, strict=True):
        assert split_of(ours) == split_of(row)
        assert ours["allowed"] == row.allowed
        for name in ("steps_ratio", "examples_ratio", "examples_ratio_high"):
            expected = getattr(row, name)
            assert ours[name] == (expected and pytest.approx(expected, rel=1e-12))
        if row.relative_time is not None:
            assert ours["relative_time"] == pytest.approx(row.relative_time, rel=1e-12)
    place = result["recommended"]
    if any_advice.recommended is None:
        assert place is None
    else:
        assert split_of(result["rows"][place]) == split_of(any_advice.recommended)


@needs_node
@pytest.mark.parametrize("waste", [1.1, 2.0, 5.0, 1e6])
def test_the_panel_follows_the_waste_as_the_rule_does(
    advices: dict[str, Advice], waste: float
) -> None:
    advice = advices["many_rows"]
    result = what_if(advice, maxWaste=waste)
    allowed = [r for r in advice.table if r.examples_ratio_high and r.examples_ratio_high <= waste]
    least = min(row.relative_time or 0.0 for row in allowed)
    ties = [row for row in allowed if (row.relative_time or 0.0) <= 1.05 * least]
    assert split_of(result["rows"][result["recommended"]]) == split_of(ties[0])


@needs_node
def test_no_size_within_the_waste_is_no_recommendation(advices: dict[str, Advice]) -> None:
    assert what_if(advices["determined"], maxWaste=1.001)["recommended"] is None


@needs_node
@pytest.mark.parametrize("name", ["determined", "half_line"])
@pytest.mark.parametrize("devices", [[2], [1, 2, 4, 8], [3]])
def test_other_devices_are_advised_as_python_would(
    advices: dict[str, Advice], name: str, devices: list[int]
) -> None:
    from noisescale.plan.choose import choose

    advice = advices[name]
    choice = choose(
        speed=advice.speed,
        critical=advice.limits.critical_batch,
        devices=devices,
        max_waste=advice.max_waste,
        dataset_size=advice.recipe.dataset_size or 0,
    )
    result = what_if(advice, devices=devices)
    assert [split_of(row) for row in result["rows"]] == [split_of(row) for row in choice.table]
    assert choice.recommended is not None
    recommended = split_of(result["rows"][result["recommended"]])
    assert recommended == split_of(choice.recommended)


@needs_node
def test_money_is_devices_times_time_times_price(advices: dict[str, Advice]) -> None:
    advice = advices["many_rows"]
    known = what_if(advice, price=3.0, knownSteps=5000, knownBatch=32)
    bcrit = advice.limits.critical_batch.point
    assert bcrit is not None
    assert known["stepsMin"] == pytest.approx(5000 / (1 + bcrit / 32))
    for row in known["rows"]:
        steps = known["stepsMin"] * (1 + bcrit / row["global_batch_size"])
        assert row["seconds"] == pytest.approx(steps * row["seconds_per_step"])
        assert row["money"] == pytest.approx(3.0 * row["replicas"] * row["seconds"] / 3600)
    relative = what_if(advice, price=3.0)
    assert min(row["relative_cost"] for row in relative["rows"]) == 1.0
    scale = relative["rows"][0]["money"] / known["rows"][0]["money"]
    assert scale == pytest.approx(1000 / known["stepsMin"])
    assert all(row["money"] is None for row in what_if(advice)["rows"])


@needs_node
def test_the_panel_writes_numbers_as_python_does() -> None:
    from noisescale.report import wording

    values = [0.0, 1.0, 9.996, 12.345, 999.6, 1234.5, 0.0123, 2.5e-7, 3.4e13, 0.5]
    seconds = [4e-5, 0.0123, 1.5, 59.94, 59.96, 75.0, 7300.0, 1e7]
    program = (
        f"console.log(JSON.stringify([{values}.map((v) => number(v)),"
        f" {seconds}.map((v) => duration(v))]))"
    )
    assert NODE is not None
    source = WHATIF.read_text("utf-8") + program
    done = subprocess.run([NODE, "-"], input=source, capture_output=True, text=True, check=True)
    numbers, durations = json.loads(done.stdout)
    assert [text.replace("e+", "e") for text in numbers] == list(map(wording.number, values))
    assert durations == list(map(wording.duration, seconds))


def test_a_workload_counted_in_sequences_says_so(advices: dict[str, Advice]) -> None:
    advice = advices["determined"]
    critical = dataclasses.replace(advice.limits.critical_batch, unit="sequences")
    limits = dataclasses.replace(advice.limits, critical_batch=critical)
    page = page_of(dataclasses.replace(advice, unit="sequences", limits=limits))
    assert "Global batch of 16 sequences" in page
    assert "91.3 sequences" in page
