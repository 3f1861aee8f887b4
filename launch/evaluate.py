"""Accuracy of a model on problems with verifiable answers.      torchrun --nproc_per_node 8 -m launch.evaluate --help

    p = mean over prompts i and seeds j of score_ij    95 % interval: Wilson's, for n k / (1 + (k - 1) rho) responses

n prompts are answered under k seeds each. Answers to one prompt resemble each other (rho, their intraclass
correlation), so n k of them say less than as many prompts would: the interval is that of the effective number. Rows are
RLVR's: `messages`, `ground_truth`, `dataset` (the verifier's name). --temperature 0 decodes greedily, once.

With no argument it evaluates the embedded tiny Llama (as `launch.ppo` fine-tuned it, where it did) on held-out
problems.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.config import parse
from engine.data import ChatTokenizer, Prompt, PromptReader, embedded, prompts_of
from engine.errors import UserError
from engine.flags import DataFlags, ModelFlags, PromptFlags, SamplingFlags, fill, flag, override, require_positive
from engine.model import load_untrained, open_model
from engine.train import interval
from engine.world import World, main, start
from launch import commands
from launch.judges import checker, pinned
from rollout import Collector, Rollout, Sampler
from verifiers import MODES, Pool, Verdict

SHOWN = 4  # responses on the screen
Answer = tuple[int, Rollout, Verdict]  # under a seed


@dataclass(frozen=True, kw_only=True)
class Config(ModelFlags, DataFlags, PromptFlags, SamplingFlags):
    __doc__ = __doc__
    model_name_or_path: str = override(
        None, "local directory or hub id of a decoder; without it, the embedded tiny Llama"
    )
    adapter_name_or_path: str | None = override(None, "an adapter on it, in PEFT's format")
    load_in_4bit: bool = override(
        False, "with an adapter: the model's linear layers in NF4, as the adapter was trained on them"
    )
    double_quant: bool = override(False, "with --load_in_4bit, as in training")
    dataset_name: str = override(
        None, "file, 'data/*.jsonl', directory, hub id or id:config, as in training; without it, embedded problems"
    )
    dataset_split: str = override("test")
    num_prompts: int | None = flag(None, "only the first N prompts")
    max_seq_length: int = override(
        2048, "prompt + response, in tokens; prompts that leave no room are dropped and counted"
    )
    seed: int = override(1, "the first seed")
    num_seeds: int = flag(3, "responses to each prompt, each under a seed of its own")
    dtype: str = override(
        "auto", "compute dtype; auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "bfloat16", "float32")
    )
    attention: str = override("auto", "packed attention backend of the load-time check")
    cache_dir: str = override("~/.cache/triptych", "where the embedded model and problems lie")
    verifier_mode: str = override("default", choices=MODES)
    output: str | None = flag(None, "file of all responses with verdicts and reasons, as JSON lines")


def evaluate(config: Config) -> None:
    """Samples answers under every seed, verifies them, and prints the table by verifier."""
    world = start()
    config = resolve(config, world)
    base = open_model(config, world)
    room = base.longest_prompt(config.max_seq_length, config.response_length)
    with checker(config.verifier_mode, config.verifier_module) as check:
        read = PromptReader(base.chat, config, check, fold_system=config.system_role == "fold")
        prompts = prompts_of(config.dataset_name, config.dataset_split, config, read, world, longest=room)
    prompts = prompts[: config.num_prompts]
    policy = load_untrained(base, world)
    window = max(len(prompt.ids) for prompt in prompts) + config.response_length
    sampler = Sampler(base.config, policy, world, dtype=base.dtype, max_length=window, slots=config.rollout_slots)
    sampler.load(policy)
    del policy
    scores_KN: list[list[float]] = []
    answers: list[Answer] = []
    with Pool(world.cores, config.verifier_mode, module=config.verifier_module) as pool:
        collect = Collector(sampler, pool, base.chat, config, config.seed, world)
        for seed in range(config.seed, config.seed + config.num_seeds):
            rollouts, verdicts = collect(prompts, np.arange(len(prompts)), 1, 0, seed=seed)
            scores_KN.append([verdict.score if verdict.status == "ok" else np.nan for verdict in verdicts])
            answers += [(seed, rollout, verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]
            world.say(f"seed {seed}: {np.nanmean(scores_KN[-1]):.2%}")
    world.say(*report(np.array(scores_KN).T, prompts, answers, base.chat))
    if config.output and world.is_main:
        write(Path(config.output), answers, prompts, base.chat)


def resolve(config: Config, world: World) -> Config:
    """Fills what is left open. Raises UserError."""
    config = replace(config, verifier_module=pinned(config.verifier_module))
    world.agree("configuration", repr(config))
    if config.verifier_module:
        world.say(f"verifier of your own: {config.verifier_module}")
    if (config.load_in_4bit and not config.adapter_name_or_path) or (config.double_quant and not config.load_in_4bit):
        raise UserError("--load_in_4bit is read with --adapter_name_or_path, --double_quant with --load_in_4bit")
    require_positive(config, "num_prompts", "max_seq_length", "num_seeds")
    config.check_prompts()
    config.check_sampling()
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise UserError(f"--output {config.output}: no such directory")
    if config.temperature == 0 and config.num_seeds > 1:
        world.say("--temperature 0: greedy answers are the same under every seed, so one is taken")
        config = replace(config, num_seeds=1)
    if config.model_name_or_path is not None:
        if config.dataset_name is None:
            raise UserError("--model_name_or_path needs --dataset_name (without either, all is embedded)")
        return fill(config, response_length=1024)
    made = world.once("embedded", lambda: embedded(Path(config.cache_dir).expanduser()))
    tuned = made.model.parent / "tuned_on_sums" / "final"
    directory = tuned if (tuned / "config.json").is_file() else made.model
    world.say(
        "no --model_name_or_path: evaluating the embedded tiny Llama"
        f" ({'fine-tuned by launch.ppo' if directory == tuned else 'random'})"
    )
    filled = {"dataset_name": str(made.held_out_problems), "response_length": 24}
    config = replace(config, model_name_or_path=str(directory), max_seq_length=min(config.max_seq_length, 256))
    return fill(config, **filled)


def report(scores_NK: np.ndarray, prompts: list[Prompt], answers: list[Answer], chat: ChatTokenizer) -> list[str]:
    """The table by verifier, and a few responses with their verdicts."""
    names_N = np.array([prompt.verifier for prompt in prompts])
    groups = [(name, names_N == name) for name in sorted(set(names_N))]
    groups = groups if len(groups) == 1 else [*groups, ("all", np.ones(len(prompts), bool))]
    lines = [f"{'verifier':14} {'prompts':>8} {'seeds':>6} {'accuracy':>9}   95 % interval"]
    for name, mask_N in groups:
        mean, low, high = interval.accuracy(scores_NK[mask_N])
        lines.append(f"{name:14} {mask_N.sum():8} {scores_NK.shape[1]:6} {mean:9.2%}   {low:.2%} to {high:.2%}")
    rollouts = [rollout for _, rollout, _ in answers]
    unverified = sum(verdict.status == "error" for _, _, verdict in answers)
    stopped = np.mean([rollout.finish_reason == "stop" for rollout in rollouts])
    lines.append(
        f"responses: {np.mean([len(r.response_ids) for r in rollouts]):.1f} tokens on average, {stopped:.1%} ended by"
        f" themselves, {unverified} not verifiable (their prompts are left out)"
    )
    for _, rollout, verdict in answers[:: max(1, len(answers) // SHOWN)][:SHOWN]:
        text = chat.tokenizer.decode(rollout.response_ids)
        lines.append(f"  {verdict.score:g} ({verdict.reason[:80]}): {text[:160]!r}")
    return lines


def write(path: Path, answers: list[Answer], prompts: list[Prompt], chat: ChatTokenizer) -> None:
    """One JSON object per response; `launch.verify` reads the file."""

    def decode(ids: np.ndarray) -> str:
        return chat.tokenizer.decode(ids, skip_special_tokens=False)

    with path.open("w", encoding="utf-8") as out:
        for seed, rollout, verdict in answers:
            prompt, ids = prompts[rollout.example], rollout.response_ids
            row = {
                "seed": seed,
                "prompt": decode(rollout.prompt_ids),
                "response": chat.response_text(ids),
                "finish_reason": rollout.finish_reason,
                "ground_truth": prompt.ground_truth,
                "dataset": prompt.dataset,
                "score": verdict.score,
                "reason": verdict.reason,
            }
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(lambda: evaluate(parse(Config, elsewhere=commands)))
