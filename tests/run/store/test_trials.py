from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import TrialOutcome
from noisescale.run.store import TRIALS, TrialStore
from trial_results import TARGETS, plan, result

WORKLOAD = "made-up 1"


def new(folder: Path) -> TrialStore:
    return TrialStore.open(folder, workload=WORKLOAD)


def filled(folder: Path, count: int = 3) -> TrialStore:
    store = new(folder)
    with store.lock():
        for seed in range(count):
            store.append(result(plan(seed)))
    return store


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    given = [
        result(plan(0)),
        result(plan(1, lr=0.1), "diverged", steps=3, stopped_by="divergence"),
        result(plan(2), "crashed", detail="it said 'no'\nand ünïcode"),
    ]
    store = new(tmp_path / "deep" / "store")
    with store.lock():
        store.append(*given)
    assert list(store.results()) == given
    assert list(TrialStore.open(store.path).results()) == given
    assert [key for key, _ in store.items()] == [each.plan.key for each in given]
    assert [r.plan.key for r in TrialStore.open(store.path).results()] == [
        r.plan.key for r in given
    ]


def test_every_append_is_one_line_on_disk_at_once(tmp_path: Path) -> None:
    store = new(tmp_path)
    with store.lock():
        for seed in range(3):
            store.append(result(plan(seed)))
            lines = (tmp_path / TRIALS).read_bytes().splitlines()
            assert len(lines) == seed + 1
            assert json.loads(lines[-1])["key"] == plan(seed).key


def test_duplicates_count_once_and_the_first_finished_one_stays(tmp_path: Path) -> None:
    store = new(tmp_path)
    with store.lock():
        store.append(result(plan(0), steps=20))
        store.append(result(plan(0), steps=99))
    line = (tmp_path / TRIALS).read_bytes()
    (tmp_path / TRIALS).write_bytes(line + line.replace(b'"steps":20', b'"steps":77'))
    again = TrialStore.open(tmp_path)
    assert [r.steps for r in store.results()] == [r.steps for r in again.results()] == [20]
    assert len(again) == 1


@pytest.mark.parametrize("first", ["interrupted", "crashed"])
def test_what_did_not_finish_is_superseded(tmp_path: Path, first: str) -> None:
    store = new(tmp_path)
    with store.lock():
        store.append(result(plan(0), first))
        store.append(result(plan(0), "not_reached"))
        store.append(result(plan(0), first))
    for each in (store, TrialStore.open(tmp_path)):
        assert each.outcome(plan(0).key) is TrialOutcome.NOT_REACHED
        assert len(each) == 1


def test_missing_counts_totals(tmp_path: Path) -> None:
    store = new(tmp_path)
    with store.lock():
        store.append(result(plan(0)), result(plan(1), "interrupted"), result(plan(2), "crashed"))
    wanted = [plan(3), plan(2), plan(1), plan(0), plan(3)]
    assert store.missing(wanted) == [plan(3), plan(1)]
    both = (TrialOutcome.INTERRUPTED, TrialOutcome.CRASHED)
    assert store.missing(wanted, again=both) == [plan(3), plan(2), plan(1)]
    assert store.keys() == {plan(0).key, plan(2).key}


@pytest.mark.parametrize("kept", [1, 40, -2, -1])
def test_a_torn_last_line_is_cut_or_ended(tmp_path: Path, kept: int) -> None:
    filled(tmp_path, 2)
    file = tmp_path / TRIALS
    whole = file.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    file.write_bytes(whole[: -len(last)] + last[:kept])
    only_newline_lost = kept == -1
    store = new(tmp_path)
    assert len(store) == (2 if only_newline_lost else 1)
    assert [s.line for s in store.skipped] == ([] if only_newline_lost else [2])
    with store.lock():
        store.append(result(plan(5)))
    lines = file.read_bytes().splitlines()
    assert all(json.loads(line)["key"] for line in lines)
    after = TrialStore.open(tmp_path)
    assert after.outcome(plan(5).key) is not None
    assert not after.skipped


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"\x00" * 30, "not a JSON object"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"outcome": "reached"}', "no key"),
        (b'{"key": "a", "outcome": "won"}', "no known outcome"),
        (b'{"key": "a", "outcome": "reached", "plan": 3}', "no plan"),
        (b'{"key": "a", "outcome": "reached", "plan": {"recipe": {}}}', "no crossings"),
    ],
)
def test_a_corrupted_line_is_named_and_left_out(tmp_path: Path, line: bytes, what: str) -> None:
    filled(tmp_path)
    lines = (tmp_path / TRIALS).read_bytes().splitlines()
    lines[1] = line
    (tmp_path / TRIALS).write_bytes(b"\n".join(lines) + b"\n")
    store = new(tmp_path)
    assert store.keys() == {plan(0).key, plan(2).key}
    (skipped,) = store.skipped
    assert (skipped.file, skipped.line) == (TRIALS, 2)
    assert what in skipped.what
    assert store.missing([plan(1)]) == [plan(1)]
    assert str(skipped).endswith("left out")


def test_the_second_driver_is_refused_and_named(tmp_path: Path) -> None:
    first, second = new(tmp_path), new(tmp_path)
    with first.lock():
        with (
            pytest.raises(InvalidInputError, match=f"another driver.*process {os.getpid()} on"),
            second.lock(),
        ):
            pass
        first.append(result(plan(0)))
    with second.lock():
        assert second.missing([plan(0)]) == []  # it sees what the first one wrote


def test_the_lock_vanishes_with_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from noisescale.run.store import TrialStore\n"
        "with TrialStore.open(sys.argv[1], workload='made-up 1').lock():\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    with new(tmp_path).lock() as store:
        store.append(result(plan(0)))


def test_the_lock_may_be_entered_again_by_its_holder(tmp_path: Path) -> None:
    store = new(tmp_path)
    with store.lock():
        with store.lock():
            store.append(result(plan(0)))
        store.append(result(plan(1)))
    with pytest.raises(RuntimeError, match=r"store\.lock"):
        store.append(result(plan(2)))
    with new(tmp_path).lock():
        pass


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"workload": "made-up 2"}, "workload"),
        ({"workload": WORKLOAD, "version": "0.0.1"}, "version"),
        ({"workload": WORKLOAD, "unit": "tokens"}, "unit"),
    ],
)
def test_a_store_of_something_else_is_refused(
    tmp_path: Path, changes: dict[str, str], named: str
) -> None:
    filled(tmp_path)
    with pytest.raises(InvalidInputError, match=f"its {named}.*is '.*another folder"):
        TrialStore.open(tmp_path, **changes)
    assert len(TrialStore.open(tmp_path)) == 3  # reading alone is not refused


def test_another_format_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    study = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps({**study, "format": 99}))
    with pytest.raises(InvalidInputError, match="its format is 99"):
        TrialStore.open(tmp_path)


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InvalidInputError, match=r"holds 'thesis.tex'"):
        new(tmp_path)
    with pytest.raises(InvalidInputError, match="this is a file"):
        new(tmp_path / "thesis.tex")
    with pytest.raises(InvalidInputError, match="this is no store"):
        TrialStore.open(tmp_path)
    with pytest.raises(InvalidInputError, match="this is no store"):
        TrialStore.open(tmp_path / "absent")
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(InvalidInputError, match="not JSON"):
        TrialStore.open(tmp_path)


def test_a_store_half_made_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "driver.lock").write_text("")
    (tmp_path / ".study.json").write_text('{"work')
    assert len(new(tmp_path)) == 0


def test_a_full_disk_loses_only_what_was_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new(tmp_path)
    real = os.write

    def full(descriptor: int, content: bytes) -> int:
        if len(content) > 100:
            return real(descriptor, content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with store.lock():
        store.append(result(plan(0)))
        with monkeypatch.context() as patch:
            patch.setattr("noisescale.run.store.log.os.write", full)
            line = f"{str(tmp_path)!r}: it could not be written .No space left"
            with pytest.raises(InvalidInputError, match=line):
                store.append(result(plan(1), detail="x" * 1000))
        assert store.keys() == {plan(0).key}
        store.append(result(plan(2)))
    after = TrialStore.open(tmp_path)
    assert after.keys() == {plan(0).key, plan(2).key}
    assert not after.skipped


def test_a_real_limit_on_the_files_size_truncates_back(tmp_path: Path) -> None:
    code = (
        "import resource, sys; sys.path[:0] = sys.argv[2:]\n"
        "from trial_results import plan, result\n"
        "from noisescale.run.store import TrialStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "with TrialStore.open(sys.argv[1], workload='made-up 1').lock() as store:\n"
        "    for seed in range(9):\n"
        "        store.append(result(plan(seed)))\n"
    )
    tests = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", code, str(tmp_path), tests]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "it could not be written (File too large)" in done.stderr.splitlines()[-1]
    store = TrialStore.open(tmp_path)
    assert 1 <= len(store) < 9
    assert not store.skipped
    assert (tmp_path / TRIALS).read_bytes().endswith(b"\n")


def test_curves_are_kept_by_key(tmp_path: Path) -> None:
    store = new(tmp_path)
    curve = {"evaluated_at": (0, 1), "values": {"validation_loss": (2.0, None)}}
    with store.lock():
        store.append(result(plan(0), "interrupted", evaluated_at=(0,)), result(plan(1)))
        store.append(result(plan(0), **curve))
    expected = {"evaluated_at": [0, 1], "values": {"validation_loss": [2.0, None]}}
    assert dict(TrialStore.open(tmp_path).curves()) == {plan(0).key: expected}
    assert next(store.results([plan(0).key])).evaluated_at == ()


def test_the_table_and_its_summary(tmp_path: Path) -> None:
    store = new(tmp_path)
    with store.lock():
        store.append(*(result(plan(seed, batch_size=64)) for seed in range(4)))
        store.append(result(plan(4, batch_size=8)))
        store.append(result(plan(5, batch_size=8), "not_reached"))
    table = store.table()
    assert len(table.key) == 12
    assert np.isnan(table.first[table.outcome == "not_reached"]).all()
    rows = {(row.batch_size, row.target): row for row in store.summary()}
    assert [size for size, _ in rows] == [8, 8, 64, 64]
    small = rows[8, TARGETS[0]]
    assert (small.trials, small.passed, small.fewest_steps) == (2, 1, 14.0)
    assert small.outcomes == {"reached": 1, "not_reached": 1}
    assert rows[64, TARGETS[1]].fewest_steps == 10.0
    assert small.closest_low == small.closest_high == 0.04


def test_an_empty_store_has_an_empty_table(tmp_path: Path) -> None:
    store = new(tmp_path)
    assert store.summary() == ()
    store.to_csv(tmp_path / "table.csv")
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1


def test_the_csv_is_flat(tmp_path: Path) -> None:
    store = new(tmp_path / "store")
    recipe = plan().recipe.with_changes(
        optimizer="adam", betas=(0.8, 0.95), schedule={"kind": "cosine"}
    )
    with store.lock():
        store.append(result(plan(0)), result(plan(1, recipe=recipe), "crashed", detail='a,"b"\nc'))
    store.to_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows] == [*TARGETS, *TARGETS]
    assert rows[0]["batch_size"] == "32"
    assert rows[0]["momentum"] == rows[0]["schedule"] == ""
    assert (rows[2]["beta1"], rows[2]["beta2"]) == ("0.8", "0.95")
    assert rows[2]["schedule"] == '{"kind": "cosine"}'
    assert rows[2]["detail"] == 'a,"b"\nc'
    assert rows[0]["key"] == plan(0).key
    with pytest.raises(InvalidInputError, match="could not be written"):
        store.to_csv(tmp_path / "absent" / "table.csv")
