"""What ghost batch norm costs beside nn.BatchNorm and beside separate calls per ghost batch.

    python benchmarks/ghost_batch_norm.py [--threads 1] [--rounds 40] [--out FILE.json]

Forward and backward of the layer alone, for shapes of dense and convolutional networks, and of a
whole training step of a small network. All are timed in turn, round by round; a ratio is the
median over the rounds of the ratios within a round. No bound is set: the batch is copied into
another order and back, which is memory traffic that plain batch norm does not have.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from rounds_in_turn import Step, in_turn
from torch import Tensor, nn

from noisescale.train import GhostBatchNorm1d, GhostBatchNorm2d, convert_ghost_batch_norm

CASES = [
    ((512, 64), 32, False),
    ((4096, 512), 128, False),
    ((1024, 64), 8, False),
    ((128, 32, 16, 16), 32, False),
    ((128, 32, 16, 16), 32, True),
    ((256, 16, 8, 8), 8, False),
    ((256, 16, 8, 8), 8, True),
]


class Separate(nn.Module):
    """The loop that ghost batch norm replaces."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, batch: Tensor) -> Tensor:
        """Normalise each part by itself."""
        return torch.cat([self.layer(part) for part in batch.split(self.size)])


def layer_step(layer: nn.Module, shape: tuple[int, ...], last: bool) -> Step:
    """Forward and backward of one layer."""
    form = torch.channels_last if last else torch.contiguous_format
    batch = torch.randn(shape).contiguous(memory_format=form).requires_grad_()
    up = torch.randn(shape).contiguous(memory_format=form)
    inputs = (batch, *layer.parameters())
    return lambda: torch.autograd.grad(layer(batch), inputs, up)


def network_step(size: int | None) -> Step:
    """One training step of a small convolutional network on 128 images."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    model = model if size is None else convert_ghost_batch_norm(model, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.randn(128, 3, 16, 16), torch.randint(10, (128,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def compare(title: str, steps: dict[str, Step], rounds: int) -> dict[str, object]:
    """Ratios to the plain step."""
    times = in_turn(steps, rounds)
    plain = times["plain"]
    row: dict[str, object] = {"case": title, "plain_ms": statistics.median(plain)}
    for name in steps.keys() - {"plain"}:
        pairs = zip(times[name], plain, strict=True)
        row[name] = statistics.median(ours / theirs for ours, theirs in pairs)
    separate = f"{row['separate']:6.2f}" if "separate" in row else ""
    print(f"{title:44} {row['plain_ms']:8.2f} ms  ghost {row['ghost']:5.2f}  separate {separate}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/ghost_batch_norm.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for shape, size, last in CASES:
        ghost = GhostBatchNorm1d if len(shape) == 2 else GhostBatchNorm2d
        plain = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
        channels = shape[1]
        steps = {
            "plain": layer_step(plain(channels), shape, last),
            "ghost": layer_step(ghost(channels, size), shape, last),
            "separate": layer_step(Separate(plain(channels), size), shape, last),
        }
        title = f"{shape} in {size}{', channels last' * last}"
        rows.append(compare(title, steps, arguments.rounds))
    network = {"plain": network_step(None), "ghost": network_step(32)}
    rows.append(compare("training step of a small network, in 32", network, arguments.rounds))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"threads": arguments.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
