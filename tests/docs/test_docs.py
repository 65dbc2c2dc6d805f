"""Every block of the documentation does what the page says."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch

from noisescale import records
from noisescale.cli import cli, main
from noisescale.records.recipe import OPTIMIZERS
from noisescale.theory import scaling

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = (
    "how-to-choose",
    "formulas",
    "in-your-loop",
    "workloads",
    "command-line",
    "sweep",
    "audit",
    "large-batch-optimizers",
    "convert",
    "batch-schedules-in-your-loop",
    "schedules",
    "recipe-files",
)
CHEAP = ("split", "tradeoff", "convert", "schedule")
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])")
CLOSE = 0.05


class Block(NamedTuple):
    page: str
    line: int
    kind: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}.md:{self.line}"


def blocks_of(page: str) -> list[Block]:
    found: list[Block] = []
    kind, start, lines = None, 0, []
    for number, line in enumerate((DOCS / f"{page}.md").read_text().splitlines(), start=1):
        if not line.startswith("```"):
            lines.append(line)
        elif kind is None:
            kind, start, lines = line[3:].strip(), number + 1, []
        else:
            found.append(Block(page, start, kind, "\n".join(lines) + "\n"))
            kind = None
    assert kind is None, f"{page}.md:{start}: a block is not closed"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
FOLLOWING = dict(zip(BLOCKS, [*BLOCKS[1:], None], strict=True))
PYTHON = [block for block in BLOCKS if block.kind == "python"]
COMMANDS = [
    (block, line[2:])
    for block in BLOCKS
    if block.kind == "console"
    for line in block.text.splitlines()
    if line.startswith("$ noisescale")
]


def promised_output(block: Block) -> str | None:
    after = FOLLOWING[block]
    follows = after is not None and after.kind == "text" and after.page == block.page
    return after.text if after is not None and follows else None


def assert_alike(shown: str, real: str) -> None:
    """Equal words; numbers within 5 %: other processors round otherwise, and runs add it up."""
    assert NUMBER.sub("#", shown).split() == NUMBER.sub("#", real).split()
    for one, other in zip(NUMBER.findall(shown), NUMBER.findall(real), strict=True):
        a, b = float(one.replace(",", "")), float(other.replace(",", ""))
        assert math.isclose(a, b, rel_tol=CLOSE), f"the page shows {one}, it is {other}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder that holds the files which the pages show."""
    for block in BLOCKS:
        shown = block.kind in ("python", "toml", "yaml")
        named = re.match(r"# (\w+\.(?:py|toml|yaml))\n", block.text) if shown else None
        if named:
            (tmp_path / named[1]).write_text(block.text)
        if block.kind == "csv":
            (tmp_path / "runs.csv").write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NOISESCALE_DATA", raising=False)
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python_block_runs_and_prints_what_is_shown(block: Block, folder: Path) -> None:
    out = io.StringIO()
    code = compile(block.text, block.name, "exec")
    with torch.random.fork_rng(), contextlib.redirect_stdout(out):
        exec(code, {"__name__": "__docs__"})
    shown = promised_output(block)
    if shown is not None:
        assert_alike(shown, out.getvalue())


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=lambda value: str(value)[:60])
def test_command_parses(block: Block, line: str) -> None:
    words = shlex.split(line)[1:]
    command = cli.commands.get(words[0])
    if command is None:
        assert words in (["--help"], ["--version"]), f"{block.name}: no command {words[0]!r}"
    elif "--help" not in words:
        with command.make_context(words[0], words[1:], parent=click.Context(cli)):
            pass


@pytest.mark.parametrize(
    "block",
    [block for block, line in COMMANDS if line.split()[1] in CHEAP],
    ids=lambda block: block.name,
)
def test_output_of_a_cheap_command_is_what_is_shown(
    block: Block, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, shown = block.text.split("\n", 1)
    assert command.startswith("$ noisescale ")
    status = main(shlex.split(command)[2:])
    real = capsys.readouterr()
    assert status == (2 if real.err else 0)
    assert_alike(shown, real.out + real.err)


def test_the_rules_that_the_page_recommends_are_those_that_convert_takes() -> None:
    text = (DOCS / "convert.md").read_text()
    rows = re.findall(r"^\| (`(?:sgd|adam|lars|lion)`.*?) \|(.*) \|$", text, re.MULTILINE)
    seen = set()
    for name, cells in rows:
        stated = re.findall(r"`([\w-]+)`", cells)
        for optimizer in re.findall(r"`(\w+)`", name):
            momentum = 0.9 if "momentum" in name else None
            old = records.Recipe(optimizer=optimizer, lr=0.1, batch_size=64, momentum=momentum)
            found = [
                scaling.recommended(old, size, scaling.Facts(noise_scale=scale)).name
                for scale in (None, 100.0)
                for size in (256, 16)
            ]
            assert stated == found, f"{name}: the page says {stated}, it is {found}"
            seen.add(optimizer)
    assert seen == set(OPTIMIZERS)
    every = set(re.findall(r"^\| `([\w-]+)` \| [^|`]+ \|$", text, re.MULTILINE))
    assert every == set(scaling.RULES)


def test_pages_link_to_what_exists() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", (DOCS / f"{page}.md").read_text()):
            assert (DOCS / target).exists(), f"{page}.md links to {target}"


def test_json_names_are_fields_of_the_records() -> None:
    rows = [
        line for line in (DOCS / "command-line.md").read_text().splitlines() if line[:2] == "| "
    ]
    named = {name for row in rows for name in re.findall(r"`([a-z]+_[a-z_]+)`", row)}
    kinds = [thing for thing in vars(records).values() if dataclasses.is_dataclass(thing)]
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    ends = (records.Outcome, records.TrialOutcome, records.TuningOutcome)
    assert named - fields <= {str(outcome) for kind in ends for outcome in kind}


def test_every_option_is_on_the_page() -> None:
    text = (DOCS / "command-line.md").read_text()
    for name, command in cli.commands.items():
        assert f"## {name}\n" in text
        for option in (o for p in command.params for o in p.opts if o.startswith("--")):
            assert f"`{option}" in text, f"{name} {option}"


def formula_names() -> list[str]:
    rows = [
        line for line in (DOCS / "formulas.md").read_text().splitlines() if line.startswith("|")
    ]
    return [name for row in rows for name in re.findall(r"`((?:theory|plan)\.[\w.]+)`", row)]


@pytest.mark.parametrize("name", formula_names())
def test_formula_is_a_function_with_a_source(name: str) -> None:
    parts = name.split(".")
    module = importlib.import_module(".".join(["noisescale", *parts[:2]]))
    thing, owner = module, module
    for part in parts[2:]:
        if inspect.ismodule(thing) and not hasattr(thing, part):
            importlib.import_module(f"{thing.__name__}.{part}")
        owner, thing = thing, getattr(thing, part)
    documented = thing.__doc__ or owner.__doc__
    assert documented


def test_every_public_formula_is_in_the_table() -> None:
    listed = set(formula_names())
    for module in ("noise_scale", "tradeoff"):
        names = vars(importlib.import_module(f"noisescale.theory.{module}"))
        for name, thing in names.items():
            ours = getattr(thing, "__module__", "") == f"noisescale.theory.{module}"
            if ours and callable(thing) and not name.startswith("_"):
                assert f"theory.{module}.{name}" in listed
