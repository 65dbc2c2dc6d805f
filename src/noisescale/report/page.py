"""Advice as one self-contained HTML page: it loads nothing, and holds its record as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisescale.errors import InvalidInputError
from noisescale.records import Advice, Record
from noisescale.report import critical_wording, drawing, wording

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

_TEMPLATES = "templates"
# In the page the figures follow its colours, light or dark.
_COLOURS = {
    drawing.INK: "var(--ink)",
    drawing.MUTED: "var(--muted)",
    drawing.GRID: "var(--grid)",
    drawing.PAPER: "var(--paper)",
    drawing.BLUE: "var(--blue)",
    drawing.BLUE_BAND: "var(--band)",
    drawing.ORANGE: "var(--orange)",
    drawing.GREEN: "var(--green)",
    drawing.VERMILION: "var(--red)",
}
_JSON_ESCAPES = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def check_writable(path: str | Path) -> Path:
    """Return the path if a page can be written there, before anything is measured.

    Raises:
        InvalidInputError: it is a folder or a device, or its folder is missing or read-only.
    """
    target = Path(path)
    if str(path) == "" or (target.exists() and not target.is_file()):
        raise _cannot_write(path, "a file is required", "name a file such as report.html")
    folder = target.resolve().parent
    if not folder.is_dir():
        raise _cannot_write(path, f"{folder} is not a folder", "create it or name another path")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(path, error.strerror or "not writable", "name another path") from None
    return target


def check_ready(path: str | Path) -> Path:
    """Return the path if a page can be made and written there.

    Raises:
        InvalidInputError: the path cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    drawing.require_matplotlib()
    return check_writable(path)


def write_page(advice: Advice, path: str | Path) -> Path:
    """Write the page; a file that is there is replaced only once the new one is complete.

    Raises:
        InvalidInputError: the path cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    check_ready(path)
    return write_whole(path, render_page(advice))


def write_whole(path: str | Path, text: str) -> Path:
    """Write a page's text; a file that is there is replaced only once the new one is complete.

    Raises:
        InvalidInputError: the path cannot be written.
    """
    target = check_writable(path)
    try:
        _replace(target.resolve(), text)
    except OSError as error:
        raise _cannot_write(path, error.strerror or "not written", "name another path") from None
    return target


def render_page(advice: Advice) -> str:
    """Return the page as HTML.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return fill_in("page.html.j2", filters=_filters(), context=_context(advice))


def fill_in(name: str, *, filters: dict[str, Callable[..., str]], context: dict[str, Any]) -> str:
    """Return a template of ours as HTML, what is put in escaped.

    Args:
        name: of its file.
        filters: by name.
        context: what it shows; names that are missing are errors.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("noisescale.report", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name).render(context)


def _cannot_write(path: str | Path, requirement: str, remedy: str) -> InvalidInputError:
    return InvalidInputError(f"report path {str(path)!r}", requirement, remedy)


def _replace(target: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".noisescale-", suffix=".html")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    """Read the umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _filters() -> dict[str, Callable[..., str]]:
    names = (
        "number setting count interval ratio_interval percent duration memory split_cell why_none"
        " outcome noise_scale rests_on memory_point memory_note knee_point"
        " rate_verdict rate_consequence recipe_line not_allowed sentence"
    )
    filters: dict[str, Callable[..., str]] = {
        name: getattr(wording, name) for name in names.split()
    }
    filters |= {"critical_point": critical_wording.critical_point, "basis": critical_wording.basis}
    filters["cell"] = lambda value: "?" if value is None else wording.ratio(value)
    return filters


def _context(advice: Advice) -> dict[str, Any]:
    from noisescale.report import figures

    limits = advice.limits
    known = [row for row in advice.table if row.relative_time is not None]
    recipe = dataclasses.asdict(advice.recipe)
    return {
        "advice": advice,
        "unit": advice.unit,
        "noise": advice.noise_scale,
        "critical": limits.critical_batch,
        "memory_lines": wording.memory_lines(limits.memory, advice.unit),
        "knee_lines": wording.knee_lines(limits.throughput_knee, advice.unit),
        "critical_lines": critical_wording.critical_lines(
            limits.critical_batch, advice.noise_scale.level
        ),
        "judged": any(row.examples_ratio_high is not None for row in advice.table),
        "timed": bool(known),
        "undrawn": len(known) - len(figures.drawn_rows(advice)),
        "recipe": [(name, value) for name, value in recipe.items() if value is not None],
        "figures": _figures(advice),
        "json": json_block(advice),
        "css": template("style.css"),
        "script": template("whatif.js"),
    }


def json_block(record: Record) -> Markup:
    """Return a record as JSON that cannot end the script element it stands in."""
    from markupsafe import Markup

    return Markup(record.to_json().translate(_JSON_ESCAPES))


def template(name: str) -> Markup:
    """Read a part of the page that is ours and must not be escaped."""
    from markupsafe import Markup

    folder = resources.files("noisescale.report").joinpath(_TEMPLATES)
    return Markup(folder.joinpath(name).read_text("utf-8"))


def _figures(advice: Advice) -> dict[str, dict[str, Markup]]:
    """Draw every figure for a desktop and for a phone."""
    from noisescale.report import figures

    limits = advice.limits
    draw: dict[str, Callable[[float], Figure]] = {
        "noise_scale": lambda width: figures.noise_scale_figure(advice, width=width),
        "speed": lambda width: figures.speed_figure(
            advice.speed, knee=limits.throughput_knee, memory=limits.memory, width=width
        ),
        "tradeoff": lambda width: figures.tradeoff_figure(advice, width=width),
    }
    return at_both_widths(draw)


def at_both_widths(draw: dict[str, Callable[[float], Figure]]) -> dict[str, dict[str, Markup]]:
    """Draw every figure for a desktop and for a phone."""
    widths = {"wide": drawing.WIDE, "narrow": drawing.NARROW}
    return {
        name: {kind: inline(make(width), f"{name}-{kind}-") for kind, width in widths.items()}
        for name, make in draw.items()
    }


def inline(figure: Figure, prefix: str) -> Markup:
    """Return a figure as inline SVG in the page's colours."""
    from markupsafe import Markup

    text = drawing.to_svg(figure, prefix=prefix)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    return Markup(text)
