"""What each denominator does to the weight of a token: one screen.            python -m benchmarks.accumulation

Eight conversations of very different lengths make one optimizer step, laid out as 1 micro-batch of 8, 8 of 1, and
packed by token budget. The table gives the weight of a token of the shortest and of the longest conversation in dL/dCE,
relative to 1 / (all tokens), and, from a real model, how far the gradient of each layout is from that of the first.
Ours do not move; the naive mean of micro-batch means, the field's bug, does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from engine import world
from engine.data.batch import micro_batch
from engine.data.embedded import embedded
from engine.data.packing import pack
from engine.model import build
from engine.model.build import How
from losses.sft import REDUCTIONS, denominator, sft, token_weights

NAIVE = "naive mean of means"
LENGTHS = (3, 5, 8, 12, 30, 60, 120, 240)


def layouts() -> dict[str, list[list[int]]]:
    packed = [b for b in pack([length + 4 for length in LENGTHS], 260, 1)[0] if b]
    return {"1 x 8": [list(range(8))], "8 x 1": [[i] for i in range(8)], f"packed in {len(packed)}": packed}


def gradient(policy, sequences, layout, reduce: str) -> torch.Tensor:
    policy.zero_grad()
    total = sum(LENGTHS)
    for members in layout:
        batch = micro_batch([sequences[i] for i in members], members, torch.device("cpu"))
        tokens = sum(LENGTHS[i] for i in members)
        if reduce == NAIVE:
            policy.loss(batch, lambda lp, _, tokens=tokens: -lp.sum() / tokens / len(layout)).backward()
        else:
            weights_R, n = token_weights(batch.counts_S, reduce), denominator(total, len(LENGTHS), reduce)
            policy.loss(batch, lambda lp, rows, w=weights_R, n=n: sft(lp, w[rows]) / n).backward()
    return torch.cat([p.grad.full_tensor().flatten().double() for p in policy.parameters()])


def weight(i: int, layout, reduce: str) -> float:
    """dL/dCE of a token of conversation i, times the number of tokens of the step."""
    total = sum(LENGTHS)
    if reduce == NAIVE:
        members = next(m for m in layout if i in m)
        return total / sum(LENGTHS[j] for j in members) / len(layout)
    one = token_weights(torch.tensor([LENGTHS[i]]), reduce)[0].item()
    return total * one / denominator(total, len(LENGTHS), reduce)


def main() -> None:
    torch.set_num_threads(1)
    here = world.start()
    with tempfile.TemporaryDirectory() as root:
        source = embedded(Path(root)).model
        policy = build.load_policy(source, build.load_config(source), here, How(torch.float32, "sdpa"))
    generator = np.random.Generator(np.random.Philox(key=0))
    sequences = [(generator.integers(2, 500, n + 5), np.arange(n + 5) >= 5) for n in LENGTHS]
    print(f"8 conversations of {', '.join(map(str, LENGTHS))} trained tokens\n")
    print(f"{'':36}{'weight of a token':^34}{'gradient against':>18}")
    print(f"{'--reduce_loss':<22}{'layout':<14}{'shortest':>12}{'longest':>12}{'ratio':>10}{'the first layout':>18}")
    for reduce in (*REDUCTIONS, NAIVE):
        first = None
        for name, layout in layouts().items():
            g = gradient(policy, sequences, layout, reduce)
            first = g if first is None else first
            short, long = weight(0, layout, reduce), weight(len(LENGTHS) - 1, layout, reduce)
            label, off = reduce if first is g else "", (g - first).norm() / first.norm()
            print(f"{label:<22}{name:<14}{short:>12.3f}{long:>12.3f}{short / long:>10.2f}{off:>18.1e}")


if __name__ == "__main__":
    main()
