"""What is told of responses and their verdicts: a row of metrics, and the accuracy on held-out prompts.

N prompts · K samples of each.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from engine.data.prompts import Prompt
from engine.errors import UserError
from engine.flags import RlvrFlags
from engine.terminal import Row
from engine.train import interval, screen
from rollout.ahead import Sampling
from rollout.collect import Drawn
from rollout.experience import Experience

EVALUATION = 1_000_003  # added to the seed: held-out responses are other draws than the training's


def of_responses(experience: Experience, drawn: Drawn, prompts: list[Prompt]) -> dict[str, float]:
    """What an iteration's responses were like: means over those that were sampled, scores over those with a verdict."""
    rollouts, verdicts = drawn.rollouts, drawn.verdicts
    verified: dict[str, list[float]] = {}
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.status == "ok":
            verified.setdefault(prompts[rollout.example].verifier, []).append(verdict.score)
    return {f"verified/{name}": float(np.mean(scores)) for name, scores in verified.items()} | {
        "objective/scores": experience.scores_S.mean().item(),
        "rollout/length": float(np.mean([len(r.response_ids) for r in rollouts])),
        "rollout/stop_rate": float(np.mean([r.finish_reason == "stop" for r in rollouts])),
        "rollout/errors": sum(v.status == "error" for v in verdicts),
    }


def of_sampler(experience: Experience, now_R: Tensor, age: int, cap: float | None = None) -> dict[str, float]:
    """How far the policy is, before it is updated, from what the responses were drawn from `age` updates ago: its ratio
    over tokens, 1 up to rounding where that was the policy itself; and how much of it a `cap` cuts.
    """
    ratio_R = (now_R - experience.sampled_R).exp()
    row = {"rollout/age": age, "sampler/ratio": ratio_R.mean().item(), "sampler/ratio_max": ratio_R.max().item()}
    return row if cap is None else row | {"sampler/truncated": (ratio_R > cap).double().mean().item()}


def held_out_accuracy(sample: Sampling, held_out: list[Prompt], flags: RlvrFlags, done: int) -> None:
    """Verified accuracy on the held-out prompts with a 95 % interval (engine/train/interval.py), and a few responses
    with their verdicts.
    """
    if not held_out:
        return
    collect, run = sample.collect, sample.run
    sample.load()
    everyone, samples = np.arange(len(held_out)), flags.eval_samples
    drawn = collect(held_out, everyone, samples, done, seed=flags.seed + EVALUATION, shown="held out: ")
    rollouts, verdicts = drawn.rollouts, drawn.verdicts
    scores_NK = np.array([v.score if v.status == "ok" else np.nan for v in verdicts]).reshape(-1, samples)
    scores_NK /= np.array([[prompt.best_score] for prompt in held_out])
    accuracy, low, high = interval.accuracy(scores_NK)
    if np.isnan(accuracy):
        raise UserError(f"no held-out prompt could be verified, the first: {verdicts[0].reason}")
    length = float(np.mean([len(r.response_ids) for r in rollouts]))
    between = f"95 % interval {low:.1%} to {high:.1%}, {np.isfinite(scores_NK).sum()} responses"
    lines = [f"held out, after iteration {done}: verified {accuracy:.1%} ({between})"]
    decode, shown = run.base.chat.tokenizer.decode, []
    for rollout, verdict in list(zip(rollouts, verdicts, strict=True))[:: max(1, len(rollouts) // 4)][:4]:
        prompt, text = decode(rollout.prompt_ids), decode(rollout.response_ids)
        lines.append(f"  {verdict.score:g} ({verdict.reason[:80]}): {text[:160]!r}")
        shown.append({"prompt": prompt, "response": text, "score": verdict.score, "reason": verdict.reason})
    run.write_evaluation(done, {"accuracy": accuracy, "low": low, "high": high, "length": length}, *lines)
    run.write_samples(done, shown)


def of_sampling(flags: RlvrFlags, held_out: list[Prompt]) -> tuple[Row, Row]:
    """Two rows of the first screen: what is sampled and learnt from in an iteration, and what is held out."""
    sampled = f"{flags.num_samples_per_prompt} responses to each prompt, of at most {flags.response_length} tokens"
    asked = f"{len(held_out):,} prompts, {flags.eval_samples} responses to each" if held_out else screen.NONE
    iteration = f"{sampled}; {flags.num_ppo_epochs} x {flags.num_mini_batches} updates"
    return Row("iteration", iteration), Row("held out", asked)
