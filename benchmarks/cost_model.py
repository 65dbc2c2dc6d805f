"""Which form of a layer's squared norms is cheapest, and how well the rules choose.

    python benchmarks/cost_model.py [--out benchmarks/out/cost_model.json]

Linear weights used at t positions: the product of o x i itself, or t x t Gram matrices.
Convolutions: shifted products, unfolded patches, or one call of torch's own weight gradient with
the examples as groups. Every form is timed in turn, the best of
several rounds is kept. Printed per layer: the times, what the rule chose, and its regret (time of
the choice over the time of the best). At the end the thresholds that would have the least mean
regret, beside those in use.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from noisescale.measure.rules import convolution, parts

EXAMPLES = 32
LINEAR = [
    (t, o, i)
    for t in (2, 8, 32, 64, 128, 256)
    for o, i in ((16, 64), (64, 64), (128, 128), (512, 128), (256, 1024))
]
CONVOLUTIONS = [
    (channels_in, channels_out, side)
    for channels_in, channels_out in ((1, 16), (2, 16), (3, 16), (4, 8), (16, 16), (64, 64))
    for side in (2, 4, 6, 8, 16, 28)
] + [
    # First layers of image models, added later: a few channels into many. 7 is a stem of stride 2.
    (channels_in, channels_out, side, kernel)
    for channels_in, channels_out in ((1, 32), (3, 32), (3, 64), (4, 64), (8, 64), (64, 3))
    for side, kernel in ((16, 3), (32, 3), (64, 7))
]


def best(functions: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Milliseconds of each, the least of several rounds taken in turn."""
    times = dict.fromkeys(functions, math.inf)
    for _ in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name] = min(times[name], 1e3 * (time.perf_counter() - began))
    return times


def linear(t: int, o: int, i: int) -> dict[str, object]:
    """One linear layer, whose own choice depends on its shape alone."""
    left, right = torch.randn(EXAMPLES, t, o), torch.randn(EXAMPLES, t, i)
    times = best(
        {
            "product": lambda: parts.product_form(left, right),
            "gram": lambda: parts.gram_form(left, right),
        }
    )
    chosen = "product" if parts.forms_products(t, o, i) else "gram"
    # Operations of the Gram form over those of the product.
    return {"layer": f"linear t {t}, {o} x {i}", "ratio": t * (o + i) / (o * i)} | judged(
        times, chosen
    )


def convolved(channels_in: int, channels_out: int, side: int, kernel: int = 3) -> dict[str, object]:
    """One convolution with padding; of stride 2 where the kernel is large."""
    stride = 2 if kernel > 3 else 1
    layer = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2)
    x = torch.randn(EXAMPLES, channels_in, side, side)
    g = torch.randn(EXAMPLES, channels_out, side // stride, side // stride)

    def groups() -> object:
        part = convolution.weight_part(layer, g, x, shift=True)
        return parts.square_sum([replace(part, whole=True)], layer.weight.shape)

    def form(shifted: bool) -> object:
        step = EXAMPLES if shifted else convolution.unfolded_step(layer, g)
        sums = []
        for k in range(0, EXAMPLES, step):
            part = convolution.weight_part(layer, g[k : k + step], x[k : k + step], shift=shifted)
            sums.append(parts.square_sum([part], layer.weight.shape))
        return sums

    with torch.no_grad():
        times = best(
            {"shifted": lambda: form(True), "unfolded": lambda: form(False), "groups": groups}
        )
        positions = (side // stride) ** 2
        chosen = "shifted" if convolution.shifted(layer, positions) else "unfolded"
        chosen = "groups" if convolution.whole(layer, g, x) else chosen
    name = f"conv {kernel}x{kernel} {channels_in}-{channels_out} at {side}x{side}"
    return {
        "layer": name,
        "channels": min(channels_in, channels_out),
        "positions": positions,
    } | judged(times, chosen)


def judged(times: dict[str, float], chosen: str) -> dict[str, object]:
    """Add the choice and what it costs."""
    return {"times": times, "chosen": chosen, "regret": times[chosen] / min(times.values())}


def mean_regret(rows: list[dict], choose: Callable[[dict], str]) -> float:
    """Geometric mean of the regret under another rule."""
    logs = [math.log(r["times"][choose(r)] / min(r["times"].values())) for r in rows]
    return math.exp(sum(logs) / len(logs))


def show(rows: list[dict]) -> None:
    """Print one family of layers."""
    for row in rows:
        times = "  ".join(f"{name} {ms:8.3f} ms" for name, ms in row["times"].items())
        print(f"{row['layer']:32}{times}  {row['chosen']:9}{row['regret']:6.2f}")


def main() -> None:
    """Time everything, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/cost_model.json"))
    arguments = parser.parse_args()
    rows = [linear(*shape) for shape in LINEAR]
    show(rows)
    print(f"in use: mean regret {mean_regret(rows, lambda r: r['chosen']):.3f}")
    for limit in (0.5, 0.7, 1.0, 1.4, 2.0, 3.0):
        regret = mean_regret(rows, lambda r, c=limit: "product" if r["ratio"] >= c else "gram")
        print(f"products where the Gram form has {limit:.1f} times their operations: {regret:.3f}")
    images = [convolved(*shape) for shape in CONVOLUTIONS]
    show(images)
    print(f"in use: mean regret {mean_regret(images, lambda r: r['chosen']):.3f}")
    for channels in (1, 2, 3, 4, 8):
        for positions in (1, 16, 32, 64, 128):
            regret = mean_regret(
                images,
                lambda r, c=channels, p=positions: (
                    "shifted" if r["channels"] >= c and r["positions"] >= p else "unfolded"
                ),
            )
            print(f"shifted from {channels} channels and {positions} positions: {regret:.3f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"linear": rows, "convolutions": images}, indent=1))


if __name__ == "__main__":
    main()
