"""The rollout engine beside transformers.generate, on the same random model and prompts, taking turns in one run.
                                                                                           python -m benchmarks.rollout
                                                                                           --help

    equal      every response has --response tokens
    mixed      log-normal lengths of mean --response (--sigma of the log, cut at 16 means), the same for all candidates

Lengths are forced (a random model has no reason to stop): per request for ours and for continuous batching; for
generate by a stopping criterion per row, and a batch then runs until its longest row is done, as in every loop around
generate. generate gets left-padded batches of --slots rows in the order of the requests; ours has as many slots, and
unless --sorted starts requests in that order too. All sample at temperature 1 from the whole vocabulary; ours also
computes both log-probs. Each candidate is warmed up once, then they take turns; the median of --repeats counts. Seconds
are the process's CPU seconds on a CPU (these machines are shared), wall clock on CUDA.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria
from transformers.generation import ContinuousBatchingConfig

from engine import world
from engine.model import Policy
from engine.world import World
from rollout import Request, Sampler, SamplingParams

CUT = 16  # longest response, in means
PAGE = 32  # tokens of a page of the library's continuous batching on a CPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    shapes = {
        "hidden": 256,
        "layers": 6,
        "heads": 8,
        "kv_heads": 2,
        "vocab": 32000,
        "requests": 128,
        "samples": 8,
        "slots": 64,
        "prompt": 200,
        "response": 32,
        "repeats": 3,
    }
    for name, default in shapes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the log of mixed lengths (default: 1.0)")
    parser.add_argument("--sorted", action="store_true", help="ours knows the lengths and starts the longest first")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=None, help="float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument(
        "--only", nargs="+", default=None, metavar="NAME", help="of: " + ", ".join(f"'{name}'" for name in CANDIDATES)
    )
    parser.add_argument("--lengths", nargs="+", choices=("equal", "mixed"), default=["equal", "mixed"])
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args(argv)


def make_model(args: argparse.Namespace, here: World, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        max_position_embeddings=65536,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().to(here.device, dtype)


def make_requests(args: argparse.Namespace, mixed: bool) -> list[Request]:
    """--requests responses to prompts of --prompt tokens give or take a half, --samples to each."""
    generator = np.random.Generator(np.random.Philox(key=0))
    prompts = [
        generator.integers(1, args.vocab, int(n))
        for n in generator.integers(args.prompt // 2, args.prompt * 3 // 2 + 1, -(-args.requests // args.samples))
    ]
    lengths = np.full(args.requests, args.response)
    if mixed:
        drawn = args.response * np.exp(args.sigma * generator.standard_normal(args.requests) - args.sigma**2 / 2)
        lengths = np.clip(np.rint(drawn), 1, CUT * args.response).astype(int)
    return [
        Request(
            prompts[i // args.samples], i // args.samples, i % args.samples, int(n), float(n) if args.sorted else None
        )
        for i, n in enumerate(lengths)
    ]


# --- candidates: requests -> tokens made ------------------------------------------------------------------------------


def ours(lm: nn.Module, args: argparse.Namespace, here: World) -> Callable[[list[Request]], int]:
    policy = Policy(lm, "fused")
    samplers: dict[int, Sampler] = {}  # by max_length

    def run(requests: list[Request]) -> int:
        longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
        if longest not in samplers:
            samplers[longest] = Sampler(lm.config, policy, here, dtype=lm.dtype, max_length=longest, slots=args.slots)
        samplers[longest].load(policy)  # every time, as in training; it also forgets the prompts of the run before
        return sum(len(r.response_ids) for r in samplers[longest].generate(requests, SamplingParams(), seed=0, step=0))

    return run


class _Limits(StoppingCriteria):
    """Done, row by row, when the row has as many tokens as it should."""

    def __init__(self, prompt: int, limits: list[int], device: torch.device) -> None:
        self.ends = torch.tensor(limits, device=device) + prompt

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


def generate(lm: nn.Module, args: argparse.Namespace, here: World, **how) -> Callable[[list[Request]], int]:
    def batch(requests: list[Request]) -> int:
        width = max(len(r.prompt_ids) for r in requests)
        ids_BL = torch.zeros(len(requests), width, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for row, r in enumerate(requests):
            ids_BL[row, width - len(r.prompt_ids) :] = torch.as_tensor(r.prompt_ids)
            mask_BL[row, width - len(r.prompt_ids) :] = 1
        limits = [r.max_new_tokens for r in requests]
        config = GenerationConfig(
            max_new_tokens=max(limits), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, **how
        )
        stop = [] if len(set(limits)) == 1 else [_Limits(width, limits, here.device)]
        out = lm.generate(
            ids_BL.to(here.device),
            attention_mask=mask_BL.to(here.device),
            generation_config=config,
            stopping_criteria=stop,
        )
        assert out.shape == (len(requests), width + max(limits)), out.shape
        return sum(limits)

    return lambda requests: sum(batch(requests[i : i + args.slots]) for i in range(0, len(requests), args.slots))


def continuous(lm: nn.Module, args: argparse.Namespace, here: World) -> Callable[[list[Request]], int]:
    """On CUDA as it chooses for itself; on a CPU its own choice is made for a GPU's memory, and seven times slower than
    this one.
    """

    def run(requests: list[Request]) -> int:
        how = {"warmup": here.device.type == "cuda"}  # warming up captures CUDA graphs
        if here.device.type == "cpu":
            pages = args.slots * -(-max(len(r.prompt_ids) + r.max_new_tokens for r in requests) // PAGE)
            how["continuous_batching_config"] = ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=pages,
                max_batch_tokens=512,
                max_requests_per_batch=args.slots,
                use_async_batching=False,
            )
        config = GenerationConfig(
            max_new_tokens=max(r.max_new_tokens for r in requests),
            do_sample=True,
            eos_token_id=-1,
            pad_token_id=0,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
        )
        made = 0
        with lm.continuous_batching_context_manager(generation_config=config, block=True, timeout=60, **how) as manager:
            for r in requests:
                manager.add_request(r.prompt_ids.tolist(), max_new_tokens=r.max_new_tokens)
            for _ in requests:
                while not ((result := manager.get_result(timeout=1)) and result.is_finished()):
                    if not manager.is_running():
                        raise RuntimeError("its thread died")
                made += len(result.generated_tokens)
        return made

    return run


CANDIDATES: dict[str, Callable] = {
    "ours": ours,
    "generate": generate,
    "generate, static cache": lambda *a: generate(
        *a, cache_implementation="static", disable_compile=a[2].device.type == "cpu"
    ),
    "generate, continuous batching": continuous,
}


def measure(args: argparse.Namespace, here: World, dtype: torch.dtype, lengths: str) -> dict[str, dict]:
    """{candidate: {"seconds": [...], "tokens": n}, or {"error": why}}; every candidate its own copy of one model."""
    requests = make_requests(args, lengths == "mixed")
    expected = sum(r.max_new_tokens for r in requests)
    warm = [Request(r.prompt_ids, r.example, r.sample, 2) for r in requests[: args.slots]]
    runs, results = {}, {}
    for name in args.only or CANDIDATES:
        try:
            runs[name] = CANDIDATES[name](make_model(args, here, dtype), args, here)
            runs[name](warm)
            results[name] = {"seconds": [], "tokens": expected}
        except Exception as error:  # a peer may fail in any way, and the others must still be measured
            results[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    for _ in range(args.repeats):
        for name, result in results.items():
            if "error" in result:
                continue
            start = _seconds(here)
            made = runs[name](requests)
            result["seconds"].append(_seconds(here) - start)
            if made != expected:
                results[name] = {"error": f"made {made} tokens, not {expected}"}
    return results


def _seconds(here: World) -> float:
    if here.device.type == "cuda":
        torch.cuda.synchronize(here.device)
        return time.perf_counter()
    return time.process_time()


def table(results: dict[str, dict], unit: str) -> list[str]:
    rates = {name: r["tokens"] / statistics.median(r["seconds"]) for name, r in results.items() if r.get("seconds")}
    lines = [f"  {'':30} {'tokens/' + unit:>14} {'seconds':>18} {'ours / this':>12}"]
    for name, result in results.items():
        if name not in rates:
            lines.append(f"  {name:30} {result['error']}")
            continue
        low, high = min(result["seconds"]), max(result["seconds"])
        ratio = f"{rates['ours'] / rates[name]:.2f}" if "ours" in rates else ""
        lines.append(f"  {name:30} {rates[name]:14.0f} {f'{low:.2f} .. {high:.2f}':>18} {ratio:>12}")
    return lines


def main() -> None:
    args = options()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    here = world.start()
    dtype = DTYPES[args.dtype or ("bfloat16" if here.device.type == "cuda" else "float32")]
    unit = "s" if here.device.type == "cuda" else "CPU-s"
    device = (
        torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else f"{platform.machine()}, 1 thread"
    )
    figures = {
        "command": " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }
    print(f"rollouts on {device}, {dtype}, torch {torch.__version__}, transformers {transformers.__version__}")
    for lengths in args.lengths:
        total = sum(r.max_new_tokens for r in make_requests(args, lengths == "mixed"))
        print(
            f"{lengths} lengths: {args.requests} responses, {args.samples} to a prompt, {total} tokens, {args.slots}"
            " slots"
        )
        figures[lengths] = measure(args, here, dtype, lengths)
        print(*table(figures[lengths], unit), sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
