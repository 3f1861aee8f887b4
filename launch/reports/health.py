"""Rules of health: a run → a mark, ok, warning or bad, with what was seen and what to do; None: it does not apply.

Thresholds are those at which somebody who watches the run would look closer, not proofs: each says why it stands where
it does. What must hold exactly at step 0 is asserted by the run itself; here it is read again from the rows, wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from launch.reports import sampling
from launch.reports.catalogue import TOKENS_PER_SECOND
from launch.reports.marks import BAD, FEW, OK, WARNING, Mark, found, level, of
from launch.reports.runs import Recorded, Series
from launch.reports.verdict import headline, interval_at


def examine(run: Recorded) -> list[Mark]:
    """The marks of all rules that apply, the worst first."""
    marks = [mark for rule in RULES if (mark := rule(run)) is not None]
    return sorted(marks, key=lambda mark: (BAD, WARNING, OK).index(mark.level))


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
    sampling.ratio_is_near_one,
    learning_rate_is_not_zero,
    loss_falls,
    held_out_loss_does_not_turn,
    accuracy_does_not_fall,
    pairs_are_told_apart,
    chosen_stays_likely,
    sampling.rewards_vary,
    sampling.groups_differ,
    sampling.sampler_is_the_policy,
    sampling.kl_is_bounded,
    sampling.updates_are_small,
    sampling.entropy_lives,
    sampling.values_explain,
    sampling.responses_end,
    sampling.responses_differ,
    sampling.verdicts_are_given,
    gradients_are_calm,
    speed_holds,
)
