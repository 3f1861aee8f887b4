"""Accuracy of a model on problems with verifiable answers.            torchrun --nproc_per_node 8 -m launch.evaluate --help

    p = mean over prompts i and seeds j of score_ij        95 % interval: Wilson's, for n k / (1 + (k - 1) rho) responses

n prompts are answered under k seeds each. Answers to one prompt resemble each other (rho, their intraclass
correlation), so n k of them say less than as many prompts would: the interval is that of the effective number. Rows are
RLVR's: `messages`, `ground_truth`, `dataset` (the verifier's name). --temperature 0 decodes greedily, once.

With no argument it evaluates the embedded tiny Llama (as `launch.ppo` fine-tuned it, where it did) on held-out
problems.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from engine import model, setup, world
from engine.config import flag, parse, require_positive
from engine.embedded import embedded
from engine.errors import UserError
from engine.interval import accuracy
from engine.prompts import Prompt, load_prompts
from engine.rows import open_source
from engine.world import World
from launch.ppo import sample_and_verify
from rollout import Rollout, Sampler, SamplingParams
from verifiers import MODES, Pool, Verdict, check

SHOWN = 4  # responses on the screen


@dataclass(frozen=True, kw_only=True)
class Config:
    __doc__ = __doc__
    model_name_or_path: str | None = flag(
        None, "local directory or hub id of a decoder; without it, the embedded tiny Llama", heading="model"
    )
    model_revision: str | None = flag(None, "branch, tag or commit of the model on the hub")
    adapter_name_or_path: str | None = flag(None, "an adapter on it, in PEFT's format")
    load_in_4bit: bool = flag(
        False, "with an adapter: the model's linear layers in NF4, as the adapter was trained on them"
    )
    double_quant: bool = flag(False, "with --load_in_4bit, as in training")
    dataset_name: str | None = flag(
        None, "hub id, directory, .jsonl, .json or .parquet; without it, embedded problems", heading="data"
    )
    dataset_revision: str | None = flag(None, "branch, tag or commit of the dataset on the hub")
    dataset_split: str = flag("test", "split of a hub dataset, or of a directory whose files are named after splits")
    num_prompts: int | None = flag(None, "only the first N prompts")
    max_seq_length: int = flag(
        2048,
        "prompt + response, in tokens; prompts that leave no room are dropped and counted",
        aliases=("max_length",),
    )
    on_bad_row: str = flag(
        "skip", "a malformed row stops the command or is skipped, counted and listed", choices=("error", "skip")
    )
    verifier_mode: str = flag(
        "default", "reference: the published verifiers' exact behaviour, also where it is wrong", choices=MODES
    )
    response_length: int | None = flag(None, "longest response in tokens; 1024, embedded 24", heading="sampling")
    temperature: float = flag(1.0, "0 is greedy")
    top_k: int = flag(0, "sample from the k likeliest tokens (0: from all)")
    top_p: float = flag(1.0, "sample from the likeliest tokens of this total probability")
    seed: int = flag(1, "the first seed")
    num_seeds: int = flag(3, "responses to each prompt, each under a seed of its own")
    rollout_slots: int = flag(64, "responses sampled at a time on each rank")
    dtype: str = flag(
        "auto",
        "compute dtype; auto: bfloat16 on CUDA, float32 on CPU",
        choices=("auto", "bfloat16", "float32"),
        heading="the command",
    )
    attention: str = flag(
        "auto",
        "packed attention backend of the load-time check",
        choices=("auto", "flash4", "flash3", "flash2", "varlen", "sdpa", "eager"),
    )
    output: str | None = flag(None, "file of all responses with verdicts and reasons, as JSON lines")
    cache_dir: str = flag("~/.cache/triptych", "where the embedded model and problems lie")
    given: dict = field(default_factory=dict, repr=False, compare=False, metadata={"help": None})


def train(config: Config) -> None:
    """The command (named like the other stages' entry)."""
    here = world.start()
    config = resolve(config, here)
    base = setup.prepare(config, here)
    prompts = load(config, here, base)
    params = SamplingParams(
        max_new_tokens=config.response_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_ids=(base.chat.end_of_turn_id,),
    )
    policy, identity = model.load(
        base.directory,
        base.config,
        here,
        dtype=base.dtype,
        backend=base.backend,
        head="fused",
        adapters=base.adapters,
        start=base.start,
    )
    here.say(
        f"model: {base.directory}{f' with the adapter {base.start}' if base.start else ''}, weights {identity}, compute"
        f" {str(base.dtype).removeprefix('torch.')}"
    )
    longest = max(len(prompt.ids) for prompt in prompts) + config.response_length
    sampler = Sampler(base.config, policy, here, dtype=base.dtype, max_length=longest, slots=config.rollout_slots)
    sampler.load(policy)
    del policy
    scores_KN: list[list[float]] = []
    rows: list[tuple[int, Rollout, Verdict]] = []
    with Pool(max(1, world.available_cores() // here.size), config.verifier_mode) as pool:
        for seed in range(config.seed, config.seed + config.num_seeds):
            chosen = np.arange(len(prompts))
            rollouts, verdicts = sample_and_verify(sampler, prompts, chosen, 1, params, seed, 0, here, base, pool)
            scores_KN.append([verdict.score if verdict.status == "ok" else math.nan for verdict in verdicts])
            rows += [(seed, rollout, verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]
            here.say(f"seed {seed}: {np.nanmean(scores_KN[-1]):.2%}")
    here.say(*report(np.array(scores_KN).T, prompts, rows, base))
    if config.output and here.is_main:
        write(Path(config.output), rows, prompts, base)


def resolve(config: Config, here: World) -> Config:
    """Fills what is left open. Raises UserError."""
    here.agree("configuration", repr(config))
    if (config.load_in_4bit and not config.adapter_name_or_path) or (config.double_quant and not config.load_in_4bit):
        raise UserError("--load_in_4bit is read with --adapter_name_or_path, --double_quant with --load_in_4bit")
    require_positive(config, "num_prompts", "max_seq_length", "response_length", "num_seeds", "rollout_slots")
    for name, low, high in (("top_p", 1e-9, 1), ("temperature", 0, 1e3), ("top_k", 0, 1e9)):
        if not low <= getattr(config, name) <= high:
            raise UserError(f"--{name} must be between {low:g} and {high:g}, got {getattr(config, name)}")
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise UserError(f"--output {config.output}: no such directory")
    if config.temperature == 0 and config.num_seeds > 1:
        here.say("--temperature 0: greedy answers are the same under every seed, so one is taken")
        config = replace(config, num_seeds=1)
    if config.model_name_or_path is not None:
        if config.dataset_name is None:
            raise UserError("--model_name_or_path needs --dataset_name (without either, all is embedded)")
        return replace(config, response_length=config.response_length or 1024)
    made = here.once("embedded", lambda: embedded(Path(config.cache_dir).expanduser()))
    tuned = made.model.parent / "tuned_on_sums" / "final"
    directory = tuned if (tuned / "config.json").is_file() else made.model
    here.say(
        "no --model_name_or_path: evaluating the embedded tiny Llama"
        f" ({'fine-tuned by launch.ppo' if directory == tuned else 'random'})"
    )
    return replace(
        config,
        model_name_or_path=str(directory),
        dataset_name=config.dataset_name or str(made.held_out_problems),
        response_length=config.response_length or 24,
        max_seq_length=min(config.max_seq_length, 256),
    )


def load(config: Config, here: World, base: setup.Base) -> list[Prompt]:
    """The prompts. Raises UserError."""
    longest = min(config.max_seq_length, getattr(base.config, "max_position_embeddings", config.max_seq_length))
    if config.response_length >= longest:
        raise UserError(
            f"--response_length {config.response_length} leaves no room for a prompt in {longest} tokens"
            " (--max_seq_length, or the model's limit)"
        )
    source = open_source(config.dataset_name, config.dataset_split, config.dataset_revision)
    prompts, lines = load_prompts(
        source,
        base.chat,
        longest - config.response_length,
        partial(check, mode=config.verifier_mode),
        config.on_bad_row,
    )
    here.say(*lines)
    return prompts[: config.num_prompts]


def report(
    scores_NK: np.ndarray, prompts: list[Prompt], rows: list[tuple[int, Rollout, Verdict]], base: setup.Base
) -> list[str]:
    """The table by verifier, and a few responses with their verdicts."""
    names_N = np.array(
        ["+".join(p.dataset) if isinstance(p.dataset, list) else str(p.dataset).lower() for p in prompts]
    )
    groups = [(name, names_N == name) for name in sorted(set(names_N))]
    groups = groups if len(groups) == 1 else [*groups, ("all", np.ones(len(prompts), bool))]
    lines = [f"{'verifier':14} {'prompts':>8} {'seeds':>6} {'accuracy':>9}   95 % interval"]
    for name, mask_N in groups:
        mean, low, high = accuracy(scores_NK[mask_N])
        lines.append(f"{name:14} {mask_N.sum():8} {scores_NK.shape[1]:6} {mean:9.2%}   {low:.2%} to {high:.2%}")
    rollouts = [rollout for _, rollout, _ in rows]
    unverified = sum(verdict.status == "error" for _, _, verdict in rows)
    stopped = np.mean([rollout.finish_reason == "stop" for rollout in rollouts])
    lines.append(
        f"responses: {np.mean([len(r.response_ids) for r in rollouts]):.1f} tokens on average, {stopped:.1%} ended by"
        f" themselves, {unverified} not verifiable (their prompts are left out)"
    )
    for _, rollout, verdict in rows[:: max(1, len(rows) // SHOWN)][:SHOWN]:
        lines.append(
            f"  {verdict.score:g} ({verdict.reason[:80]}): {base.chat.tokenizer.decode(rollout.response_ids)[:160]!r}"
        )
    return lines


def write(path: Path, rows: list[tuple[int, Rollout, Verdict]], prompts: list[Prompt], base: setup.Base) -> None:
    """One JSON object per response; `launch.verify` reads the file."""
    decode = partial(base.chat.tokenizer.decode, skip_special_tokens=False)
    with path.open("w", encoding="utf-8") as out:
        for seed, rollout, verdict in rows:
            prompt = prompts[rollout.example]
            ids = (
                rollout.response_ids[:-1]
                if rollout.response_ids[-1] == base.chat.end_of_turn_id
                else rollout.response_ids
            )
            row = {
                "seed": seed,
                "prompt": decode(rollout.prompt_ids),
                "response": decode(ids),
                "finish_reason": rollout.finish_reason,
                "ground_truth": prompt.ground_truth,
                "dataset": prompt.dataset,
                "score": verdict.score,
                "reason": verdict.reason,
            }
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    world.run(lambda: train(parse(Config)))
