"""What every metric is called, its unit, and what a healthy one looks like. Unknown ones are shown all the same."""

from __future__ import annotations

import re
from dataclasses import dataclass

LEARNING, POLICY, MACHINE = "Learning", "The policy and its responses", "Optimization, speed and memory"
OTHERS = "Other metrics"
PASS_AT = re.compile(r"groups/pass_at_(\d{1,6})")
GROUPS = (LEARNING, POLICY, MACHINE, OTHERS)
TOKENS_PER_SECOND = "perf/tokens_per_second_per_gpu"


@dataclass(frozen=True)
class Metric:
    """A plot's title, unit, caption and group. `share`: in [0, 1], shown in per cent."""

    title: str
    unit: str
    caption: str
    group: str = LEARNING
    share: bool = False


def _share(title: str, of: str, caption: str, group: str = LEARNING) -> Metric:
    return Metric(title, f"% of {of}", caption, group, share=True)


PER_TOKEN, PER_ANSWER, REWARD = "nats per token", "nats per answer", "β × nats"
HELD_OUT_LOSS = Metric("Held-out loss", "nats", "Healthy: falls with the training loss; turning up is overfitting.")
ONLY_IF_USED = ("loss/kl", "rollout/masked")  # 0 throughout where no flag asks for it: not drawn
RLVR_LOSS = Metric("Loss", "", "Of the policy, under the name that every stage has. Read the scores instead.")
KNOWN = {
    "accuracy": _share("Verified accuracy", "responses", "With its 95 % interval. Healthy: leaves the first interval."),
    "objective/scores": Metric("Score", "reward", "Mean reward of the iteration's responses. Healthy: rises, noisily."),
    "loss": Metric("Loss", "nats", "What training descends. Healthy: falls fast, then slowly, and does not turn up."),
    "token_accuracy": _share("Token accuracy", "tokens", "Next tokens guessed right. Healthy: rises."),
    "rewards/accuracies": _share(
        "Reward accuracy", "pairs", "Whose chosen answer gained more. Healthy: climbs; at once 100 % is too easy."
    ),
    "logps/accuracies": _share(
        "Preference for the chosen answer", "pairs", "Whose chosen answer is likelier per token. Healthy: rises."
    ),
    "rewards/margins": Metric(
        "Reward margin", REWARD, "Chosen minus rejected; 0 before the first update. Healthy: rises, then flattens."
    ),
    "rewards/chosen": Metric(
        "Reward of chosen answers", REWARD, "β × log-ratio to the reference. Healthy: does not sink far below 0."
    ),
    "rewards/rejected": Metric(
        "Reward of rejected answers", REWARD, "β × log-ratio to the reference. Healthy: sinks below the chosen one's."
    ),
    "logps/chosen": Metric(
        "Log-prob of chosen answers", PER_ANSWER, "Healthy: about level. Falling with the rejected one is unlearning."
    ),
    "logps/rejected": Metric("Log-prob of rejected answers", PER_ANSWER, "Healthy: falls."),
    "nll": Metric("NLL of chosen answers", PER_TOKEN, "Healthy: about level; a steep rise is forgetting."),
    "loss/policy": Metric("Policy loss", "", "The clipped surrogate: near 0 by construction. Read the scores instead."),
    "loss/kl": Metric(
        "KL in the loss", PER_TOKEN, "To the reference, before its weight. Healthy: grows slowly and levels off."
    ),
    "groups/signal": _share(
        "Groups that teach",
        "groups",
        "Whose responses differ in score; the others have no gradient. Healthy: not near 0.",
    ),
    "groups/all_right": _share(
        "Groups all right", "groups", "Too easy to teach any more. Healthy: rises as the policy learns."
    ),
    "groups/drawn": Metric("Groups drawn", "groups", "More than the iteration's prompts: drawn again."),
    "loss/value": Metric("Value loss", "", "Squared error of the value model. Healthy: falls, then stays low."),
    "objective/kl": Metric(
        "KL to the reference",
        "nats per response",
        "How far the policy has gone. Healthy: grows slowly and levels off.",
        POLICY,
    ),
    "objective/entropy": Metric(
        "Entropy", PER_TOKEN, "How undecided the sampler is. Healthy: falls slowly; near 0 it explores no more.", POLICY
    ),
    "rollout/length": Metric("Response length", "tokens", "Healthy: steady. A drift is worth reading.", POLICY),
    "rollout/stop_rate": _share(
        "Ended by themselves", "responses", "Not cut off at the limit. Healthy: near 100 %.", POLICY
    ),
    "length": Metric("Response length", "tokens", "Healthy: steady. A drift is worth reading.", POLICY),
    "policy/approxkl": Metric("KL of an update", PER_TOKEN, "Old to new policy. Healthy: below about 0.05.", POLICY),
    "policy/clipfrac": _share("Clipped", "tokens", "Whose ratio left the clip range. Healthy: 0 to 20 %.", POLICY),
    "val/ratio": Metric("Ratio", "π / π_old", "Mean over all updates. Healthy: within a few per cent of 1.", POLICY),
    "val/explained_variance": Metric(
        "Explained variance",
        "of the returns",
        "Of the value model; 1 is perfect, 0 a constant guess. Healthy: above 0, rising.",
        POLICY,
    ),
    "rollout/masked": Metric(
        "Not learnt from", "responses", "Without an end, by --mask_truncated. Healthy: few.", POLICY
    ),
    "rollout/age": Metric(
        "Age of the sampler's weights", "updates", "0, or 1 with --rollout_ahead from the second step on.", POLICY
    ),
    "sampler/ratio": Metric(
        "Ratio to the sampler", "π / sampler", "Mean over tokens, before any update. Healthy: 1 up to rounding.", POLICY
    ),
    "sampler/ratio_max": Metric(
        "Largest ratio to the sampler",
        "π / sampler",
        "Of a single token. Healthy: near 1; rounding is larger in bf16.",
        POLICY,
    ),
    "sampler/truncated": _share(
        "Weights cut by --tis_cap",
        "tokens",
        "Likelier to the policy than to its sampler by more. Healthy: near 0.",
        POLICY,
    ),
    "rollout/errors": Metric("Not verifiable", "responses", "Verdicts that failed. Healthy: 0.", POLICY),
    "learning_rate": Metric("Learning rate", "", "The schedule as it was applied.", MACHINE),
    "grad_norm": Metric("Gradient norm", "", "Before clipping. Healthy: settles; single spikes are clipped.", MACHINE),
    "grad_norm/value": Metric(
        "Gradient norm, value model", "", "Before clipping. Healthy: settles; single spikes are clipped.", MACHINE
    ),
    TOKENS_PER_SECOND: Metric(
        "Throughput", "tokens/s per rank", "Healthy: level. Single dips are evaluations and checkpoints.", MACHINE
    ),
    "perf/mfu": _share("MFU", "the device's FLOP/s", "Model FLOPs that were done. Healthy: level.", MACHINE),
    "perf/cache_gib": Metric("Cache in use", "GiB", "Of the first rank's sampler, at most.", MACHINE),
    "perf/set_back": Metric(
        "Set back", "times", "Responses that waited for pages, on the first rank. Healthy: few.", MACHINE
    ),
    "perf/peak_memory_gib": Metric(
        "Peak memory", "GiB", "Of rank 0, so far. Healthy: flat after the first steps.", MACHINE
    ),
    "trained_tokens": Metric("Trained tokens", "tokens per step", "Those that count in the loss.", MACHINE),
    "num_tokens": Metric("Tokens so far", "tokens", "Fed to the model since the start.", MACHINE),
}


def metric_of(name: str) -> Metric:
    """Of any name: what is known, what eval/ says of the training metric, or the name itself."""
    held_out = name.startswith("eval/")
    if name == "eval/loss":
        return HELD_OUT_LOSS
    if known := KNOWN.get(name.removeprefix("eval/")):
        title = known.title if known.title.isupper() or known.title[:3].isupper() else _lower(known.title)
        title = f"Held-out {title}" if held_out else known.title
        return Metric(title, known.unit, known.caption, known.group, known.share)
    if name.startswith("verified/"):
        return _share(f"Verified by {name[9:]}", "the reward", "Mean verdict in training. Healthy: rises, noisily.")
    if of_group := PASS_AT.fullmatch(name):
        k = of_group[1]
        caption = f"At least one of a prompt's {k} responses is right; without one it teaches nothing. Healthy: rises."
        return _share(f"Solved by one of {k}", "prompts", caption)
    group = MACHINE if name.startswith("perf/") else LEARNING if held_out else f"{OTHERS}: {prefix_of(name)}"
    return Metric(name, "", "A metric that this page has no words for, as it was written.", group.rstrip(": "))


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def prefix_of(name: str) -> str:
    return f"{name.partition('/')[0]}/" if "/" in name else ""


def order_of(names: set[str]) -> list[str]:
    """By group; in it held-out ones first, then known ones as they stand above, then by name."""
    place = {name: number for number, name in enumerate(KNOWN)}

    def key(name: str) -> tuple[int, str, bool, int, str]:
        group = metric_of(name).group
        number = GROUPS.index(group.partition(":")[0])
        known = place["objective/scores"] if name.startswith("verified/") else len(place)
        known = place["groups/all_right"] if PASS_AT.fullmatch(name) else known
        return number, group, not name.startswith("eval/"), place.get(name.removeprefix("eval/"), known), name

    return sorted(names, key=key)
