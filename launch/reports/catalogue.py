"""What every metric is called, its unit, and what a healthy one looks like. Unknown ones are shown all the same."""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT, LEARNING, POLICY = "Held out", "Loss and reward", "The policy as it moves"
RESPONSES, OPTIMIZATION, SPEED, OTHERS = "Responses", "Optimization", "Speed and memory", "Other metrics"
GROUPS = (HELD_OUT, LEARNING, POLICY, RESPONSES, OPTIMIZATION, SPEED, OTHERS)


@dataclass(frozen=True)
class Metric:
    """A plot's title, unit, group and caption. `share`: in [0, 1], shown in per cent."""

    title: str
    unit: str
    caption: str
    group: str = LEARNING
    share: bool = False


def _share(title: str, caption: str, group: str) -> Metric:
    return Metric(title, "share", caption, group, share=True)


KNOWN = {
    "loss": Metric("Loss", "nats", "What training descends. Healthy: falls fast, then slowly, and does not turn up."),
    "nll": Metric(
        "NLL of the chosen answers",
        "nats per token",
        "Of the chosen answer. Healthy: about level; a steep rise is forgetting.",
    ),
    "loss/policy": Metric(
        "Policy loss", "", "PPO's clipped surrogate. Hovers near 0 by construction: read the scores instead."
    ),
    "loss/value": Metric("Value loss", "", "Squared error of the value model. Healthy: falls, then stays low."),
    "rewards/chosen": Metric(
        "Reward of chosen answers", "nats × β", "β × log-ratio to the reference. Healthy: does not sink far below 0."
    ),
    "rewards/rejected": Metric(
        "Reward of rejected answers",
        "nats × β",
        "β × log-ratio to the reference. Healthy: sinks below the chosen one's.",
    ),
    "rewards/margins": Metric(
        "Reward margin", "nats × β", "Chosen minus rejected; 0 before the first update. Healthy: rises, then flattens."
    ),
    "rewards/accuracies": _share(
        "Reward accuracy",
        "Pairs whose chosen answer gained more. Healthy: climbs above 50 %; at once 100 % is too easy.",
        LEARNING,
    ),
    "logps/chosen": Metric(
        "Log-prob of chosen answers",
        "nats per answer",
        "Healthy: about level. Falling with the rejected one is unlearning.",
    ),
    "logps/rejected": Metric("Log-prob of rejected answers", "nats per answer", "Healthy: falls."),
    "logps/accuracies": _share(
        "Chosen likelier per token", "Pairs whose chosen answer the policy itself prefers. Healthy: rises.", LEARNING
    ),
    "objective/scores": Metric("Score", "reward", "Mean reward of the iteration's responses. Healthy: rises, noisily."),
    "objective/kl": Metric(
        "KL to the reference",
        "nats per response",
        "How far the policy has gone. Healthy: grows slowly and levels off.",
        POLICY,
    ),
    "objective/entropy": Metric(
        "Entropy",
        "nats per token",
        "How undecided the sampler is. Healthy: falls slowly; near 0 it explores no more.",
        POLICY,
    ),
    "policy/approxkl": Metric(
        "KL of an update", "nats per token", "Old to new policy. Healthy: below about 0.05.", POLICY
    ),
    "policy/clipfrac": _share("Clipped", "Tokens whose ratio left the clip range. Healthy: 0 to 20 %.", POLICY),
    "val/ratio": Metric("Ratio", "π / π_old", "Mean over all updates. Healthy: within a few per cent of 1.", POLICY),
    "val/explained_variance": Metric(
        "Explained variance", "of the returns", "Of the value model; 1 is perfect. Healthy: above 0 and rising.", POLICY
    ),
    "rollout/length": Metric(
        "Response length", "tokens", "Healthy: steady. A drift up or down is worth reading.", RESPONSES
    ),
    "rollout/stop_rate": _share(
        "Ended by themselves", "Responses that reached their end, not the limit. Healthy: near 100 %.", RESPONSES
    ),
    "rollout/errors": Metric("Not verifiable", "responses", "Verdicts that failed. Healthy: 0.", RESPONSES),
    "learning_rate": Metric("Learning rate", "", "The schedule as it was applied.", OPTIMIZATION),
    "grad_norm": Metric(
        "Gradient norm", "", "Before clipping. Healthy: settles; single spikes are clipped.", OPTIMIZATION
    ),
    "grad_norm/value": Metric(
        "Gradient norm, value model", "", "Before clipping. Healthy: settles; single spikes are clipped.", OPTIMIZATION
    ),
    "trained_tokens": Metric("Trained tokens", "tokens per step", "That count in the loss.", OPTIMIZATION),
    "num_tokens": Metric("Tokens so far", "tokens", "Fed to the model since the start.", OPTIMIZATION),
    "perf/tokens_per_second_per_gpu": Metric(
        "Throughput", "tokens/s per rank", "Healthy: level. Single dips are evaluations and checkpoints.", SPEED
    ),
    "perf/mfu": _share("MFU", "Model FLOPs done, of what the device can do. Healthy: level.", SPEED),
    "perf/peak_memory_gib": Metric(
        "Peak memory", "GiB", "Of rank 0, so far. Healthy: flat after the first steps.", SPEED
    ),
    "eval/accuracy": _share(
        "Verified accuracy",
        "On held-out prompts, with its 95 % interval. Healthy: rises, beyond the first interval.",
        HELD_OUT,
    ),
    "eval/loss": Metric(
        "Loss, held out", "nats", "Healthy: falls with the training loss; rising is overfitting.", HELD_OUT
    ),
    "eval/token_accuracy": _share("Token accuracy, held out", "Next tokens guessed right. Healthy: rises.", HELD_OUT),
    "eval/length": Metric("Response length, held out", "tokens", "Healthy: steady.", HELD_OUT),
}


def metric_of(name: str) -> Metric:
    """Of any name: what is known, what eval/ says of the training metric, or the name itself."""
    if name in KNOWN:
        return KNOWN[name]
    if name.startswith("verified/"):
        return _share(
            f"Verified by {name[9:]}", "Mean verdict of this verifier in training. Healthy: rises, noisily.", LEARNING
        )
    if name.startswith("eval/"):
        if name[5:] in KNOWN:
            of = KNOWN[name[5:]]
            return Metric(f"{of.title}, held out", of.unit, of.caption, HELD_OUT, of.share)
        return Metric(name, "", "A held-out figure that this page has no words for.", HELD_OUT)
    if name.startswith("perf/"):
        return Metric(name, "", "A figure of speed or memory that this page has no words for.", SPEED)
    return Metric(name, "", "A metric that this page has no words for: shown as it was written.", OTHERS)


def order_of(names: set[str]) -> list[str]:
    """By group, known ones first as they stand above, then by name."""
    place = {name: number for number, name in enumerate(KNOWN)}

    def key(name: str) -> tuple[int, int, str]:
        known = place.get(name, place.get(name.removeprefix("eval/"), len(place)))
        return GROUPS.index(metric_of(name).group), known, name

    return sorted(names, key=key)
