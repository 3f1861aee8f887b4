"""Rules of health: a run → a mark, ok, warning or bad, with what was seen and what to do. None: the rule does not apply.

Thresholds are those at which somebody who watches the run would look closer, not proofs: each says why it stands where
it does. What must hold exactly at step 0 is asserted by the run itself; here it is read again from the rows, wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from launch.reports.runs import Recorded, Series
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


# --- what must hold ---------------------------------------------------------------------------------------------------


def numbers_are_finite(run: Recorded) -> Mark:
    """Any NaN or infinity in a metric is wrong: the run itself stops at one in loss or gradient norm."""
    found = {name: len(s.bad_steps) for name, s in run.series.items() if len(s.bad_steps)}
    if not found:
        return Mark(OK, "All numbers are finite", f"{sum(map(len, run.series.values())):,} values read.")
    names = ", ".join(f"{name} ({n:,})" for name, n in list(found.items())[:4])
    first = min(int(run.series[name].bad_steps[0]) for name in found)
    return Mark(
        BAD,
        "Numbers that are not finite",
        f"{sum(found.values()):,} values are NaN or infinite: {names}; the first at {run.unit} {first}.",
        "Read the rows before it: lower --learning_rate, check the data of that step, or use --dtype float32.",
        next(iter(found)),
    )


def dpo_starts_at_the_reference(run: Recorded) -> Mark | None:
    """The first row is taken before the first update: margins are 0, and dpo's loss is log 2. 0.05 is far beyond what
    bfloat16 does to a mean over a batch, and far below what a wrong reference does.
    """
    margins, loss = of(run, "rewards/margins"), of(run, "loss")
    referenced = run.config.get("loss_type") not in ("simpo",)
    if run.stage != "dpo" or not referenced or margins is None or margins.steps[0] != 1:
        return None
    off = abs(margins.first)
    exact = run.config.get("loss_type") in ("dpo", "dpo_norm") and not run.config.get("rpo_alpha")
    if exact and loss is not None and loss.steps[0] == 1:
        off = max(off, abs(loss.first - math.log(2)))
    seen = f"At step 1 the margin is {margins.first:.2g}" + (f", the loss {loss.first:.4f}." if loss else ".")
    if off <= 0.05:
        return Mark(OK, "Starts at the reference", seen, metric="rewards/margins")
    return Mark(
        BAD,
        "Does not start at the reference",
        seen + " Expected 0 and log 2 = 0.6931.",
        "The reference log-probs are of another model: delete the cache (--cache_dir) and start again.",
        "rewards/margins",
    )


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
    found = level(off, 0.1, 0.5)
    title = "Ratio near 1" if found == OK else "Ratio far from 1"
    advice = "" if found == OK else "Lower --learning_rate or --num_ppo_epochs: updates leave what was sampled."
    return Mark(found, title, seen, advice, "val/ratio")


def learning_rate_is_not_zero(run: Recorded) -> Mark | None:
    """0 at the first step (warm-up) and at the last is a schedule; 0 in half of the steps is a mistake."""
    rate = of(run, "learning_rate", 3)
    if rate is None:
        return None
    zero = float((rate.values == 0).mean())
    if zero < 0.5:
        return Mark(OK, "Learning rate", f"At most {rate.values.max():.3g}.", metric="learning_rate")
    return Mark(
        BAD,
        "Learning rate is zero",
        f"It is 0 in {zero:.0%} of the steps: nothing is learnt there.",
        "Look at --learning_rate, --warmup_ratio, --warmup_steps and --min_lr_ratio.",
        "learning_rate",
    )


# --- learning ---------------------------------------------------------------------------------------------------------


def loss_falls(run: Recorded) -> Mark | None:
    """Of SFT and DPO (PPO's loss says nothing). The last tenth against the first: 2 % above is no noise of medians,
    and 10 % above is divergence.
    """
    loss = of(run, "loss", FEW)
    if loss is None or run.stage not in ("sft", "dpo"):
        return None
    first, last = loss.ends()
    found = level((last - first) / max(abs(first), 1e-12), 0.02, 0.1)
    seen = f"From {first:.4g} to {last:.4g} (medians of the first and last tenth)."
    if found == OK:
        return Mark(OK, "Loss does not rise", seen, metric="loss")
    return Mark(found, "Loss rises", seen, "Lower --learning_rate, or lengthen the warm-up.", "loss")


def held_out_loss_does_not_turn(run: Recorded) -> Mark | None:
    """Overfitting: 5 % above its lowest is more than held-out losses wander, 20 % is lost ground."""
    loss = of(run, "eval/loss", 3)
    if loss is None:
        return None
    lowest = int(loss.values.argmin())
    found = level((loss.last - loss.values[lowest]) / max(abs(loss.values[lowest]), 1e-12), 0.05, 0.2)
    where = f"at {run.unit} {loss.steps[lowest]}"
    if found == OK:
        return Mark(
            OK, "Held-out loss", f"Lowest {loss.values[lowest]:.4g} {where}, now {loss.last:.4g}.", "", "eval/loss"
        )
    return Mark(
        found,
        "Held-out loss has turned up",
        f"It was lowest, {loss.values[lowest]:.4g}, {where}, and is {loss.last:.4g} now.",
        "The model learns its data by heart: stop there (--max_steps), or take fewer epochs.",
        "eval/loss",
    )


def accuracy_does_not_fall(run: Recorded) -> Mark | None:
    """Of the figure that the stage is judged by, against its best. Intervals that do not overlap are bad; without
    intervals, 5 and 15 points.
    """
    h = headline(run)
    if h is None or not (h.metric.endswith("accuracy") or h.metric.endswith("accuracies")):
        return None
    series = run.series[h.metric]
    best = int(series.values.argmax())
    now, was = interval_at(run, h.metric, -1), interval_at(run, h.metric, best)
    if now is not None and was is not None:
        found = BAD if now[1] < was[0] else OK
    else:
        found = level(float(series.values[best]) - h.after, 0.05, 0.15)
    seen = f"Best {h.shown(series.values[best])} at {run.unit} {series.steps[best]}, now {h.shown(h.after)}."
    if found == OK:
        return Mark(OK, "Accuracy holds", seen, metric=h.metric)
    return Mark(
        found,
        "Accuracy has fallen",
        seen,
        "Take the checkpoint of that step (--save_steps keeps some), and look at KL, entropy and the samples.",
        h.metric,
    )


def pairs_are_told_apart(run: Recorded) -> Mark | None:
    """A margin at or below 0 in the last tenth: no preference was learnt."""
    margins = of(run, "rewards/margins", FEW)
    if margins is None:
        return None
    _, last = margins.ends()
    if last > 0:
        return Mark(OK, "Margins are positive", f"{last:.3g} in the last tenth.", metric="rewards/margins")
    return Mark(
        BAD,
        "No preference is learnt",
        f"The margin is {last:.3g} in the last tenth.",
        "Raise --learning_rate, train longer, or check that chosen and rejected are not swapped.",
        "rewards/margins",
    )


def chosen_stays_likely(run: Recorded) -> Mark | None:
    """DPO may sink both answers. A third of the log-prob lost is a warning, a doubling is bad."""
    chosen = of(run, "logps/chosen", FEW)
    if chosen is None:
        return None
    first, last = chosen.ends()
    found = level((first - last) / max(abs(first), 1e-12), 1 / 3, 1.0)
    seen = f"log π(chosen) from {first:.4g} to {last:.4g}."
    if found == OK:
        return Mark(OK, "Chosen answers stay likely", seen, metric="logps/chosen")
    advice = "Raise --beta, lower --learning_rate, or add --rpo_alpha, which holds the chosen answers up."
    return Mark(found, "Chosen answers are unlearnt", seen, advice, "logps/chosen")


def rewards_vary(run: Recorded) -> Mark | None:
    """PPO learns from differences: a score that has been the same for a third of the run, at its lowest or highest,
    teaches nothing.
    """
    scores = of(run, "objective/scores", 2 * FEW)
    if scores is None:
        return None
    last = scores.values[-max(FEW, len(scores) // 3) :]
    if np.ptp(last) > 1e-9:
        return Mark(
            OK, "Scores vary", f"Between {last.min():.3g} and {last.max():.3g} lately.", metric="objective/scores"
        )
    solved = last[-1] > scores.values.min() + 1e-9
    title = "Every response is right" if solved else "No response is ever right"
    advice = "Give it harder problems." if solved else "Give it easier problems, or fine-tune it on such answers first."
    seen = f"The score has been {last[-1]:.3g} for {len(last)} {run.unit}s."
    return Mark(WARNING if solved else BAD, title, seen, advice, "objective/scores")


# --- the policy -------------------------------------------------------------------------------------------------------


def kl_is_bounded(run: Recorded) -> Mark | None:
    """Per token of the response, in the last tenth: at 0.2 nats texts read differently from the reference's, at 1 little
    is left of it. Clearly below 0 the estimate is of other samples than the policy's.
    """
    kl, length = of(run, "objective/kl", FEW), of(run, "rollout/length", FEW)
    if kl is None or length is None or not run.config.get("kl_coef", 1):
        return None
    per_token = kl.ends()[1] / max(1.0, length.ends()[1])
    seen = f"{kl.ends()[1]:.3g} nats per response, {per_token:.3g} per token, in the last tenth."
    if per_token < -0.05:
        return Mark(
            WARNING, "KL is negative", seen, "Sampler and trainer disagree: try --kl_estimator k3.", "objective/kl"
        )
    found = level(per_token, 0.2, 1.0)
    if found == OK:
        return Mark(OK, "KL is bounded", seen, metric="objective/kl")
    advice = "Raise --kl_coef or lower --learning_rate, and read the samples: is it still language?"
    return Mark(found, "KL is large", seen, advice, "objective/kl")


def updates_are_small(run: Recorded) -> Mark | None:
    """Of an iteration's updates, median of the last tenth: clipping 30 % of the tokens, or 0.1 nats from the old policy,
    is twice what healthy runs show.
    """
    clipped, kl = of(run, "policy/clipfrac", FEW), of(run, "policy/approxkl", FEW)
    if clipped is None or kl is None:
        return None
    seen = f"{clipped.ends()[1]:.0%} of the tokens clipped, {kl.ends()[1]:.2g} nats from the old policy, lately."
    found = max(level(clipped.ends()[1], 0.3, 0.6), level(kl.ends()[1], 0.1, 0.5), key=(OK, WARNING, BAD).index)
    if found == OK:
        return Mark(OK, "Updates are small", seen, metric="policy/clipfrac")
    advice = "Lower --learning_rate or --num_ppo_epochs."
    return Mark(found, "Updates are large", seen, advice, "policy/clipfrac")


def entropy_lives(run: Recorded) -> Mark | None:
    """Against the first tenth: at a fifth exploration is nearly over, at a twentieth it is."""
    entropy = of(run, "objective/entropy", FEW)
    if entropy is None:
        return None
    first, last = entropy.ends()
    found = level(last / max(first, 1e-12), 0.2, 0.05)
    seen = f"From {first:.3g} to {last:.3g} nats per token."
    if found == OK:
        return Mark(OK, "Entropy is alive", seen, metric="objective/entropy")
    advice = "The policy says one thing only: raise --kl_coef, lower --learning_rate, or stop if the accuracy is good."
    return Mark(found, "Entropy collapses", seen, advice, "objective/entropy")


def values_explain(run: Recorded) -> Mark | None:
    """Median of the last third: at 0 the value model is no better than a constant."""
    explained = of(run, "val/explained_variance", 2 * FEW)
    if explained is None:
        return None
    lately = explained.ends(1 / 3)[1]
    seen = f"{lately:.2f} in the last third."
    if lately > 0:
        return Mark(OK, "The value model explains returns", seen, metric="val/explained_variance")
    advice = "Let it learn first (--value_warmup_steps), or raise --value_learning_rate."
    return Mark(WARNING, "The value model explains nothing", seen, advice, "val/explained_variance")


# --- responses --------------------------------------------------------------------------------------------------------


def responses_end(run: Recorded) -> Mark | None:
    """The share that ends by itself. Below 80 % the verifier judges fragments; below half training is on fragments."""
    rate = of(run, "rollout/stop_rate", FEW)
    if rate is None:
        return None
    first, last = rate.ends()
    found = level(last, 0.8, 0.5)
    seen = f"{last:.0%} ended by themselves lately, {first:.0%} at the start."
    if found == OK:
        return Mark(OK, "Responses end", seen, metric="rollout/stop_rate")
    advice = "Raise --response_length, or punish truncation with --missing_eos_penalty."
    return Mark(found, "Responses are cut off", seen, advice, "rollout/stop_rate")


def responses_differ(run: Recorded) -> Mark | None:
    """Of the last responses that were kept, to different prompts: half of them alike is suspicious, all alike is a
    collapse.
    """
    last = [row for row in run.samples if isinstance(row.get("prompt"), str)][-8:]
    asked = {row["prompt"]: row["response"].strip() for row in last}  # one response to a prompt
    if len(asked) < 4:
        return None
    share = len(set(asked.values())) / len(asked)
    found = BAD if len(set(asked.values())) == 1 else level(share, 0.5, 0.0)
    seen = f"{len(set(asked.values()))} different responses to the last {len(asked)} different prompts that were kept."
    if found == OK:
        return Mark(OK, "Responses differ", seen)
    return Mark(found, "Responses are alike", seen, "Read them below: has it found one answer that is rewarded?")


def verdicts_are_given(run: Recorded) -> Mark | None:
    """A response without a verdict is left out of the update; above 1 % the run stops itself."""
    errors = of(run, "rollout/errors")
    if errors is None:
        return None
    total = int(errors.values.sum())
    if not total:
        return Mark(OK, "All responses were verified", "No verdict failed.", metric="rollout/errors")
    seen = f"{total:,} verdicts failed, in {int((errors.values > 0).sum()):,} {run.unit}s."
    advice = "Give those rows to launch.verify, which prints the reason for each."
    return Mark(WARNING, "Some responses could not be verified", seen, advice, "rollout/errors")


# --- the machine ------------------------------------------------------------------------------------------------------


def gradients_are_calm(run: Recorded) -> Mark | None:
    """After the first tenth (warm-up): ten times the median is a spike, and clipping is for that; a hundred times, or a
    spike in every twentieth step, is an unstable run.
    """
    norm = of(run, "grad_norm", 2 * FEW)
    if norm is None:
        return None
    settled = norm.values[len(norm) // 10 :]
    steps, median = norm.steps[len(norm) // 10 :], float(np.median(settled))
    if not median > 0:
        return None
    spikes, most = settled > 10 * median, float(settled.max()) / median
    if not spikes.any():
        return Mark(OK, "Gradients are calm", f"At most {most:.1f} times their median.", metric="grad_norm")
    found = BAD if most > 100 or (spikes.sum() > 2 and spikes.mean() > 0.05) else WARNING
    seen = f"{int(spikes.sum()):,} spikes, the largest {most:,.0f} times the median, at {run.unit} {steps[settled.argmax()]}."
    advice = "Look at the data of that step; lower --max_grad_norm or --learning_rate if it recurs."
    return Mark(found, "Gradient norm spikes", seen, advice, "grad_norm")


def speed_holds(run: Recorded) -> Mark | None:
    """Median of the last quarter against the first, without the first rows, which hold the start: a third slower is
    more than longer responses and a busy neighbour explain; half is a fault.
    """
    speed = of(run, "perf/tokens_per_second_per_gpu", 3 * FEW)
    if speed is None:
        return None
    settled = Series(speed.steps[2:], speed.values[2:])
    first, last = settled.ends(0.25)
    found = level(last / max(first, 1e-12), 2 / 3, 0.5)
    seen = f"From {first:,.0f} to {last:,.0f} tokens/s per rank."
    name = "perf/tokens_per_second_per_gpu"
    if found == OK:
        return Mark(OK, "Speed holds", seen, metric=name)
    advice = "Is the machine shared, hot, or short of memory? --profile shows where a step goes."
    return Mark(found, "Throughput drops", seen, advice, name)


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
