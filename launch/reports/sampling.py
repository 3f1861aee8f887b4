"""Rules of health of the stages that sample: what the policy learns from, how far it goes, and its responses."""

from __future__ import annotations

import numpy as np

from launch.reports.marks import BAD, FEW, OK, WARNING, Mark, found, level, of
from launch.reports.runs import Recorded, as_number

# --- what is learnt from ----------------------------------------------------------------------------------------------


def rewards_vary(run: Recorded) -> Mark | None:
    """Both kinds learn from differences: a score that has been the same for a third of the run teaches nothing."""
    scores = of(run, "objective/scores", 2 * FEW)
    if scores is None:
        return None
    last = scores.values[-max(FEW, len(scores) // 3) :]
    if np.ptp(last) > 1e-9:
        seen = f"Between {last.min():.3g} and {last.max():.3g} lately."
        return Mark(OK, "Scores vary", seen, metric="objective/scores")
    solved = last[-1] > scores.values.min() + 1e-9 or last[-1] > 0
    title = "Every response is right" if solved else "No response is ever right"
    advice = "Give it harder problems." if solved else "Give it easier problems, or fine-tune it on such answers first."
    seen = f"The score has been {last[-1]:.3g} for {len(last)} {run.unit}s."
    return Mark(WARNING if solved else BAD, title, seen, advice, "objective/scores")


def groups_differ(run: Recorded) -> Mark | None:
    """Only groups whose responses differ in score have a gradient: median of their share in the last third. Below 30 %
    most of the sampling teaches nothing, below 10 % hardly a step does. Never bad where they are all right: that is
    what was to be learnt.
    """
    signal = of(run, "groups/signal", 2 * FEW)
    if signal is None:
        return None
    lately, all_right = signal.ends(1 / 3)[1], of(run, "groups/all_right")
    right = all_right.ends(1 / 3)[1] if all_right is not None else 0.0
    wrong = max(0.0, 1 - lately - right)
    seen = f"Responses differ in {lately:.0%} of the groups, {right:.0%} are all right, in the last third."
    few = level(lately, 0.3, 0.1)
    if right >= wrong:
        few, prompts = few if few == OK else WARNING, "Give it harder prompts"
    else:
        prompts = "Give it easier prompts, or fine-tune it on such answers first"
    advice = f"{prompts}, raise --num_samples_per_prompt, or draw other prompts in their place (--dynamic_sampling)."
    return found(few, ("Groups differ", "Few groups differ"), seen, advice, "groups/signal")


# --- the policy -------------------------------------------------------------------------------------------------------


def sampler_is_the_policy(run: Recorded) -> Mark | None:
    """Before any update the two are one up to rounding. The mean over the sampler's own tokens is 1 whatever they
    differ by, so an odd one says that they are not even the sampler's; single tokens say by how much: 2 is the usual
    --tis_cap, 10 beyond what rounding does.
    """
    mean, most = of(run, "sampler/ratio"), of(run, "sampler/ratio_max")
    if mean is None or most is None:
        return None
    off, largest = float(np.abs(mean.values - 1).max()), most.ends()[1]
    age = of(run, "rollout/age")
    if age is not None and age.values.max() > 0:
        return _updates_are_small(off, largest)
    seen = f"The mean is off 1 by at most {off:.2g}; the largest of a token is {largest:.3g} lately."
    differ = max(level(off, 0.01, 0.1), level(largest, 2.0, 10.0), key=(OK, WARNING, BAD).index)
    advice = "Weigh tokens by the ratio (--tis_cap 2), and see whether --dtype float32 makes them one."
    titles = "The sampler is the policy", "The sampler is not the policy"
    return found(differ, titles, seen, advice, "sampler/ratio_max" if level(off, 0.01, 0.1) == OK else "sampler/ratio")


def _updates_are_small(off: float, largest: float) -> Mark | None:
    """Of a sampler that is one update behind on purpose: the ratio's mean is 1 all the same where there are tokens
    enough; a tenth off it means that few tokens have most of the weight.
    """
    seen = f"Before an update the ratio's mean is off 1 by at most {off:.2g}; the largest of a token is {largest:.3g}."
    advice = "Lower --learning_rate, or sample by the weights that are trained (--rollout_ahead 0)."
    titles = "The sampler is close behind the policy", "The sampler is far behind the policy"
    return found(level(off, 0.1, 0.5), titles, seen, advice, "sampler/ratio")


def kl_is_bounded(run: Recorded) -> Mark | None:
    """Per token of a response, in the last tenth: at 0.2 nats texts read differently from the reference's, at 1 little
    is left of it. Clearly below 0 the estimate is of other samples than the policy's. Without kl_coef there is none.
    """
    kl, length = of(run, "objective/kl", FEW), of(run, "rollout/length", FEW)
    if kl is None or length is None or not run.config.get("kl_coef", 1):
        return None
    per_token = kl.ends()[1] / max(1.0, length.ends()[1])
    seen = f"{kl.ends()[1]:.3g} nats per response, {per_token:.3g} per token, in the last tenth."
    if per_token < -0.05:
        closer = "Try --kl_estimator k3." if run.stage == "ppo" else "Look at sampler/ratio_max."
        return Mark(WARNING, "KL is negative", seen, f"Do sampler and trainer agree? {closer}", "objective/kl")
    advice = "Raise --kl_coef or lower --learning_rate, and read the samples: is it still language?"
    return found(level(per_token, 0.2, 1.0), ("KL is bounded", "KL is large"), seen, advice, "objective/kl")


def updates_are_small(run: Recorded) -> Mark | None:
    """In the last tenth: clipping 30 % of the tokens, or 0.1 nats from the old policy, is twice what healthy runs
    show.
    """
    clipped, kl = of(run, "policy/clipfrac", FEW), of(run, "policy/approxkl", FEW)
    if clipped is None or kl is None:
        return None
    seen = f"{clipped.ends()[1]:.0%} of the tokens clipped, {kl.ends()[1]:.2g} nats from the old policy, lately."
    large = max(level(clipped.ends()[1], 0.3, 0.6), level(kl.ends()[1], 0.1, 0.5), key=(OK, WARNING, BAD).index)
    advice = "Lower --learning_rate or --num_ppo_epochs."
    return found(large, ("Updates are small", "Updates are large"), seen, advice, "policy/clipfrac")


def ratio_is_near_one(run: Recorded) -> Mark | None:
    """A mean over all updates of an iteration. Its expectation under the old policy is 1; a mean off by 0.1 means that
    single tokens are off by far more, by 0.5 that updates are not of this policy's samples. 0: no update was made.
    """
    ratio = of(run, "val/ratio")
    if ratio is None or not (ratio.values != 0).any():
        return None
    values = ratio.values[ratio.values != 0]
    off = float(np.abs(values - 1).max())
    seen = f"The mean ratio lies between {values.min():.3f} and {values.max():.3f}."
    advice = "Lower --learning_rate or --num_ppo_epochs: the updates leave what was sampled."
    return found(level(off, 0.1, 0.5), ("Ratio near 1", "Ratio far from 1"), seen, advice, "val/ratio")


def entropy_lives(run: Recorded) -> Mark | None:
    """Against the first tenth: at a fifth exploration is nearly over, at a twentieth it is."""
    entropy = of(run, "objective/entropy", FEW)
    if entropy is None:
        return None
    first, last = entropy.ends()
    seen = f"From {first:.3g} to {last:.3g} nats per token."
    hold = "--entropy_coef or --clip_high" if run.stage == "grpo" else "--kl_coef"
    advice = f"The policy says one thing only: raise {hold}, lower --learning_rate, or stop if the accuracy is good."
    left = level(last / max(first, 1e-12), 0.2, 0.05)
    return found(left, ("Entropy is alive", "Entropy collapses"), seen, advice, "objective/entropy")


def values_explain(run: Recorded) -> Mark | None:
    """Median of the last third: at 0 the value model is no better than a constant."""
    explained = of(run, "val/explained_variance", 2 * FEW)
    if explained is None:
        return None
    lately = explained.ends(1 / 3)[1]
    advice = "Let it learn first (--value_warmup_steps), or raise --value_learning_rate."
    titles = "The value model explains returns", "The value model explains nothing"
    seen = f"Explained variance {lately:.2f} in the last third."
    return found(OK if lately > 0 else WARNING, titles, seen, advice, "val/explained_variance")


# --- responses --------------------------------------------------------------------------------------------------------


def responses_end(run: Recorded) -> Mark | None:
    """The share that ends by itself. Below 80 % the verifier judges fragments; below half training is on fragments."""
    rate = of(run, "rollout/stop_rate", FEW)
    if rate is None:
        return None
    first, last = rate.ends()
    seen = f"{last:.0%} ended by themselves lately, {first:.0%} at the start."
    leave = ", or leave them out of the update with --mask_truncated" if run.stage == "grpo" else ""
    advice = f"Raise --response_length, or punish truncation with --missing_eos_penalty{leave}."
    titles = "Responses end", "Responses are cut off"
    return found(level(last, 0.8, 0.5), titles, seen, advice, "rollout/stop_rate")


def responses_differ(run: Recorded) -> Mark | None:
    """Of the last responses that were kept, one to a prompt: less than half different is suspicious, one and the same
    is a collapse. Right answers that the verifier says the same of are one: their prompts ask the same.
    """
    last = [row for row in run.samples if isinstance(row.get("prompt"), str)][-12:]
    asked = {row["prompt"]: row for row in last}
    is_right = {prompt: (as_number(row.get("score")) or 0) >= 1 for prompt, row in asked.items()}
    answers = [
        (row["response"].strip(), str(row.get("reason")) if is_right[prompt] else prompt)
        for prompt, row in asked.items()
    ]
    texts = [text for text, _ in set(answers)]
    if len(texts) < 4:
        return None
    alike = BAD if len(set(texts)) == 1 else WARNING if len(set(texts)) < len(texts) / 2 else OK
    seen = f"{len(set(texts))} different ones to the last {len(texts)} prompts that were kept."
    advice = "Read them below: does it say one thing whatever is asked?"
    return found(alike, ("Responses differ", "Responses are alike"), seen, advice)


def verdicts_are_given(run: Recorded) -> Mark | None:
    """A response without a verdict is left out of the update; above 1 % the run stops itself."""
    errors = of(run, "rollout/errors")
    if errors is None:
        return None
    total, iterations = int(errors.values.sum()), int((errors.values > 0).sum())
    seen = f"{total:,} verdicts failed, in {iterations:,} {run.unit}s." if total else "No verdict failed."
    advice = "Give those rows to launch.verify, which prints the reason for each."
    titles = "All responses were verified", "Some responses could not be verified"
    return found(WARNING if total else OK, titles, seen, advice, "rollout/errors")
