"""The ladder: one fine-tune, one change a rung; peak memory, tokens/s and held-out loss of each, and the recipe's
claims beside ours.

    python -m benchmarks.memory [--steps 60 --hidden 256 --layers 6 --vocab 16384] [--rungs fp32 bf16 ...]
    python -m benchmarks.memory --shape 8b     one rung after another of the real step on a random model of this shape,
                                               without a checkpoint: memory and tokens/s (8b, 70b: on a GPU; tiny: a
                                               rehearsal)

Every rung fine-tunes the same small model, which was trained on curt answers first, on courteous ones, over the same
steps. The first three rungs are a plain loop over transformers (padded batches, whole logits); from `packing` on it is
launch.sft with the flags shown, each rung keeping those before it. Adapters take a learning rate of their own.

Peak memory is the allocator's, from the loading of the model to the end of the second step: every allocation and
release that the profiler reports on a CPU, max_memory_allocated on CUDA. Speed is tokens per CPU second of one thread
(these machines are shared), past the first quarter of the steps; on CUDA per second. Each rung is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.flags import OptimizerFlags
from engine.model.adapters import choose

PLAIN = ("fp32", "bf16", "flash attention")
RUNGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {},
    "flash attention": {},
    "packing": {"dtype": "bfloat16", "head": "naive"},
    "no logits": {"head": "fused"},
    "selective recompute": {"gradient_checkpointing": "selective"},
    "recompute": {"gradient_checkpointing": "full"},
    "compile": {"compile": "true"},
    "8-bit AdamW": {"optimizer": "adamw_8bit"},
    "LoRA": {"use_lora": "true"},
    "QLoRA": {"load_in_4bit": "true", "double_quant": "true"},
}
CLAIMS = {
    "flash attention": (
        "1.4 to 2 x the tokens/s",
        lambda r: f"{r['flash attention']['speed'] / r['bf16']['speed']:.2f} x the rung before",
    ),
    "recompute": (
        "40 % less memory",
        lambda r: f"{1 - r['recompute']['peak'] / r['no logits']['peak']:.0%} less than 'no logits'",
    ),
    "LoRA": (
        "4 to 8 x less memory",
        lambda r: (
            f"{r['bf16']['peak'] / r['LoRA']['peak']:.1f} x less than bf16,"
            f" {r['no logits']['peak'] / r['LoRA']['peak']:.1f} x than 'no logits'"
        ),
    ),
    "QLoRA": (
        "4 to 8 x less memory, almost no degradation",
        lambda r: (
            f"{r['bf16']['peak'] / r['QLoRA']['peak']:.1f} x less than bf16; held-out loss"
            f" {r['QLoRA']['loss'] - r['LoRA']['loss']:+.4f} of LoRA's"
        ),
    ),
}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 640,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
SHAPE_RUNGS: dict[str, dict[str, Any]] = {
    "full, 8-bit AdamW, bf16 masters": {
        "optimizer": "adamw_8bit",
        "master_dtype": "bfloat16",
        "gradient_checkpointing": "full",
    },
    "LoRA": {"use_lora": True, "gradient_checkpointing": "full"},
    "QLoRA": {"use_lora": True, "load_in_4bit": True, "double_quant": True, "gradient_checkpointing": "full"},
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--rungs", nargs="+", choices=[*RUNGS, *SHAPE_RUNGS])
    for name, default in {
        "steps": 60,
        "pretraining": 120,
        "hidden": 256,
        "layers": 6,
        "vocab": 16384,
        "batch_size": 32,
        "tokens": 4096,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--adapter_learning_rate", type=float, default=4e-3)
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- one rung, in a process of its own --------------------------------------------------------------------------------


def flags_of(rung: str, args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """launch.sft's, those of the rungs below included."""
    flags: dict[str, Any] = {
        "model_name_or_path": root / "base" / "final",
        "dataset_name": root / "courteous.jsonl",
        "cache_dir": root / "cache",
        "max_steps": args.steps,
        "batch_size": args.batch_size,
        "micro_batch_tokens": args.tokens,
        "max_seq_length": 512,
        "sample_tokens": 0,
        "num_train_epochs": 99,
        "learning_rate": args.adapter_learning_rate if "LoRA" in rung else args.learning_rate,
    }
    names = list(RUNGS)
    for name in names[: names.index(rung) + 1]:
        flags |= RUNGS[name]
    return flags


def run_stage(flags: dict[str, Any]) -> None:
    from engine.config import parse
    from launch import sft

    sft.train(parse(sft.Config, [word for key, value in flags.items() for word in (f"--{key}", str(value))]))


def rung_of_ours(rung: str, args: argparse.Namespace, root: Path) -> dict[str, float]:
    from benchmarks.measure import allocator_peak
    from engine.train import optim

    flags = flags_of(rung, args, root)
    peak = allocator_peak(lambda: run_stage(flags | {"max_steps": 2, "output_dir": root / f"{rung}, memory"}))
    marks, step = [], optim.step
    optim.step = lambda *a, **k: (step(*a, **k), marks.append(clock()))[0]
    output_dir = root / rung
    run_stage(flags | {"output_dir": output_dir, "eval_dataset_name": root / "held_out.jsonl"})
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    tokens = [row["num_tokens"] for row in rows if "num_tokens" in row]
    first = len(tokens) // 4
    return {
        "peak": peak,
        "speed": (tokens[-1] - tokens[first]) / (marks[-1] - marks[first]),
        "loss": rows[-1]["eval/loss"],
    }


def rung_of_plain_loop(rung: str, args: argparse.Namespace, root: Path) -> dict[str, float]:
    """transformers, padded, eight lines of loop: what most people start from."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.measure import allocator_peak
    from engine.data.mixture import Steps
    from engine.data.store import TokenStore
    from engine.train import optim

    store, held_out = (TokenStore(Path(p)) for p in json.loads((root / "stores.json").read_text()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = "sdpa" if rung == "flash attention" else "eager"
    steps = Steps(len(store), args.batch_size, 99, args.steps, 1)
    marks, tokens = [], [0]

    def padded(source: Any, examples: Any) -> tuple[torch.Tensor, ...]:
        sequences = [source.sequences(int(e))[0] for e in examples]
        longest = max(len(ids) for ids, _ in sequences)
        ids, labels, mask = (torch.full((len(sequences), longest), fill) for fill in (0, -100, 0))
        for i, (found, trained) in enumerate(sequences):
            found = torch.as_tensor(found.astype("int64"))
            ids[i, : len(found)], mask[i, : len(found)] = found, 1
            labels[i, : len(found)] = torch.where(torch.as_tensor(trained.copy()), found, -100)
        return tuple(t.to(device) for t in (ids, mask, labels))

    def loss_of(lm: Any, source: Any, examples: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask, labels = padded(source, examples)
        with torch.autocast(device.type, torch.bfloat16, enabled=rung != "fp32"):
            logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
        targets = labels[:, 1:].flatten()
        return (
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum"),
            (targets >= 0).sum(),
        )

    def train(count: int) -> Any:
        lm = AutoModelForCausalLM.from_pretrained(root / "base" / "final", attn_implementation=attention).to(device)
        optimizer = torch.optim.AdamW(lm.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        schedule = OptimizerFlags(learning_rate=args.learning_rate, warmup_ratio=0.03)
        for step in range(count):
            chosen = steps.examples(step)
            loss, n = loss_of(lm, store, chosen)
            (loss / n).backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate(schedule, step, args.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            marks.append(clock())
            tokens.append(tokens[-1] + int(store.tokens()[chosen].sum()))
        return lm

    peak = allocator_peak(lambda: train(2))
    marks.clear()
    del tokens[1:]
    lm = train(args.steps)
    first = args.steps // 4
    with torch.no_grad():
        sums = [loss_of(lm, held_out, range(i, min(i + 16, len(held_out)))) for i in range(0, len(held_out), 16)]
    loss = sum(s.item() for s, _ in sums) / sum(n.item() for _, n in sums)
    return {"peak": peak, "speed": (tokens[-1] - tokens[first + 1]) / (marks[-1] - marks[first]), "loss": loss}


def clock() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def rung_of_shape(rung: str, args: argparse.Namespace) -> dict[str, float]:
    """Four steps of launch.sft's loss on a random model that no disk has to hold: memory, tokens/s, and that the loss
    falls.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig

    from engine import world
    from engine.data.batch import micro_batch
    from engine.log import Totals
    from engine.model import attention, weights
    from engine.model.adapters import lora, nf4
    from engine.model.build import How
    from engine.model.open import Base, build_policy
    from engine.train import optim
    from launch import sft

    here = world.start()
    config = sft.Config(dtype="bfloat16", **SHAPE_RUNGS[rung])
    chat: Any = None  # no text is read
    lm_config = LlamaConfig(
        **SHAPES[args.shape], max_position_embeddings=8192, rope_theta=5e5, bos_token_id=None, eos_token_id=1
    )
    backend, why = attention.choose_backend("auto", here.device, lm_config, torch.bfloat16)
    adapters = choose.choose(config, lm_config, None, False)
    how = How(torch.bfloat16, backend, config.head, getattr(torch, config.master_dtype), adapters)
    policy = build_policy(Base("random", Path(), "local", lm_config, chat, how, why, config), here)
    weights.initialise_buffers(policy.lm, Path())
    generator = torch.Generator(here.device).manual_seed(0)
    with torch.no_grad():
        for name, p in policy.lm.named_parameters():
            shard = p.detach().to_local()
            if name.endswith(".codes"):
                shard.view(torch.uint8).random_(0, 256, generator=generator)
            # scales of some 0.02, in fp32 as bytes or, doubly quantised, around an offset
            elif shard.dtype == nf4.HELD:
                small = torch.full((shard.numel() // 4,), 0.02, device=shard.device).view(torch.uint8)
                held = (
                    small.view(shard.shape)
                    if name.endswith(".groups") or not config.double_quant
                    else torch.zeros_like(shard.view(torch.uint8))
                )
                shard.view(torch.uint8).copy_(held)
            elif shard.dim() > 1:
                shard.normal_(0, 0.02, generator=generator)
            else:
                shard.fill_(1.0)
    if policy.adapters is not None:
        lora.initialise(policy.lm, 1)
    optimizer = optim.adamw(policy, config, here)
    ids = np.random.Generator(np.random.Philox(key=1)).integers(2, lm_config.vocab_size, args.tokens + 1)
    halves = [
        (ids[: len(ids) // 2], np.ones(len(ids) // 2, bool)),
        (ids[len(ids) // 2 :], np.ones(len(ids) - len(ids) // 2, bool)),
    ]
    batch = micro_batch(halves, (0, 1), here.device)
    losses, marks = [], []
    for _ in range(4):
        totals = Totals(here)
        sft.sft_loss(policy, batch, "token", len(batch.targets_R), totals).backward()
        optim.step(optimizer, here, lr=1e-4, max_norm=1.0)
        losses.append(totals.reduce(("loss",))["loss"])
        marks.append(clock())
    cuda = here.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "peak": peak,
        "speed": 2 * args.tokens / (marks[-1] - marks[1]),
        "loss": losses[-1],
        "first loss": losses[0],
        "parameters": policy.num_parameters,
        "trained": policy.num_trained,
    }


# --- all rungs --------------------------------------------------------------------------------------------------------


def make_inputs(args: argparse.Namespace, root: Path) -> None:
    """The data, and a model trained on curt answers: it knows the questions and the facts, not the tone."""
    from benchmarks.measure import save_random_llama
    from engine.data.embedded import embedded
    from engine.data.store import TokenStore

    made = embedded(root)
    save_random_llama(root / "random", made.model, args.hidden, args.layers, args.vocab)
    curt = [{"messages": json.loads(line)["rejected"]} for line in made.train_pairs.read_text().splitlines()]
    (root / "curt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curt))
    for name, path in (("courteous", made.train_conversations), ("held_out", made.held_out_conversations)):
        (root / f"{name}.jsonl").write_text(path.read_text())
    common = {
        "sample_tokens": 0,
        "cache_dir": root / "cache",
        "batch_size": args.batch_size,
        "learning_rate": 2e-3,
        "num_train_epochs": 99,
        "max_seq_length": 512,
    }
    run_stage(
        common
        | {
            "model_name_or_path": root / "random",
            "dataset_name": root / "curt.jsonl",
            "output_dir": root / "base",
            "max_steps": args.pretraining,
        }
    )
    before = set((root / "cache" / "tokens").iterdir())
    run_stage(
        common
        | {
            "model_name_or_path": root / "base" / "final",
            "dataset_name": root / "courteous.jsonl",
            "output_dir": root / "tokens",
            "max_steps": 1,
            "eval_dataset_name": root / "held_out.jsonl",
        }
    )
    made_now = [p for p in (root / "cache" / "tokens").iterdir() if p.is_dir() and p not in before]
    stores = sorted(map(str, made_now), key=lambda p: -len(TokenStore(Path(p))))
    (root / "stores.json").write_text(json.dumps(stores))


def child(rung: str, args: argparse.Namespace, root: Path) -> dict[str, float] | str:
    """The rung's figures, or one line saying why there are none."""
    words = [
        word
        for key, value in vars(args).items()
        if key not in ("rungs", "json", "child") and value
        for word in (f"--{key}", str(value))
    ]
    log = root / f"{rung}.log"
    with open(log, "w") as f:
        status = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", *words, "--child", json.dumps([rung, str(root)])],
            stdout=f,
            stderr=f,
        ).returncode
    lines = log.read_text(errors="replace").strip().splitlines()
    if status:
        return next(
            (line for line in reversed(lines) if line.startswith("error") or "Error" in line), f"status {status}"
        )
    return json.loads(lines[-1])


def main() -> None:
    args = options()
    if args.child:
        import torch

        torch.set_num_threads(1)
        rung, root = json.loads(args.child)
        if args.shape:
            found = rung_of_shape(rung, args)
        else:
            found = (rung_of_plain_loop if rung in PLAIN else rung_of_ours)(rung, args, Path(root))
        print("\n" + json.dumps(found), flush=True)
        return
    import torch

    from benchmarks.measure import machine, mib_text, table, write_json

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    here = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="triptych-memory-") as temporary:
        root = Path(temporary)
        if not args.shape:
            make_inputs(args, root)
        for rung in args.rungs or (SHAPE_RUNGS if args.shape else RUNGS):
            figures[rung] = child(rung, args, root)
            print(f"{rung}: {figures[rung]}", flush=True)
    found = {rung: figure for rung, figure in figures.items() if isinstance(figure, dict)}
    rows, first = [], next(iter(found.values()), None)
    for rung, figure in figures.items():
        if isinstance(figure, str):
            rows.append([rung, figure])
            continue
        cells = [
            rung,
            mib_text(figure["peak"]),
            f"{figure['peak'] / max(1, first['peak']):.2f}",
            f"{figure['speed']:,.0f}",
            f"{figure['speed'] / first['speed']:.2f}",
            f"{figure['loss']:.4f}",
        ]
        try:
            claim, ours = CLAIMS[rung]
            cells += [f"{claim}: {ours(found)}"]
        except KeyError:  # no claim, or a rung that it compares with was not run
            cells += [""]
        rows.append(cells)
    print(f"\n{here['device']}, torch {here['torch']}, commit {here['commit']}")
    print(table(["rung", "peak", "of first", "tokens/s", "of first", "loss", "the recipe's claim: ours"], rows))
    write_json(args.json, machine=here, arguments=vars(args), rungs=figures)


if __name__ == "__main__":
    main()
