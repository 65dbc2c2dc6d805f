"""The layers, the light root and the public surface, as the design states them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import noisescale

SRC = Path(__file__).resolve().parents[1] / "src" / "noisescale"

FOUNDATION = {"errors", "records"}
BELOW_RUN = FOUNDATION | {"workload", "theory", "plan", "formats", "measure", "train"}
LAYERS = {
    "errors": set(),
    "records": {"errors"},
    "workload": FOUNDATION,
    "theory": FOUNDATION,
    "plan": FOUNDATION | {"theory"},
    "formats": FOUNDATION,
    "measure": FOUNDATION | {"workload", "theory"},
    "train": FOUNDATION | {"theory", "plan"},
    "run": BELOW_RUN,
    "report": FOUNDATION | {"theory", "plan"},
    "cli": BELOW_RUN | {"run", "report"},
    "__main__": {"cli"},
    "__init__": FOUNDATION | {"workload"},
}
OUTSIDE = {
    "errors": set(),
    "records": set(),
    "workload": set(),
    "theory": {"numpy", "scipy"},
    "plan": {"numpy"},
    "formats": {"tomlkit", "ruamel"},
    "measure": {"numpy", "scipy", "torch"},
    "train": {"torch"},
    "run": {"numpy", "torch", "sklearn", "ray", "submitit"},
    "report": {"jinja2", "matplotlib", "rich", "markupsafe"},
    "cli": {"click", "rich"},
    "__main__": set(),
    "__init__": set(),
}
LAZY = {"scipy", "matplotlib", "jinja2", "markupsafe", "rich", "sklearn", "ray", "submitit"}
LAZY |= {"tomlkit", "ruamel"}
"""Imported only inside functions."""

FILES = sorted(SRC.rglob("*.py"))


def layer(path: Path) -> str:
    part = path.relative_to(SRC).parts[0]
    return part.removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported module with whether the import runs when the file is imported."""
    tree = ast.parse(path.read_text())
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            if isinstance(child, ast.Import):
                found.extend((name.name, top) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.append((child.module or "", top))
                if child.module == "noisescale":
                    found.extend((f"noisescale.{name.name}", top) for name in child.names)
            visit(child, top and not inside)

    visit(tree, True)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_layers(path: Path) -> None:
    own = layer(path)
    for module, top in imports(path):
        head, *rest = module.split(".")
        if head == "noisescale":
            if not rest or rest[0] in ("__version__", own):
                continue
            if rest[0] in LAYERS:
                assert rest[0] in LAYERS[own], f"{own} may not import {module}"
            continue
        if head in sys.stdlib_module_names:
            continue
        assert head in OUTSIDE[own], f"{own} may not import {module}"
        assert not (top and head in LAZY), f"{module} is imported lazily only"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_are_short_and_well_named(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    drawers = {"utils", "util", "common", "core", "base", "helpers", "misc"}
    assert not drawers & {part.removesuffix(".py") for part in path.relative_to(SRC).parts}


@pytest.mark.parametrize(
    "statement",
    ["import noisescale", "import noisescale.plan.split", "import noisescale.plan.convert"],
)
def test_the_root_is_light(statement: str) -> None:
    code = f"{statement}, sys; print([m for m in ('torch', 'scipy') if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_the_public_surface() -> None:
    assert sorted(noisescale.__all__) == [
        "Advice",
        "BatchSplit",
        "InvalidInputError",
        "Measurement",
        "MissingExtraError",
        "NoiseMeter",
        "NoiseScale",
        "NoisescaleError",
        "Outcome",
        "Recipe",
        "Target",
        "Tradeoff",
        "Workload",
        "__version__",
        "advise",
        "audit",
        "branch",
        "convert",
        "fit_tradeoff",
        "measure_noise_scale",
        "measure_workload",
        "plan_schedule",
        "read_tradeoff",
        "scan_speed",
        "split_batch",
        "sweep",
    ]
    for name in noisescale.__all__:
        assert getattr(noisescale, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        noisescale.nonsense  # noqa: B018
