from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).resolve().parents[3] / "benchmarks" / "kills.py"


@pytest.mark.slow
def test_kills_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    counts = ["--local", "6", "--driver", "4", "--ray", "0", "--trials", "60"]
    command = [sys.executable, str(KILLS), *counts, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert (found["local"]["kills"], found["driver"]["kills"]) == (6, 4)
    for kind in found.values():
        assert kind["lost"] == kind["twice"] == kind["different"] == kind["orphans"] == 0
