"""Weights from the sharded policy to the sampler: in buckets, beside one gather a parameter.

    python -m benchmarks.handover [--ranks 2] [--layers 16] [--hidden 512] [--vocab 32000] [--lora 0] [--turns 7]
    torchrun --nproc_per_node 8 -m benchmarks.handover --hidden 4096 --layers 32 --vocab 128256

Every rank holds a shard of fp32 masters of a Llama of random weights, or with --lora a frozen bf16 model and adapters
of that rank; the sampler computes in bf16. The two ways take turns in one run, and give the same weights to the bit.
Printed: collectives of a hand-over, the buffers that it takes, wall-clock seconds (median, half the interquartile range
over it), CPU seconds of all ranks, and the sampler's bytes over the wall clock; on CUDA beside the data sheet's figure
of the link (`engine/hardware.py`), of which a rank takes (N - 1) / N of the bytes over it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from benchmarks.measure import median, spread
from engine import hardware, world
from engine.model import build
from engine.model.adapters import lora
from engine.model.adapters.lora import Adapters
from engine.model.build import How
from engine.model.shards import local
from engine.world import World
from rollout import handover


def one_by_one(target: Any, source: Any, here: World) -> None:
    """The plain way: every parameter merged, cast, gathered and cut to its rows by itself."""
    theirs = lora.dense(source)
    for name, p in target.named_parameters():
        shard = theirs[name][1]()
        if not isinstance(shard, DTensor) or here.size == 1:
            p.copy_(local(shard))
            continue
        per_rank = -(-p.shape[0] // here.size)
        padded = p.new_zeros(per_rank, *p.shape[1:])
        padded[: len(shard.to_local())] = shard.to_local()
        whole = p.new_empty(per_rank * here.size, *p.shape[1:])
        handover.all_gather(whole, padded, group=here.mesh.get_group())
        p.copy_(whole[: p.shape[0]])


def made(args: argparse.Namespace, here: World) -> Any:
    """The policy, its shards filled."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=7 * args.hidden // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 128),
        num_key_value_heads=max(1, args.hidden // 512),
        vocab_size=args.vocab,
    )
    adapters = None
    if args.lora:
        blocks = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
        names = [f"{block}.{leaf}_proj" for block, leaves in blocks.items() for leaf in leaves]
        modules = tuple(f"model.layers.{i}.{name}" for i in range(args.layers) for name in names)
        adapters = Adapters(args.lora, 2.0 * args.lora, False, modules, 0)
    policy = build.build_policy(config, here, How(torch.bfloat16, "sdpa", adapters=adapters))
    for p in policy.parameters():
        local(p).detach().normal_(0, 0.02)
    return policy


def measure(args: argparse.Namespace) -> None:
    """On this rank, of however many there are."""
    here = world.start()
    if here.device.type == "cpu":
        torch.set_num_threads(1)
    policy = made(args, here)
    target: Any = handover.skeleton(policy.lm.config, "sdpa", torch.bfloat16, here.device)
    count, largest = 0, 0
    gather = handover.all_gather

    def counted(output: torch.Tensor, mine: torch.Tensor, **options: Any) -> Any:
        nonlocal count, largest
        count, largest = count + 1, max(largest, output.nbytes + mine.nbytes)
        return gather(output, mine, **options)

    def lone() -> None:
        with torch.no_grad():
            one_by_one(target, policy.lm, here)

    ways: dict[str, Callable[[], None]] = {
        "in buckets": lambda: handover.load(target, policy.lm, here),
        "one by one": lone,
    }
    handover.all_gather = counted
    seen = {}
    for name, way in ways.items():  # a warm-up, whose collectives are counted, and whose weights are kept
        count = largest = 0
        way()
        weights = [p.clone() for p in target.parameters()]
        seen[name] = (count, largest, weights)
    assert all(torch.equal(a, b) for a, b in zip(seen["in buckets"][2], seen["one by one"][2], strict=True))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.turns):
        for name, way in ways.items():
            seconds[name].append(_timed(way, here))
    _print(args, here, sum(p.nbytes for p in target.parameters()), seen, seconds)


def _timed(way: Callable[[], None], here: World) -> tuple[float, float]:
    """Wall-clock seconds of the slowest rank, CPU seconds of all."""
    here.barrier()
    if here.device.type == "cuda":
        torch.cuda.synchronize()
    cpu, start = time.process_time(), time.perf_counter()
    way()
    if here.device.type == "cuda":
        torch.cuda.synchronize()
    took = here.gather((time.perf_counter() - start, time.process_time() - cpu))
    return max(wall for wall, _ in took), sum(cpu for _, cpu in took)


def _print(args: argparse.Namespace, here: World, size: int, seen: dict, seconds: dict) -> None:
    if not here.is_main:
        return
    lora_of = f", LoRA of rank {args.lora}" if args.lora else ""
    print(f"{size / 1e6:,.0f} MB of bf16 weights on {here.size} ranks ({here.device.type}){lora_of}\n")
    print(f"{'':12}{'collectives':>12}{'largest':>12}{'wall clock':>20}{'CPU seconds':>13}{'GB/s':>8}")
    rates = {}
    for name, times in seconds.items():
        wall, cpu = [w for w, _ in times], [c for _, c in times]
        rates[name] = size / median(wall) / 1e9
        count, largest, _ = seen[name]
        took = f"{1e3 * median(wall):,.0f} ms ± {100 * spread(wall):.0f} %"
        print(f"{name:12}{count:>12}{largest / 2**20:>8.1f} MiB{took:>20}{median(cpu):>13.2f}{rates[name]:>8.2f}")
    if here.device.type == "cuda" and (card := hardware.of_gpu(here.device)) and here.size > 1:
        over = rates["in buckets"] * (here.size - 1) / here.size
        print(f"\nthe link of {card.name}: {card.link / 1e9:,.0f} GB/s each way; over it went {over:,.1f}")
    if args.lora:
        print("\nin buckets: after the first time, merged layers alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="0: the ranks that torchrun started")
    for name, default in (("layers", 16), ("hidden", 512), ("vocab", 32000), ("lora", 0), ("turns", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if dist.is_torchelastic_launched() or not args.ranks:
        measure(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
    sys.exit(subprocess.run([*launcher, "-m", "benchmarks.handover", *sys.argv[1:]], check=False).returncode)


if __name__ == "__main__":
    main()
