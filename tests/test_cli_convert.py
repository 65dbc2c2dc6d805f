from __future__ import annotations

import json
import subprocess
import sys

import pytest

from noisescale import InvalidInputError, Recipe
from noisescale.cli import main
from noisescale.records import Conversion
from noisescale.run.convert_file import convert_file

OWN = """\
# tuned on one machine
optimizer = "sgd"
lr = 0.1          # of the sweep
momentum = 0.9
batch_size = 256
dataset_size = 50000
"""
ARGUMENTS = {
    "output_dir": "out",
    "learning_rate": 5e-05,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "weight_decay": 0.01,
    "max_steps": 10000,
}
DEEPSPEED = {
    "train_batch_size": 256,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}
LIGHTNING = """\
trainer:
  devices: 4
  max_steps: 1000
optimizer:
  class_path: torch.optim.SGD
  init_args:
    lr: 0.1
    momentum: 0.9
data:
  init_args:
    batch_size: 32
"""
TIMM = """\
opt: sgd
lr: 0.1
momentum: 0.9
batch_size: 64
sched: cosine
"""
FILES = {
    "own.toml": OWN,
    "arguments.json": json.dumps(ARGUMENTS),
    "deepspeed.json": json.dumps(DEEPSPEED),
    "lightning.yaml": LIGHTNING,
    "timm.yaml": TIMM,
    "scaled.yaml": TIMM.replace("lr: 0.1", "lr_base: 0.1\nlr_base_size: 256"),
    "switched.toml": OWN + "auto_scale_lr = true\n",
    "adam.toml": 'optimizer = "adam"\nlr = 1e-3\nbatch_size = 64\neps = 2e-38\n',
    "tokens.toml": 'lr = 0.1\nbatch_size = 64\nunit = "sequences"\nsequence_length = 128\n',
    "twins.toml": "lr = 0.1\nbatch_size = 64\ntotal_steps = 10\ntotal_examples = 99\n",
    "wrong_key.toml": OWN + "momentun = 0.9\n",
    "wrong_optimizer.toml": OWN.replace('"sgd"', '"sdg"'),
    "momentum_one.toml": OWN.replace("momentum = 0.9", "momentum = 1.0"),
    "momentum_below.toml": OWN.replace("momentum = 0.9", "momentum = -0.1"),
    "betas_one.toml": 'optimizer = "adam"\nlr = 1e-3\nbatch_size = 64\nbetas = [0.9, 1.0]\n',
    "betas_three.toml": 'optimizer = "adam"\nlr = 1e-3\nbatch_size = 64\nbetas = [0.9, 0.9, 0.9]\n',
    "betas_of_sgd.toml": OWN + "betas = [0.9, 0.99]\n",
    "too_large.toml": OWN.replace("50000", "100"),
    "no_rate.toml": "batch_size = 8\n",
    "no_batch.toml": "lr = 0.1\n",
    "nan.toml": "lr = nan\nbatch_size = 8\n",
    "really.json": OWN,
    "really.toml": json.dumps(ARGUMENTS),
    "really.yaml": "{lr: 0.1, batch_size: [8",
    "list.json": "[1, 2]",
    "empty.toml": "",
    "recipe.txt": OWN,
    "recipe": OWN,
    "script.py": "lr = 0.1\nbatch_size = 8\n",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "dir.toml").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["convert", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


BAD = [
    ("own.toml", "--batch-size"),
    ("own.toml --new-replicas 8", "give --batch-size N"),
    ("arguments.json --replicas 2", "give --batch-size N, or --new-replicas N"),
    ("deepspeed.json --new-replicas 16", "give --batch-size N"),
    ("own.toml --batch-size 0", "--batch-size 0"),
    ("own.toml --batch-size 1.5", "--batch-size 1.5"),
    ("own.toml --batch-size many", "--batch-size many"),
    ("own.toml --batch-size 60000", "the data has 50000 examples (dataset_size in own.toml)"),
    ("own.toml --batch-size 64 --rule liner", "did you mean linear"),
    ("own.toml --batch-size 64 --rule adam-sde", "choose from"),
    ("own.toml --batch-size 64 --rule noise-aware", "--noise-scale"),
    ("own.toml --batch-size 64 --noise-scale 0", "--noise-scale 0"),
    ("own.toml --batch-size 64 --noise-scale nan", "--noise-scale nan"),
    ("own.toml --batch-size 64 --noise-scale inf", "--noise-scale inf"),
    ("own.toml --batch-size 64 --curvature -1", "--curvature -1"),
    ("own.toml --batch-size 64 --unit token", "did you mean tokens"),
    ("own.toml --batch-size 64 --unit tokens", "own.toml: sequence_length"),
    ("own.toml --batch-size 64 --set momentun=0.5", "did you mean momentum"),
    ("own.toml --batch-size 64 --set momentum=1", "in [0, 1)"),
    ("own.toml --batch-size 64 --set betas=0.9,0.99", "sgd has no betas"),
    ("own.toml --batch-size 64 --set lr", "key=value"),
    ("own.toml --batch-size 64 --old-batch-size 128", "contradicts batch_size 256 in own.toml"),
    ("own.toml --batch-size 64 --old-batch-size 8 --set batch_size=9", "contradict"),
    ("own.toml --batch-size 64 --kind timmm", "did you mean timm"),
    ("own.toml --batch-size 64 --write own.toml", "own.toml"),
    ("own.toml --batch-size 64 --write adam.toml", "exists"),
    ("own.toml --batch-size 64 --write new.json", "end its name in .toml"),
    ("own.toml --batch-size 64 --write missing/new.toml", "missing"),
    ("tokens.toml --batch-size 1000 --unit tokens", "give 896 or 1024"),
    ("adam.toml --batch-size 1024 --rule adam-sde", "kappa (1 - beta1)"),
    ("adam.toml --batch-size 512 --rule adam-sde", "eps"),
    ("twins.toml --batch-size 8", "twins.toml: total_steps"),
    ("wrong_key.toml --batch-size 8", "did you mean momentum"),
    ("wrong_optimizer.toml --batch-size 8", "did you mean sgd"),
    ("momentum_one.toml --batch-size 8", "momentum 1.0"),
    ("momentum_below.toml --batch-size 8", "momentum -0.1"),
    ("betas_one.toml --batch-size 8", "betas [0.9, 1.0]"),
    ("betas_three.toml --batch-size 8", "betas [0.9, 0.9, 0.9]"),
    ("betas_of_sgd.toml --batch-size 8", "betas_of_sgd.toml: optimizer"),
    ("too_large.toml --batch-size 8", "larger than the data"),
    ("no_rate.toml --batch-size 8", "no_rate.toml: lr"),
    ("no_batch.toml --batch-size 8", "no_batch.toml: batch_size"),
    ("nan.toml --batch-size 8", "nan.toml: lr nan"),
    ("really.json --batch-size 8", "reads as TOML"),
    ("really.toml --batch-size 8", "reads as JSON"),
    ("really.yaml --batch-size 8", "no YAML"),
    ("list.json --batch-size 8", "a table of keys is required"),
    ("empty.toml --batch-size 8", "is empty"),
    ("binary.toml --batch-size 8", "no UTF-8 text"),
    ("dir.toml --batch-size 8", "is a folder"),
    (". --batch-size 8", "is a folder"),
    ("missing.toml --batch-size 8", "missing.toml"),
    ("recipe.txt --batch-size 8", "ends in .toml"),
    ("recipe --batch-size 8", "ends in .toml"),
    ("script.py --batch-size 8", "is Python, which is not executed"),
    ("scaled.yaml --batch-size 512 --replicas 4", "not scaled again"),
    ("switched.toml --batch-size 512", "auto_scale_lr"),
    ("arguments.json --batch-size 512", "give --replicas N or --old-batch-size N"),
    ("timm.yaml --batch-size 512", "give --replicas N or --old-batch-size N"),
    ("arguments.json --batch-size 512 --replicas 0", "--replicas 0"),
    ("arguments.json --batch-size 512 --old-batch-size 100", "a multiple of 32"),
    ("arguments.json --batch-size 63 --replicas 2 --write new.json", "take 62 or 64"),
    ("arguments.json --batch-size 512 --replicas 4 --dataset-size 100", "data"),
    ("lightning.yaml --batch-size 512 --replicas 8", "world size 8"),
    ("lightning.yaml --batch-size 512 --old-batch-size 64", "contradicts 32 x 1 x 4"),
    ("arguments.json --batch-size 64 --replicas 2 --new-replicas 3", "63 or 66"),
    ("arguments.json --batch-size 64 --replicas 2 --new-replicas 3 --write n.json", "63 or 66"),
    ("arguments.json --batch-size 64 --set batch_size=100", "a multiple of 32"),
    ("lightning.yaml --batch-size 256 --new-replicas 8 --write n.yaml", "says its own devices"),
    ("deepspeed.json --batch-size 512 --replicas 4", "train_batch_size"),
    ("deepspeed.json --batch-size 512 --old-batch-size 128", "contradicts 8 x 4 x 8"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(folder, capsys, line, words):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, out, err = run(capsys, *line.split())
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("noisescale: error: ")
    assert words in err
    assert "; " in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_answer_names_rule_source_and_what_other_rules_say(folder, capsys):
    status, out, err = run(capsys, "own.toml", "--batch-size", "1024")
    assert (status, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    flat = " ".join(out.split())
    assert "from 256 to 1,024 examples (x4); the rate goes from 0.1 to 0.4." in flat
    assert "Goyal et al. 2017 (arXiv:1706.02677)" in flat
    assert "exact lr 1.3756, momentum 0.6561" in flat
    assert "give --noise-scale X" in flat


def test_quiet_leaves_the_changes_and_warnings(folder, capsys):
    _, whole, _ = run(capsys, "own.toml", "--batch-size", "16384")
    status, brief, _ = run(capsys, "own.toml", "--batch-size", "16384", "--quiet")
    assert status == 0
    assert "Why" in whole
    assert "Why" not in brief
    assert "square-root" in brief
    assert "Warning: " in brief
    assert len(brief) < len(whole) / 2


@pytest.mark.parametrize("columns", ["20", "40", "71", "72", "120", "400"])
def test_narrow_and_wide_terminals(folder, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    status, out, _ = run(capsys, "own.toml", "--batch-size", "64")
    assert status == 0
    assert all(len(line) <= max(int(columns), 20) for line in out.splitlines())
    assert "0.025" in out
    assert "0.974004" in out


def test_json_is_one_object_with_the_promised_names(folder, capsys):
    status, out, err = run(capsys, "own.toml", "--batch-size", "1024", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert {"recipe", "changes", "alternatives", "warnings"} <= set(found)
    assert {"name", "old", "new", "rule", "source", "validity", "why"} <= set(found["changes"][0])
    assert (found["recipe"]["lr"], found["recipe"]["batch_size"]) == (0.4, 1024)
    assert found["unit"] == "examples"
    assert Conversion.from_dict(found) == convert_file("own.toml", batch_size=1024)


def test_the_same_batch_changes_nothing_even_where_the_rate_is_scaled(folder, capsys):
    for line in (
        "own.toml --batch-size 256", "switched.toml --batch-size 256",
        "arguments.json --batch-size 64 --replicas 2", "deepspeed.json --batch-size 256",
        "lightning.yaml --batch-size 128",
    ):  # fmt: skip
        status, out, _ = run(capsys, *line.split())
        assert status == 0
        assert "Nothing changes: the global batch is the same" in " ".join(out.split())


def test_a_file_with_its_devices_needs_nothing_else(folder, capsys):
    for name, old in (("deepspeed.json", 256), ("lightning.yaml", 128)):
        assert convert_file(name, batch_size=512).old_batch_size == old


def test_devices_are_given_or_follow_from_the_old_batch(folder):
    by_devices = convert_file("arguments.json", batch_size=512, replicas=4)
    by_batch = convert_file("arguments.json", batch_size=512, old_batch_size=128)
    assert by_devices == by_batch
    assert by_devices.old_batch_size == 128
    assert next(c for c in by_devices.changes if c.name == "lr").key == "learning_rate"


def test_what_is_set_comes_first(folder):
    found = convert_file("own.toml", batch_size=1024, overrides=["momentum=0", "lr=0.2"])
    assert (found.original.lr, found.recipe.lr, found.rule) == (0.2, 0.2, "momentum-trade")


def test_a_batch_in_tokens(folder):
    found = convert_file("tokens.toml", batch_size=128 * 256, unit="tokens")
    assert (found.new_batch_size, found.unit) == (256, "sequences")


def test_what_is_written_says_the_new_recipe_and_keeps_the_comments(folder, capsys):
    status, out, _ = run(capsys, "own.toml", "--batch-size", "1024", "--write", "new.toml")
    assert status == 0
    assert out.endswith("Written: new.toml\n")
    text = (folder / "new.toml").read_text()
    assert text.startswith("# tuned on one machine\n")
    assert "# of the sweep" in text
    found = convert_file("new.toml", batch_size=1024)
    assert found.unchanged
    assert found.recipe == Recipe(lr=0.4, momentum=0.9, batch_size=1024, dataset_size=50_000)


@pytest.mark.parametrize(
    ("name", "options"),
    [("arguments.json", {"replicas": 2}), ("deepspeed.json", {}), ("lightning.yaml", {}),
     ("timm.yaml", {"replicas": 2})],
)  # fmt: skip
def test_other_peoples_files_are_written_too(folder, name, options):
    new = f"new-{name}"
    there = convert_file(name, batch_size=512, target=new, **options)
    again = convert_file(new, batch_size=512, **options)
    assert again.unchanged
    assert again.recipe == there.recipe


@pytest.mark.parametrize("how", [{"replicas": 2}, {"old_batch_size": 64},
                                 {"overrides": ["batch_size=64"]}])  # fmt: skip
@pytest.mark.parametrize(("size", "devices", "passes"), [(256, 8, 4), (256, 2, 16), (64, 4, 2)])
def test_other_devices_get_their_share(folder, how, size, devices, passes):
    found = convert_file(
        "arguments.json", batch_size=size, new_replicas=devices, target="new.json", **how
    )
    assert found.old_batch_size == 64
    text = json.loads((folder / "new.json").read_text())
    assert text["per_device_train_batch_size"] == 8
    assert text["gradient_accumulation_steps"] == passes
    assert f"8 per device and pass x {passes} passes x {devices} devices" in found.notes[-1]
    again = convert_file("new.json", batch_size=size, replicas=devices)
    assert again.unchanged
    assert again.recipe.lr == found.recipe.lr
    assert found.unchanged == (size == 64)


@pytest.mark.parametrize(("size", "devices", "passes"), [(512, 16, 4), (256, 16, 2), (512, 8, 8)])
def test_deepspeed_on_other_devices(folder, size, devices, passes):
    convert_file("deepspeed.json", batch_size=size, new_replicas=devices, target="new.json")
    text = json.loads((folder / "new.json").read_text())
    assert (text["train_batch_size"], text["gradient_accumulation_steps"]) == (size, passes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--batch-size 64 --replicas 2 --new-replicas 4",
         "8 per device and pass x 2 passes x 4 devices: gradient_accumulation_steps becomes 2"),
        ("--batch-size 64 --replicas 2 --new-replicas 8",
         "8 per device and pass x 1 pass x 8 devices: gradient_accumulation_steps becomes 1"),
        ("--batch-size 64 --replicas 2 --new-replicas 16",
         "4 per device and pass x 1 pass x 16 devices: per_device_train_batch_size becomes 4 and"
         " gradient_accumulation_steps becomes 1"),
        ("--batch-size 64 --replicas 2",
         "8 per device and pass x 4 passes x 2 devices: as it stands"),
    ],
)  # fmt: skip
def test_the_same_batch_on_other_devices_changes_parts_of_the_file_only(
    folder, capsys, options, words
):
    status, out, _ = run(capsys, "arguments.json", *options.split())
    text = " ".join(out.split())
    assert status == 0
    assert "Nothing changes: the global batch is the same (64 examples)." in text
    assert f"Note: In arguments.json the batch of 64 is {words}." in text


def test_more_devices_and_nothing_else_are_a_larger_batch(folder):
    found = convert_file("arguments.json", replicas=2, new_replicas=8)
    assert (found.old_batch_size, found.new_batch_size) == (64, 256)
    assert found.notes[-1].endswith("8 per device and pass x 4 passes x 8 devices: as it stands")
    asked = convert_file("arguments.json", batch_size=256, replicas=2, new_replicas=8)
    assert found == asked


def test_parts_that_cannot_make_the_batch_are_told_but_do_not_refuse(folder):
    found = convert_file("arguments.json", batch_size=65, replicas=2)
    assert found.new_batch_size == 65
    assert "take 64 or 66" in found.notes[-1]


def test_deepspeed_without_a_micro_batch_keeps_its_passes(folder):
    (folder / "parts.json").write_text(
        '{"train_batch_size": 64, "gradient_accumulation_steps": 2,'
        ' "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}'
    )
    found = convert_file("parts.json", batch_size=64, new_replicas=8)
    assert "4 per device and pass x 2 passes x 8 devices: as it stands" in found.notes[-1]
    convert_file("parts.json", batch_size=128, new_replicas=8, target="new.json")
    text = json.loads((folder / "new.json").read_text())
    assert (text["train_batch_size"], text["gradient_accumulation_steps"]) == (128, 2)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (512, {"replicas": 2}, 0.1),  # more passes of as many
        (512, {"replicas": 2, "new_replicas": 4}, 0.1),
        (32, {"replicas": 2}, 1 - 0.9**0.5),  # half as many in one pass
        (33, {"replicas": 2}, 1 - 0.9 ** (33 / 64)),  # what one pass holds is not known
    ],
)
def test_batch_norm_follows_one_devices_pass(folder, size, options, expected):
    (folder / "norm.yaml").write_text(
        "lr: 0.4\nbatch_size: 32\nopt: sgd\nmomentum: 0.9\nsched: cosine\nbn_momentum: 0.1\n"
    )
    found = convert_file("norm.yaml", batch_size=size, **options)
    assert found.recipe.batchnorm_momentum == pytest.approx(expected, rel=1e-12)
    rows = {row.name: row for row in (*found.changes, *found.kept)}
    kept = expected == 0.1
    assert (rows["batchnorm_momentum"].why.startswith("kept: a pass of one device")) == kept


def test_writing_prints_no_line_into_the_json(folder, capsys):
    _, out, _ = run(capsys, "own.toml", "--batch-size", "64", "--write", "new.toml", "--json")
    assert json.loads(out)["recipe"]["batch_size"] == 64
    assert (folder / "new.toml").exists()


def test_it_starts_without_torch_and_scipy(folder):
    code = (
        "import sys\nfrom noisescale.cli import main\n"
        "main(['convert', 'own.toml', '--batch-size', '64', '--json'])\n"
        "heavy = ('torch', 'scipy', 'numpy', 'matplotlib', 'rich', 'jinja2')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_more_data_is_written_and_read_back(folder, capsys):
    status, out, _ = run(capsys, "own.toml", "--new-dataset-size", "100000", "--write", "new.toml")
    assert status == 0
    assert "The data grow from 50,000 to 100,000 examples (x2); the rate stays 0.1." in out
    assert "dataset_size = 100000" in (folder / "new.toml").read_text()
    again = convert_file("new.toml", new_dataset_size=100_000)
    assert again.unchanged
    long_run = convert_file(
        "own.toml", batch_size=1024, new_dataset_size=100_000, data_rule="long-run",
        target="both.toml",
    )  # fmt: skip
    assert (long_run.recipe.lr, long_run.data.rule) == (0.2, "long-run")
    assert convert_file("both.toml", batch_size=1024).recipe == long_run.recipe


@pytest.mark.parametrize(
    ("name", "options"),
    [("arguments.json", {"replicas": 2}), ("deepspeed.json", {}), ("lightning.yaml", {}),
     ("timm.yaml", {"replicas": 2})],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["keep-rate", "long-run"])
def test_other_peoples_files_follow_their_data(folder, name, options, rule):
    new = f"new-{name}"
    there = convert_file(
        name, dataset_size=50_000, new_dataset_size=100_000, data_rule=rule, target=new, **options
    )
    assert there.recipe.dataset_size == 100_000
    again = convert_file(new, dataset_size=100_000, new_dataset_size=100_000, **options)
    assert again.unchanged
    assert again.recipe.lr == there.recipe.lr
    assert again.recipe.weight_decay == there.recipe.weight_decay
    assert again.recipe.batch_size == there.recipe.batch_size


def test_a_scaled_rate_is_kept_with_the_data_and_not_changed(folder):
    kept = convert_file("switched.toml", new_dataset_size=100_000, dataset_size=50_000)
    assert kept.recipe.lr == kept.original.lr
    with pytest.raises(InvalidInputError, match="not scaled again"):
        convert_file(
            "switched.toml", new_dataset_size=100_000, dataset_size=50_000, data_rule="long-run"
        )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("arguments.json --replicas 2 --new-dataset-size 9000", "--dataset-size N"),
        ("own.toml --new-dataset-size 100", "batch_size 256: the data has 100 examples"),
        ("own.toml --new-dataset-size many", "--new-dataset-size"),
        ("own.toml --new-dataset-size 9000 --data-rule late", "data rule 'late'"),
        ("own.toml --batch-size 64 --data-rule long-run", "new data-set size is required"),
        ("own.toml --dataset-size 9 --new-dataset-size 9000", "dataset_size 9 was given"),
    ],
)
def test_bad_data_sizes_are_one_line(folder, capsys, line, words):
    status, out, err = run(capsys, *line.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert words in err


EPOCHS = (
    '{"learning_rate": 2e-5, "per_device_train_batch_size": 16, "num_train_epochs": 3,'
    ' "warmup_ratio": 0.06}'
)


@pytest.mark.parametrize("target", [None, "new.json"])
def test_lengths_that_epochs_make_are_not_called_the_files(folder, target):
    (folder / "epochs.json").write_text(EPOCHS)
    found = convert_file(
        "epochs.json", replicas=8, dataset_size=40_000, new_dataset_size=80_000, target=target
    )
    rows = {row.name: row for row in (*found.changes, *found.kept)}
    assert (rows["total_steps"].new, rows["total_steps"].key) == (1878, None)
    assert rows["warmup_steps"].key is None
    text = " ".join(found.notes)
    assert "total_steps and warmup_steps follow from epochs or ratios of the file" in text
    # 1,875 by the file: its epochs end with a smaller batch, which is not worth a note.
    assert "total_steps follows from other keys" not in text
    assert "warmup_steps follows from other keys of the file: 113, where 57 is meant" in text
    assert text.count("where 57 is meant") == 1


def test_foreseeing_writes_nothing(folder):
    (folder / "epochs.json").write_text(EPOCHS)
    before = sorted(folder.rglob("*"))
    convert_file("epochs.json", replicas=8, dataset_size=40_000, batch_size=256)
    assert sorted(folder.rglob("*")) == before
