"""Small configuration files in the shape of real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from noisescale.formats.recipe_file import RecipeFile, read_recipe

OWN = """\
# the recipe of the base run
optimizer = "sgd"
lr = 0.1          # tuned at 32
momentum = 0.9
weight_decay = 5e-4
batch_size = 32
unit = "examples"
dataset_size = 50_000
total_steps = 10_000
warmup_steps = 500
evaluate_every = 100

[schedule]        # in steps
kind = "step"
milestones = [5000, 7500]
gamma = 0.1
"""

OWN_YAML = """\
# the recipe of the base run
optimizer: adamw
lr: 3e-4          # tuned at 32
betas: [0.9, 0.95]
batch_size: 32
total_examples: 320000
schedule:
  kind: cosine    # to zero
"""

TRANSFORMERS = """\
# fine-tuning
model_name_or_path: some/model
output_dir: out
per_device_train_batch_size: 16   # fits 24 GB
gradient_accumulation_steps: 2
learning_rate: 2.0e-05
lr_scheduler_type: cosine
warmup_steps: 100
max_steps: 1000
adam_beta2: 0.95
eval_strategy: steps
eval_steps: 50
save_steps: 50
bf16: true
"""

DEEPSPEED: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 100,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 0.0005, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0,
            "warmup_max_lr": 0.0005,
            "warmup_num_steps": 10,
            "warmup_type": "linear",
            "total_num_steps": 10000,
        },
    },
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}

LIGHTNING = """\
# lightning.pytorch==2.6
seed_everything: 7
trainer:
  accelerator: gpu
  devices: 4          # one node
  num_nodes: 2
  max_steps: 2000
  accumulate_grad_batches: 2
  gradient_clip_val: 0.5
  callbacks:
  - class_path: lightning.pytorch.callbacks.LearningRateMonitor
  - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
    init_args:
      decay: 0.995
model:
  class_path: my.Model
  init_args:
    width: 64
data:
  class_path: my.Data
  init_args:
    batch_size: 8     # per device
optimizer:
  class_path: torch.optim.SGD
  init_args:
    lr: 0.1
    momentum: 0.9
    nesterov: true
"""

TIMM = """\
aa: null
batch_size: 128
bn_momentum: null
clip_grad: null
clip_mode: norm
decay_epochs: 90
epochs: 90
grad_accum_steps: 1
lr: 0.4
lr_base: 0.1
lr_base_scale: ''
lr_base_size: 256
model: resnet50
model_ema: true
model_ema_decay: 0.9998
momentum: 0.9
opt: momentum
opt_betas: null
opt_eps: null
sched: cosine
warmup_epochs: 5
weight_decay: 2.0e-05
world_size: 8
"""


def written(folder: Path, name: str, content: str | dict[str, Any]) -> Path:
    """Write a file; a table as JSON with an indentation of four."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=4) + "\n")
    return path


def changed(table: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return a nested table with dotted keys (``__`` for the dot) set; None removes one."""
    copy = json.loads(json.dumps(table))
    for key, value in values.items():
        *above, last = key.split("__")
        at = copy
        for part in above:
            at = at.setdefault(part, {})
        if value is None:
            at.pop(last, None)
        else:
            at[last] = value
    return copy


def read(folder: Path, content: str | dict[str, Any], **options: Any) -> RecipeFile:
    """Write a text as YAML or a table as JSON, and read it."""
    name = "c.yaml" if isinstance(content, str) else "c.json"
    return read_recipe(written(folder, name, content), **options)


def notes(file: RecipeFile) -> str:
    """All that the reader of a file notes."""
    return "\n".join(file.notes)
