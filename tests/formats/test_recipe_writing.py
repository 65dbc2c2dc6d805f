"""A changed recipe into a copy of its file: only what changed is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError, MissingExtraError
from noisescale.formats.recipe_file import RecipeFile, read_recipe
from noisescale.formats.recipe_writing import recipe_edits, write_recipe
from noisescale.records import Recipe
from recipe_examples import (
    DEEPSPEED,
    LIGHTNING,
    OWN,
    OWN_YAML,
    TIMM,
    TRANSFORMERS,
    changed,
    written,
)

SAMPLES: dict[str, Any] = {
    "own.toml": OWN,
    "own.yaml": OWN_YAML,
    "own.json": {"lr": 0.1, "batch_size": 32, "schedule": {"kind": "cosine"}},
    "hf.yaml": TRANSFORMERS,
    "hf.json": yaml.safe_load(TRANSFORMERS),
    "ds.json": DEEPSPEED,
    "pl.yaml": LIGHTNING,
    "timm.yaml": TIMM,
}


def sample(folder: Path, name: str) -> RecipeFile:
    return read_recipe(written(folder, name, SAMPLES[name]))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_without_changes_the_copy_is_the_same_to_the_byte(
    tmp_path: Path, name: str, newline: bytes, bom: bytes
) -> None:
    path = written(tmp_path, name, SAMPLES[name])
    path.write_bytes(bom + path.read_bytes().replace(b"\n", newline))
    file = read_recipe(path)
    target = tmp_path / f"copy-{name}"
    copy = write_recipe(file, file.recipe, target)
    assert target.read_bytes() == path.read_bytes()
    assert copy.recipe == file.recipe
    assert recipe_edits(file, file.recipe) == {}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_doubled_batch_keeps_every_other_line(tmp_path: Path, name: str) -> None:
    file = sample(tmp_path, name)
    new = file.recipe.with_changes(lr=file.recipe.lr * 1.1, batch_size=file.recipe.batch_size * 2)
    target = tmp_path / f"copy-{name}"
    copy = write_recipe(file, new, target)
    assert copy.recipe == new
    assert read_recipe(target).recipe == new
    old_lines = file.path.read_text().splitlines()
    new_lines = target.read_text().splitlines()
    assert len(old_lines) == len(new_lines)
    touched = sum(old != new for old, new in zip(old_lines, new_lines, strict=True))
    assert touched <= 4
    for old, new_line in zip(old_lines, new_lines, strict=True):
        if "#" in old:
            assert old[old.index("#") :] in new_line


def test_own_toml_line_by_line(tmp_path: Path) -> None:
    file = sample(tmp_path, "own.toml")
    write_recipe(
        file,
        {
            "lr": 0.2,
            "batch_size": 64,
            "total_steps": 5000,
            "warmup_steps": 250,
            "evaluate_every": 50,
            "schedule": {"kind": "step", "milestones": [2500, 3750], "gamma": 0.1},
        },
        tmp_path / "new.toml",
    )
    expected = OWN.replace("lr = 0.1 ", "lr = 0.2 ").replace("= 32\n", "= 64\n")
    expected = expected.replace("10_000", "5000").replace("500\n", "250\n", 1)
    expected = expected.replace("every = 100", "every = 50").replace("[5000, 7500]", "[2500, 3750]")
    assert (tmp_path / "new.toml").read_text().replace("total_steps = 5000", "") == (
        expected.replace("total_steps = 5000", "")
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(list(SAMPLES)),
    st.floats(1e-9, 1e9),
    st.sampled_from([2, 4, 8]),
    st.floats(0, 1),
    st.booleans(),
)
def test_what_is_written_reads_back(
    tmp_path: Path, name: str, lr: float, factor: int, decay: float, adds: bool
) -> None:
    file = sample(tmp_path, name)
    changes: dict[str, Any] = {
        "lr": lr,
        "batch_size": file.recipe.batch_size * factor,
        "weight_decay": decay,
    }
    if adds and file.kind in ("noisescale", "transformers"):
        changes |= {"clip_norm": 0.5, "warmup_steps": 3}
    if file.recipe.betas is not None:
        changes |= {"betas": (0.5, 0.25), "eps": 1e-12}
    new = file.recipe.with_changes(**changes)
    copy = write_recipe(file, new, tmp_path / f"copy-{name}", overwrite=True)
    assert copy.recipe == new
    back = write_recipe(copy, file.recipe, tmp_path / f"back-{name}", overwrite=True)
    assert back.recipe == file.recipe


def test_a_value_that_stands_twice_is_written_twice(tmp_path: Path) -> None:
    text = LIGHTNING.replace("    width: 64", "    lr: 0.1")
    text = text.replace("    batch_size: 8 ", "    train: {batch_size: 8}\n    batch_size: 8 ")
    file = read_recipe(written(tmp_path, "pl.yaml", text))
    copy = write_recipe(file, {"lr": 0.05, "batch_size": 32}, tmp_path / "new.yaml")
    assert (copy.recipe.lr, copy.recipe.batch_size) == (0.05, 32)
    data = yaml.safe_load((tmp_path / "new.yaml").read_text())
    assert data["model"]["init_args"]["lr"] == data["optimizer"]["init_args"]["lr"] == 0.05
    arguments = data["data"]["init_args"]
    assert arguments["batch_size"] == arguments["train"]["batch_size"] == 4


IN_THE_MODEL = {
    "trainer": {"devices": 1},
    "model": {"lr": 0.1},
    "data": {"batch_size": 4},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": None},
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pl.json", json.dumps(IN_THE_MODEL)),
        ("pl.yaml", yaml.safe_dump(IN_THE_MODEL)),
        ("empty.yaml", yaml.safe_dump(IN_THE_MODEL).replace("init_args: null", "init_args:")),
        (
            "pl.toml",
            "model = {lr = 0.1}\ndata = {batch_size = 4}\n[trainer]\ndevices = 1\n"
            '[optimizer]\nclass_path = "torch.optim.AdamW"\n',
        ),
    ],
)
def test_keys_are_written_where_their_table_is_null_or_absent(
    tmp_path: Path, name: str, text: str
) -> None:
    file = read_recipe(written(tmp_path, name, text))
    new = {"weight_decay": 0.02, "eps": 1e-9, "lr": 0.2}
    copy = write_recipe(file, new, tmp_path / f"new-{name}")
    assert copy.recipe == file.recipe.with_changes(**new)


@pytest.mark.parametrize("ending", ["json", "yaml", "toml"])
def test_a_value_where_a_table_would_have_to_be_is_named(tmp_path: Path, ending: str) -> None:
    texts = {
        "json": json.dumps({**IN_THE_MODEL, "optimizer": {"class_path": "AdamW", "init_args": 7}}),
        "yaml": yaml.safe_dump(IN_THE_MODEL).replace("init_args: null", "init_args: 7"),
        "toml": "model = {lr = 0.1}\ndata = {batch_size = 4}\ntrainer = {devices = 1}\n"
        'optimizer = {class_path = "AdamW", init_args = 7}\n',
    }
    file = read_recipe(written(tmp_path, f"r.{ending}", texts[ending]))
    with pytest.raises(InvalidInputError, match=r"optimizer\.init_args 7: a table is required"):
        write_recipe(file, {"weight_decay": 0.02}, tmp_path / f"new.{ending}")


BLOCKS = """\
optimizer: adamw
lr: 0.1
betas:
- 0.9   # first
- 0.99
batch_size: 32
schedule:
  kind: list
  points:
  - - 0
    - 1.0
  - - 90    # then
    - 0.1
total_steps: 100
"""


def test_lists_over_several_lines_keep_their_lines(tmp_path: Path) -> None:
    file = read_recipe(written(tmp_path, "r.yaml", BLOCKS))
    table = {"kind": "list", "points": [[0, 1.0], [45, 0.1]]}
    new = file.recipe.with_changes(betas=(0.81, 0.98), schedule=table)
    assert write_recipe(file, new, tmp_path / "new.yaml").recipe == new
    expected = BLOCKS.replace("- 0.9 ", "- 0.81 ").replace("- 0.99", "- 0.98").replace("90 ", "45 ")
    assert (tmp_path / "new.yaml").read_text() == expected


def test_lists_over_several_lines_may_change_their_length(tmp_path: Path) -> None:
    file = read_recipe(written(tmp_path, "r.yaml", BLOCKS))
    table = {"kind": "list", "points": [[0, 0.5]]}
    copy = write_recipe(file, {"schedule": table, "lr": 0.2}, tmp_path / "new.yaml")
    assert copy.recipe == file.recipe.with_changes(schedule=table, lr=0.2)


def test_new_keys_of_a_framework_are_added(tmp_path: Path) -> None:
    file = sample(tmp_path, "hf.yaml")
    write_recipe(file, {"betas": (0.8, 0.9), "eps": 2e-9}, tmp_path / "new.yaml")
    data = yaml.safe_load((tmp_path / "new.yaml").read_text())
    assert (data["adam_beta1"], data["adam_beta2"], data["adam_epsilon"]) == (0.8, 0.9, 2e-9)


def test_saving_stays_with_evaluating(tmp_path: Path) -> None:
    file = sample(tmp_path, "hf.json")
    write_recipe(file, {"evaluate_every": 25}, tmp_path / "new.json")
    data = json.loads((tmp_path / "new.json").read_text())
    assert (data["eval_steps"], data["save_steps"]) == (25, 25)


def test_the_scheduler_of_deepspeed_gets_the_rate_too(tmp_path: Path) -> None:
    file = sample(tmp_path, "ds.json")
    write_recipe(file, {"lr": 0.001, "batch_size": 128}, tmp_path / "new.json")
    data = json.loads((tmp_path / "new.json").read_text())
    assert data["optimizer"]["params"]["lr"] == 0.001
    assert data["scheduler"]["params"]["warmup_max_lr"] == 0.001
    parts = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [data[name] for name in parts] == [128, 4, 4]


@pytest.mark.parametrize(
    ("batch", "micro", "passes"),
    [
        (512, 16, 4),
        (256, 16, 2),
        (128, 16, 1),
        (64, 8, 1),
        (8, 1, 1),
        (8 * 45, 15, 3),
        (192, 12, 2),
    ],
)
def test_the_examples_per_device_are_kept_where_they_divide(
    tmp_path: Path, batch: int, micro: int, passes: int
) -> None:
    file = read_recipe(written(tmp_path, "hf.yaml", TRANSFORMERS), world_size=8)
    copy = write_recipe(file, {"batch_size": batch}, tmp_path / "new.yaml")
    assert (copy.micro_batch_size, copy.accumulation) == (micro, passes)
    assert copy.recipe.batch_size == batch
    assert copy.world_size == 8


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (500, "a multiple of 8 is required; take 496 or 504"),
        (4, "a multiple of 8 is required; take 8 or 16"),
        (8 * 17, "passes of 16 on 8 devices do not divide it; take 128"),
    ],
)
def test_batches_that_the_devices_cannot_hold(tmp_path: Path, batch: int, message: str) -> None:
    file = read_recipe(written(tmp_path, "hf.yaml", TRANSFORMERS), world_size=8)
    with pytest.raises(InvalidInputError, match=message):
        write_recipe(file, {"batch_size": batch}, tmp_path / "new.yaml")
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize("world", [None, 1, 8])
@pytest.mark.parametrize("missing", ["train_batch_size", "train_micro_batch_size_per_gpu",
                                     "gradient_accumulation_steps"])  # fmt: skip
def test_deepspeed_with_a_part_left_out(tmp_path: Path, missing: str, world: int | None) -> None:
    path = written(tmp_path, "ds.json", changed(DEEPSPEED, **{missing: None}))
    file = read_recipe(path, world_size=world)
    for factor in (1, 2, 4):
        size = file.recipe.batch_size * factor
        copy = write_recipe(file, {"batch_size": size}, tmp_path / "n.json", overwrite=True)
        assert copy.recipe.batch_size == size
        assert missing not in json.loads((tmp_path / "n.json").read_text())


def test_epochs_stay_and_steps_follow(tmp_path: Path) -> None:
    table = {"learning_rate": 1e-4, "num_train_epochs": 2, "warmup_ratio": 0.1}
    path = written(tmp_path, "hf.json", table)
    file = read_recipe(path, world_size=1, dataset_size=1600)
    assert (file.recipe.total_steps, file.recipe.warmup_steps) == (400, 40)
    new = file.recipe.with_changes(batch_size=16, total_steps=200, warmup_steps=30)
    copy = write_recipe(file, new, tmp_path / "new.json")
    assert (copy.recipe.total_steps, copy.recipe.warmup_steps) == (200, 20)
    assert copy.notes[-1] == (
        "warmup_steps follows from other keys of the file: 20, where 30 is meant."
    )
    said = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    data = json.loads((tmp_path / "new.json").read_text())
    assert {**said, **data, "per_device_train_batch_size": 8} == {**table, **said}


def test_timm_keeps_scaling_its_rate(tmp_path: Path) -> None:
    path = written(tmp_path, "t.yaml", TIMM.replace("lr: 0.4", "lr: null"))
    file = read_recipe(path)
    copy = write_recipe(file, {"batch_size": 2048}, tmp_path / "new.yaml")
    assert copy.recipe.lr == pytest.approx(0.8)
    assert "lr: null" in (tmp_path / "new.yaml").read_text()


def test_what_was_given_beside_the_file_is_written_where_it_has_a_place(tmp_path: Path) -> None:
    path = written(tmp_path, "r.toml", "lr = 0.1\n")
    file = read_recipe(path, given={"batch_size": 32})
    copy = write_recipe(file, {"batch_size": 64}, tmp_path / "new.toml")
    assert (tmp_path / "new.toml").read_text() == "lr = 0.1\nbatch_size = 64\n"
    assert copy.recipe == Recipe(lr=0.1, batch_size=64)
    pl = read_recipe(written(tmp_path, "pl.yaml", LIGHTNING), given={"warmup_steps": 10})
    assert write_recipe(pl, {"lr": 0.2}, tmp_path / "pl2.yaml").recipe.warmup_steps == 10
    with pytest.raises(InvalidInputError, match="warmup_steps: a lightning file has no key for it"):
        write_recipe(pl, {"warmup_steps": 5}, tmp_path / "pl3.yaml")


def test_a_global_batch_given_beside_the_file_says_how_many_devices(tmp_path: Path) -> None:
    path = written(tmp_path, "hf.yaml", TRANSFORMERS)
    file = read_recipe(path, given={"batch_size": 256})
    assert (file.world_size, file.recipe.batch_size) == (8, 256)
    assert not any("1 is assumed" in note for note in file.notes)
    copy = write_recipe(file, {"batch_size": 512}, tmp_path / "new.yaml")
    assert (copy.micro_batch_size, copy.accumulation) == (16, 4)
    odd = read_recipe(path, given={"batch_size": 100})
    assert odd.recipe.batch_size == 100
    with pytest.raises(InvalidInputError, match="the file's parts make 16 x 2 x 1 devices = 32"):
        write_recipe(odd, {"batch_size": 200}, tmp_path / "odd.yaml")


def test_a_file_has_no_place_for_some_keys(tmp_path: Path) -> None:
    file = sample(tmp_path, "hf.yaml")
    with pytest.raises(InvalidInputError, match="a transformers file has no key for it"):
        write_recipe(file, {"ema_decay": 0.9}, tmp_path / "new.yaml")
    with pytest.raises(InvalidInputError, match="not a key of a recipe"):
        write_recipe(file, {"learnin_rate": 0.9}, tmp_path / "new.yaml")


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    file = sample(tmp_path, "own.toml")
    before = file.path.read_bytes()
    other = written(tmp_path, "other.toml", "lr = 1\n")
    for target, message in ((file.path, "is the recipe that was read"), (other, "exists")):
        with pytest.raises(InvalidInputError, match=message):
            write_recipe(file, {"lr": 0.5}, target)
    link = tmp_path / "link.toml"
    link.symlink_to(file.path)
    with pytest.raises(InvalidInputError, match="is the recipe that was read"):
        write_recipe(file, {"lr": 0.5}, link)
    assert file.path.read_bytes() == before
    write_recipe(file, {"lr": 0.5}, file.path, overwrite=True)
    assert read_recipe(file.path).recipe.lr == 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "link.toml", "other.toml", "own.toml",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["new.json", "new.yaml", "new", "new.txt", "new.py"])
def test_the_copy_ends_as_the_file_does(tmp_path: Path, name: str) -> None:
    file = sample(tmp_path, "own.toml")
    with pytest.raises(InvalidInputError, match=r"ends? (its name )?in \.toml|rename|lr, batch"):
        write_recipe(file, {"lr": 0.5}, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_yml_and_yaml_are_one(tmp_path: Path) -> None:
    file = sample(tmp_path, "own.yaml")
    assert write_recipe(file, {"lr": 0.5}, tmp_path / "new.yml").recipe.lr == 0.5


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    file = sample(tmp_path, "own.toml")
    for target in (tmp_path / "none" / "new.toml", file.path / "new.toml"):
        with pytest.raises(InvalidInputError, match=r"cannot be written|cannot be read"):
            write_recipe(file, {"lr": 0.5}, target)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InvalidInputError, match=r"exists|is a folder"):
        write_recipe(file, {"lr": 0.5}, tmp_path / "folder.toml")
    with pytest.raises(InvalidInputError, match="cannot be written"):
        write_recipe(file, {"lr": 0.5}, tmp_path / "folder.toml", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.toml", "own.toml"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_the_copy_has_the_mode_of_the_file(tmp_path: Path) -> None:
    file = sample(tmp_path, "own.toml")
    file.path.chmod(0o640)
    write_recipe(file, {"lr": 0.5}, tmp_path / "new.toml")
    assert (tmp_path / "new.toml").stat().st_mode & 0o777 == 0o640


def test_a_value_behind_an_alias_is_not_changed_for_others(tmp_path: Path) -> None:
    text = "base: &rate 0.1\ntrainer: {devices: 1}\ndata: {batch_size: 4}\n" + (
        "optimizer: {class_path: torch.optim.SGD, init_args: {lr: *rate}}\n"
    )
    file = read_recipe(written(tmp_path, "pl.yaml", text))
    assert file.recipe.lr == 0.1
    with pytest.raises(InvalidInputError, match="an alias or a merged key"):
        write_recipe(file, {"lr": 0.5}, tmp_path / "new.yaml")
    assert not (tmp_path / "new.yaml").exists()
    alone = text.replace("*rate", "0.1").replace("base: &rate 0.1\n", "")
    alone = alone.replace("lr: 0.1", "lr: &mine 0.1")
    write_recipe(read_recipe(written(tmp_path, "p.yaml", alone)), {"lr": 0.5}, tmp_path / "q.yaml")
    assert (tmp_path / "q.yaml").read_text() == alone.replace("0.1", "0.5")


def test_values_that_are_no_numbers_elsewhere_do_no_harm(tmp_path: Path) -> None:
    text = LIGHTNING.replace("width: 64", "width: [.nan, .inf, {a: .nan}]")
    file = read_recipe(written(tmp_path, "pl.yaml", text))
    write_recipe(file, {"lr": 0.5}, tmp_path / "new.yaml")
    assert (tmp_path / "new.yaml").read_text() == text.replace("lr: 0.1", "lr: 0.5")


def test_a_quoted_number_becomes_a_number(tmp_path: Path) -> None:
    file = read_recipe(written(tmp_path, "r.yaml", 'lr: "3e-4"  # text\nbatch_size: 8\n'))
    write_recipe(file, {"lr": 6e-5}, tmp_path / "new.yaml")
    assert (tmp_path / "new.yaml").read_text() == "lr: 6.0e-05  # text\nbatch_size: 8\n"


def test_writing_toml_without_tomlkit_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tomlkit", None)
    file = sample(tmp_path, "own.toml")
    with pytest.raises(MissingExtraError, match=r"tomlkit.*noisescale\[formats\]"):
        write_recipe(file, {"lr": 0.5}, tmp_path / "new.toml")
    assert write_recipe(sample(tmp_path, "own.json"), {"lr": 0.5}, tmp_path / "n.json").recipe.lr


def test_reading_is_light() -> None:
    code = (
        "import sys, noisescale.formats.recipe_file, noisescale.formats.recipe_writing;"
        "print([m for m in ('torch', 'numpy', 'scipy', 'tomlkit', 'ruamel.yaml', 'yaml')"
        " if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
