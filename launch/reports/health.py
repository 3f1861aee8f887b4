"""Rules of health: a run → a mark, ok, warning or bad, with what was seen and what to do; None: it does not apply.

Thresholds are those at which somebody who watches the run would look closer, not proofs: each says why it stands where
it does. What must hold exactly at step 0 is asserted by the run itself; here it is read again from the rows, wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from launch.reports.catalogue import TOKENS_PER_SECOND
from launch.reports.runs import Recorded, Series, as_number
from launch.reports.verdict import headline, interval_at

OK, WARNING, BAD = "ok", "warning", "bad"
FEW = 5  # rows below which a trend is noise


@dataclass(frozen=True)
class Mark:
    """What one rule found. `metric`: where to look, if there is a plot of it."""

    level: str
    title: str
    seen: str
    advice: str = ""
    metric: str = ""


def examine(run: Recorded) -> list[Mark]:
    """The marks of all rules that apply, the worst first."""
    marks = [mark for rule in RULES if (mark := rule(run)) is not None]
    return sorted(marks, key=lambda mark: (BAD, WARNING, OK).index(mark.level))


def of(run: Recorded, name: str, at_least: int = 1) -> Series | None:
    """The metric's series, if it has so many finite values."""
    series = run.series.get(name)
    return series if series is not None and len(series) >= at_least else None


def level(value: float, warning: float, bad: float) -> str:
    """By two thresholds, ascending or descending."""
    beyond = (lambda bound: value >= bound) if bad >= warning else (lambda bound: value <= bound)
    return BAD if beyond(bad) else WARNING if beyond(warning) else OK


def found(of_level: str, titles: tuple[str, str], seen: str, advice: str, metric: str = "") -> Mark:
    """A mark under the first title if all is well, else under the second, with advice."""
    if of_level == OK:
        return Mark(OK, titles[0], seen, metric=metric)
    return Mark(of_level, titles[1], seen, advice, metric)


# --- what must hold ---------------------------------------------------------------------------------------------------


def numbers_are_finite(run: Recorded) -> Mark:
    """Any NaN or infinity in a metric is wrong: the run itself stops at one in loss or gradient norm."""
    bad = {name: len(s.bad_steps) for name, s in run.series.items() if len(s.bad_steps)}
    if not bad:
        return Mark(OK, "All numbers are finite", f"{sum(map(len, run.series.values())):,} values read.")
    names = ", ".join(f"{name} ({n:,})" for name, n in list(bad.items())[:4])
    first = min(int(run.series[name].bad_steps[0]) for name in bad)
    return Mark(
        BAD,
        "Numbers that are not finite",
        f"NaN or infinite: {names}; the first at {run.unit} {first}.",
        "Read the rows before it: lower --learning_rate, check the data of that step, or use --dtype float32.",
        next(iter(bad)),
    )


def dpo_starts_at_the_reference(run: Recorded) -> Mark | None:
    """The first row is taken before the first update: margins are 0, and dpo's loss is log 2. 0.05 is far beyond what
    bfloat16 does to a mean over a batch, and far below what a wrong reference does.
    """
    margins, loss, kind = of(run, "rewards/margins"), of(run, "loss"), run.config.get("loss_type")
    if run.stage != "dpo" or kind == "simpo" or margins is None or margins.steps[0] != 1:
        return None
    off, seen = abs(margins.first), f"At step 1 the margin is {margins.first:.2g}"
    if kind in ("dpo", "dpo_norm") and not run.config.get("rpo_alpha") and loss is not None and loss.steps[0] == 1:
        off, seen = max(off, abs(loss.first - math.log(2))), f"{seen}, the loss {loss.first:.4f}; log 2 is 0.6931"
    advice = "The reference log-probs are of another model: delete the cache (--cache_dir) and start again."
    titles = "Starts at the reference", "Does not start at the reference"
    return found(BAD if off > 0.05 else OK, titles, seen + ".", advice, "rewards/margins")


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


def learning_rate_is_not_zero(run: Recorded) -> Mark | None:
    """0 at the first step (warm-up) and at the last is a schedule; 0 in half of the steps is a mistake."""
    rate = of(run, "learning_rate", 3)
    if rate is None:
        return None
    zero = float((rate.values == 0).mean())
    seen = (
        f"At most {rate.values.max():.3g}."
        if zero < 0.5
        else f"It is 0 in {zero:.0%} of the steps: they teach nothing."
    )
    advice = "Look at --learning_rate, --warmup_ratio, --warmup_steps and --min_lr_ratio."
    titles = "Learning rate is not zero", "Learning rate is zero"
    return found(BAD if zero >= 0.5 else OK, titles, seen, advice, "learning_rate")


# --- learning ---------------------------------------------------------------------------------------------------------


def loss_falls(run: Recorded) -> Mark | None:
    """Of SFT and DPO (PPO's loss says nothing). The last tenth against the first: 2 % above is no noise of medians,
    and 10 % above is divergence.
    """
    loss = of(run, "loss", FEW)
    if loss is None or run.stage not in ("sft", "dpo"):
        return None
    first, last = loss.ends()
    rise = level((last - first) / max(abs(first), 1e-12), 0.02, 0.1)
    seen = f"From {first:.4g} to {last:.4g} (medians of the first and last tenth)."
    return found(rise, ("Loss does not rise", "Loss rises"), seen, "Lower --learning_rate, or warm up longer.", "loss")


def held_out_loss_does_not_turn(run: Recorded) -> Mark | None:
    """Overfitting: 5 % above its lowest is more than held-out losses wander, 20 % is lost ground."""
    loss = of(run, "eval/loss", 3)
    if loss is None:
        return None
    lowest = int(loss.values.argmin())
    rise = level((loss.last - loss.values[lowest]) / max(abs(loss.values[lowest]), 1e-12), 0.05, 0.2)
    seen = f"Lowest {loss.values[lowest]:.4g} at {run.unit} {loss.steps[lowest]}, now {loss.last:.4g}."
    advice = "It learns its data by heart: stop at that step (--max_steps), or take fewer epochs."
    return found(rise, ("Held-out loss holds", "Held-out loss has turned up"), seen, advice, "eval/loss")


def accuracy_does_not_fall(run: Recorded) -> Mark | None:
    """Of the figure that the stage is judged by, against its best. Intervals that do not overlap are bad; without
    intervals, 5 and 15 points.
    """
    h = headline(run)
    if h is None or not h.metric.endswith(("accuracy", "accuracies")):
        return None
    series = run.series[h.metric]
    best = int(series.values.argmax())
    now, was = interval_at(run, h.metric, -1), interval_at(run, h.metric, best)
    lost = level(float(series.values[best]) - h.after, 0.05, 0.15)
    if now is not None and was is not None:
        lost = BAD if now[1] < was[0] else OK
    seen = f"Best {h.shown(series.values[best])} at {run.unit} {series.steps[best]}, now {h.shown(h.after)}."
    advice = "Take the checkpoint of that step (--save_steps keeps some), and look at KL, entropy and the samples."
    return found(lost, ("Accuracy holds", "Accuracy has fallen"), seen, advice, h.metric)


def pairs_are_told_apart(run: Recorded) -> Mark | None:
    """A margin at or below 0 in the last tenth: no preference was learnt."""
    margins = of(run, "rewards/margins", FEW)
    if margins is None:
        return None
    _, last = margins.ends()
    seen = f"The margin is {last:.3g} in the last tenth."
    advice = "Raise --learning_rate, train longer, or check that chosen and rejected are not swapped."
    titles = "Margins are positive", "No preference is learnt"
    return found(OK if last > 0 else BAD, titles, seen, advice, "rewards/margins")


def chosen_stays_likely(run: Recorded) -> Mark | None:
    """DPO may sink both answers. A third of the log-prob lost is a warning, a doubling is bad."""
    chosen = of(run, "logps/chosen", FEW)
    if chosen is None:
        return None
    first, last = chosen.ends()
    sunk = level((first - last) / max(abs(first), 1e-12), 1 / 3, 1.0)
    seen = f"Their log-prob went from {first:.4g} to {last:.4g}."
    advice = "Raise --beta, lower --learning_rate, or add --rpo_alpha, which holds the chosen answers up."
    return found(sunk, ("Chosen answers stay likely", "Chosen answers are unlearnt"), seen, advice, "logps/chosen")


def rewards_vary(run: Recorded) -> Mark | None:
    """PPO learns from differences: a score that has been the same for a third of the run teaches nothing."""
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


# --- the policy -------------------------------------------------------------------------------------------------------


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
        return Mark(
            WARNING, "KL is negative", seen, "Do sampler and trainer agree? Try --kl_estimator k3.", "objective/kl"
        )
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


def entropy_lives(run: Recorded) -> Mark | None:
    """Against the first tenth: at a fifth exploration is nearly over, at a twentieth it is."""
    entropy = of(run, "objective/entropy", FEW)
    if entropy is None:
        return None
    first, last = entropy.ends()
    seen = f"From {first:.3g} to {last:.3g} nats per token."
    advice = "The policy says one thing only: raise --kl_coef, lower --learning_rate, or stop if the accuracy is good."
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
    advice = "Raise --response_length, or punish truncation with --missing_eos_penalty."
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


# --- the machine ------------------------------------------------------------------------------------------------------


def gradients_are_calm(run: Recorded) -> Mark | None:
    """Against the median of the 20 steps before, from the eleventh on: ten times is a spike, and clipping is for that;
    a hundred times, or a spike in every twentieth step, is an unstable run. The level itself may fall by decades.
    """
    norm = of(run, "grad_norm", 2 * FEW + 1)
    if norm is None:
        return None
    times = norm.values[10:] / np.maximum(medians_before(norm.values), 1e-12)
    spikes, most = int((times > 10).sum()), float(times.max())
    seen = f"At most {most:.1f} times the median of the steps before."
    if spikes:
        step = norm.steps[10 + times.argmax()]
        seen = f"{spikes:,} above 10 times the steps before; the largest, {most:,.0f} times, at {run.unit} {step}."
    unstable = most > 100 or (spikes > 2 and spikes > 0.05 * len(times))
    advice = "Look at the data of that step; lower --max_grad_norm or --learning_rate if it recurs."
    wild = BAD if unstable else WARNING if spikes else OK
    return found(wild, ("Gradients are calm", "Gradient norm spikes"), seen, advice, "grad_norm")


def medians_before(values: np.ndarray) -> np.ndarray:
    """For every value from the eleventh on, the median of the 20 before it, or of as many as there are."""
    few = [np.median(values[:i]) for i in range(10, min(20, len(values)))]
    if len(values) <= 20:
        return np.array(few)
    return np.concatenate([few, np.median(np.lib.stride_tricks.sliding_window_view(values, 20), axis=1)[:-1]])


def speed_holds(run: Recorded) -> Mark | None:
    """Median of the last quarter against the first, without the first rows, which hold the start: a third slower is
    more than longer responses explain. It is never bad: what is learnt does not depend on it.
    """
    speed = of(run, TOKENS_PER_SECOND, 3 * FEW)
    if speed is None:
        return None
    first, last = Series(speed.steps[2:], speed.values[2:]).ends(0.25)
    seen = f"From {first:,.0f} to {last:,.0f} tokens/s per rank."
    advice = "Is the machine shared, hot, or short of memory? --profile shows where a step goes."
    left = WARNING if last < 2 / 3 * first else OK
    return found(left, ("Speed holds", "Throughput drops"), seen, advice, TOKENS_PER_SECOND)


RULES: tuple[Callable[[Recorded], Mark | None], ...] = (
    numbers_are_finite,
    dpo_starts_at_the_reference,
    ratio_is_near_one,
    learning_rate_is_not_zero,
    loss_falls,
    held_out_loss_does_not_turn,
    accuracy_does_not_fall,
    pairs_are_told_apart,
    chosen_stays_likely,
    rewards_vary,
    kl_is_bounded,
    updates_are_small,
    entropy_lives,
    values_explain,
    responses_end,
    responses_differ,
    verdicts_are_given,
    gradients_are_calm,
    speed_holds,
)
