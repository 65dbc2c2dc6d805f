"""What LARS and LAMB cost beside torch's SGD and AdamW.

    python benchmarks/large_batch_optimizers.py [--threads 1] [--rounds 60] [--out FILE.json]

Bounds, fixed before the first run: on 5 million parameters (a transformer's shapes) a step of
LARS costs at most 2.2 times one of SGD with momentum, one of LAMB at most 1.8 times one of AdamW,
both foreach; a whole training step of a GPT costs at most 1.05 times that with SGD or AdamW. The
baselines have the same settings: with decay and without. All are timed in turn, round by round;
the ratio is the median over the rounds of the ratios within a round. The per-example optimizers,
torch's fused AdamW and, where it is installed, pytorch_optimizer are shown beside, without a
bound. Every size of chunk that LARS and LAMB might use on the processor is timed last.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from overhead_models import Gpt
from rounds_in_turn import Step, in_turn
from torch import nn

from noisescale.train import LAMB, LARS, PerExampleAdamW, PerExampleSGD
from noisescale.train.layerwise import CHUNK_ELEMENTS

SEQUENCES, LENGTH, TOKENS = 32, 64, 96
WIDTH, BLOCKS = 256, 6
BOUND = {"lars": 2.2, "lamb": 1.8, "gpt": 1.05}
SGD = {"lr": 0.1, "momentum": 0.9}
DECAY = {"weight_decay": 1e-4}


def weights() -> list[nn.Parameter]:
    """5 million weights as six transformer blocks of width 256 and a table have them."""
    generator = torch.Generator().manual_seed(0)
    wide, square, vector = (4 * WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,)
    block = [(3 * WIDTH, WIDTH), (3 * WIDTH,), square, vector, wide, (4 * WIDTH,)]
    block += [(WIDTH, 4 * WIDTH), vector, vector, vector, vector, vector]
    shapes = [*block * BLOCKS, (1000, WIDTH)]
    made = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for weight in made:
        weight.grad = 1e-3 * torch.randn(weight.shape, generator=generator)
    return made


def optimizer_steps() -> dict[str, Step]:
    """The bare optimizer steps, each with weights of its own."""
    made: dict[str, torch.optim.Optimizer] = {
        "sgd": torch.optim.SGD(weights(), foreach=True, **SGD),
        "sgd decay": torch.optim.SGD(weights(), foreach=True, **SGD, **DECAY),
        "lars": LARS(weights(), **SGD),
        "lars decay": LARS(weights(), **SGD, **DECAY),
        "lars decay nesterov": LARS(weights(), nesterov=True, **SGD, **DECAY),
        "adamw no decay": torch.optim.AdamW(weights(), foreach=True, weight_decay=0.0),
        "adamw": torch.optim.AdamW(weights(), foreach=True),
        "adamw fused": torch.optim.AdamW(weights(), fused=True),
        "lamb no decay": LAMB(weights(), weight_decay=0.0),
        "lamb": LAMB(weights()),
        "per-example sgd": PerExampleSGD(weights(), 1e-3, momentum_half_life=200, batch_size=32),
        "per-example adamw": PerExampleAdamW(
            weights(), 1e-4, half_lives=(200, 20_000), weight_shrinkage=1e-6, batch_size=32
        ),
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        made["pytorch_optimizer lars decay"] = pytorch_optimizer.LARS(weights(), **SGD, **DECAY)
        made["pytorch_optimizer lamb"] = pytorch_optimizer.Lamb(weights(), weight_decay=0.01)
    return {name: optimizer.step for name, optimizer in made.items()}


def gpt_steps() -> dict[str, Step]:
    """Whole training steps of a GPT with 0.8 million weights on 32 sequences of 64 tokens."""
    kinds = {
        "gpt sgd": lambda p: torch.optim.SGD(p, foreach=True, **SGD),
        "gpt lars": lambda p: LARS(p, **SGD),
        "gpt adamw": lambda p: torch.optim.AdamW(p, foreach=True),
        "gpt lamb": LAMB,
    }
    return {name: gpt_step(make) for name, make in kinds.items()}


def gpt_step(make: Callable[[object], torch.optim.Optimizer]) -> Step:
    """One training step with the optimizer that ``make`` gives."""
    torch.manual_seed(0)
    model = Gpt()
    optimizer = make(model.parameters())
    tokens = torch.randint(TOKENS, (SEQUENCES, LENGTH + 1))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).flatten(0, 1)
        nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        optimizer.step()

    return step


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    """The median over rounds of the ratio within a round."""
    pairs = zip(times[ours], times[theirs], strict=True)
    return statistics.median(one / other for one, other in pairs)


def judge(times: dict[str, list[float]]) -> list[dict[str, object]]:
    """Ratios beside their bounds."""
    rows = []
    for ours, theirs, bound in (
        ("lars", "sgd", BOUND["lars"]),
        ("lars decay", "sgd decay", BOUND["lars"]),
        ("lars decay nesterov", "sgd decay", None),
        ("lamb no decay", "adamw no decay", BOUND["lamb"]),
        ("lamb", "adamw", BOUND["lamb"]),
        ("lamb", "adamw fused", None),
        ("per-example sgd", "sgd", None),
        ("per-example adamw", "adamw", None),
        ("pytorch_optimizer lars decay", "sgd decay", None),
        ("pytorch_optimizer lamb", "adamw", None),
        ("gpt lars", "gpt sgd", BOUND["gpt"]),
        ("gpt lamb", "gpt adamw", BOUND["gpt"]),
    ):
        if ours in times:
            found = ratio(times, ours, theirs)
            verdict = "" if bound is None else "MET" if found <= bound else "MISSED"
            rows.append({"row": f"{ours} / {theirs}", "ratio": found, "bound": bound})
            limit = "" if bound is None else f"at most {bound}"
            print(f"{ours + ' / ' + theirs:46} {found:6.2f}  {limit:13} {verdict}")
    return rows


def chunk_sizes(rounds: int) -> dict[str, float]:
    """Milliseconds of both optimizers for each size of chunk."""
    found = {}
    for power in (14, 16, 17, 18, 19, 20, 24):
        CHUNK_ELEMENTS["cpu"] = 2**power
        steps = {"lars": LARS(weights(), **SGD, **DECAY).step, "lamb": LAMB(weights()).step}
        for name, times in in_turn(steps, rounds).items():
            found[f"{name} 2^{power}"] = statistics.median(times)
    for name in ("lars", "lamb"):
        shown = [f"{key.split()[1]}: {ms:.1f}" for key, ms in found.items() if name in key]
        print(f"{name}, ms by elements per chunk: {', '.join(shown)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/large_batch.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    times = in_turn(optimizer_steps(), arguments.rounds) | in_turn(gpt_steps(), arguments.rounds)
    rows = judge(times)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("milliseconds:", ", ".join(f"{name} {ms:.1f}" for name, ms in medians.items()))
    chunks = chunk_sizes(max(5, arguments.rounds // 4))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"rows": rows, "ms": medians, "chunks": chunks}, indent=1))


if __name__ == "__main__":
    main()
