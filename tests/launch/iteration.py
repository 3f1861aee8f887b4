"""An iteration of launch.grpo once more: from its recorded responses to its weights, in float64, by transformers' own
forward pass of one sequence at a time and scalar arithmetic on what it gives.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM

from engine.data import permutation

Rows = list[list[float]]  # a number of every token of every response


def replay(out: Path, start: Path) -> tuple[torch.Tensor, list[float]]:
    """(the weights after the iteration, flat, in the order of their names, the policy's loss in each update)."""
    flags = yaml.safe_load((out / "config.yaml").read_text())
    recorded = np.load(out.parent / f"{out.name}.npz")
    lm = AutoModelForCausalLM.from_pretrained(start, attn_implementation="eager", dtype=torch.float64)
    responses = list(zip(cut(recorded, "prompt"), cut(recorded, "response"), strict=True))
    with torch.no_grad():
        old = [logprobs_of(lm, *response)[0].tolist() for response in responses]
    advantages = advantages_of(recorded, old, flags)
    learnt = [i for i, ended in enumerate(recorded["ended"]) if ended or not flags["mask_truncated"]]
    adam, losses = Adam(lm, flags), []
    for epoch in range(flags["num_ppo_epochs"]):
        order = [learnt[i] for i in permutation(len(learnt), flags["seed"], "ppo", 0, epoch)]
        for minibatch in np.array_split(order, flags["num_mini_batches"]):
            lm.zero_grad()
            weights = weights_of(minibatch, old, flags)
            surrogate = 0.0
            for i in minibatch:
                logprobs, entropies = logprobs_of(lm, *responses[i])
                loss, rest = loss_of(logprobs, old[i], advantages[i], flags)
                surrogate += weights[i] * loss.item()
                total = loss + rest - (flags["entropy_coef"] or 0.0) * entropies.sum()
                (weights[i] * total).backward()
            losses.append(surrogate)
            adam.step()
    named = sorted(lm.named_parameters())
    return torch.cat([p.detach().flatten() for _, p in named]), losses


def cut(recorded, name: str) -> list[np.ndarray]:
    return np.split(recorded[name], np.cumsum(recorded[f"{name}_lengths"])[:-1])


def logprobs_of(lm, prompt: np.ndarray, response: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, entropy) of the response's tokens."""
    ids = torch.as_tensor(np.concatenate([prompt, response]))
    every = lm(ids[None, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1)
    return every.gather(1, ids[len(prompt) :, None])[:, 0], -(every.exp() * every).sum(-1)


def advantages_of(recorded, old: Rows, flags: dict) -> Rows:
    """The reference is the policy itself in the first iteration: what a KL in the reward costs is 0."""
    scores, groups = recorded["scores"].tolist(), recorded["groups"].tolist()
    kind, found = flags["advantage"], []
    tokens = [score for score, rows in zip(scores, old, strict=True) for _ in rows]
    for i, score in enumerate(scores):
        others = [s for j, s in enumerate(scores) if groups[j] == groups[i] and j != i]
        group = [*others, score]
        if kind == "grpo":
            spread = statistics.stdev(group)
            value = (score - statistics.fmean(group)) / (spread + 1e-6) if spread else 0.0
        elif kind == "dr_grpo":
            value = score - statistics.fmean(group)
        elif kind == "rloo":
            value = score - statistics.fmean(others)
        else:
            value = (score - statistics.fmean(tokens)) / math.sqrt(statistics.variance(tokens) + 1e-8)
        found.append([value] * len(old[i]))
    if (cap := flags.get("tis_cap")) is not None:
        sampled = np.split(recorded["sampled"], np.cumsum(recorded["response_lengths"])[:-1])
        ratios = [
            [min(cap, math.exp(o - m)) for o, m in zip(*rows, strict=True)] for rows in zip(old, sampled, strict=True)
        ]
        found = [[a * r for a, r in zip(*rows, strict=True)] for rows in zip(found, ratios, strict=True)]
    return found


def weights_of(minibatch: np.ndarray, old: Rows, flags: dict) -> dict[int, float]:
    tokens, n = sum(len(old[i]) for i in minibatch), len(minibatch)
    of = {
        "token": lambda i: 1 / tokens,
        "sequence": lambda i: 1 / (n * len(old[i])),
        "dr_grpo": lambda i: 1 / (n * flags["response_length"]),
    }
    return {i: of[flags["aggregate"]](i) for i in minibatch}


def loss_of(logprobs: torch.Tensor, old: list[float], advantages: list[float], flags: dict):
    """(sum over the response of the surrogate, of what is added for the KL)."""
    low, high, dual = flags["clip_low"], flags["clip_high"], flags.get("dual_clip")
    old_R = torch.tensor(old, dtype=torch.float64)
    mean = (logprobs - old_R).mean().exp()
    losses = []
    for logprob, o, a in zip(logprobs, old, advantages, strict=True):
        rho = (logprob - o).exp() if flags["surrogate"] != "gspo" else mean
        kept = min(max(rho.item(), 1 - low), 1 + high)
        if flags["surrogate"] == "cispo":
            losses.append(-a * kept * logprob)
        elif dual is not None and a < 0 and max(-a * rho.item(), -a * kept) > -a * dual:
            losses.append(rho.detach() * 0 - a * dual)
        else:
            losses.append(-a * rho if -a * rho.item() >= -a * kept else rho.detach() * 0 - a * kept)
    surrogate, d = torch.stack(losses).sum(), logprobs - old_R
    if flags["kl_in"] != "loss":
        return surrogate, torch.zeros(())
    k3 = (-d).exp() - 1 + d
    return surrogate, flags["kl_coef"] * (k3 if flags["kl_estimator"] == "k3" else d.exp() * k3).sum()


class Adam:
    """Kingma & Ba, after clipping by the global norm."""

    def __init__(self, lm, flags: dict) -> None:
        self.parameters, self.flags, self.t = list(lm.parameters()), flags, 0
        self.m, self.v = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        rate, epsilon = self.flags["learning_rate"], self.flags["adam_epsilon"]
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in self.parameters))
        scale = min(1.0, self.flags["max_grad_norm"] / norm) if norm else 1.0
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            g = p.grad * scale
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p -= rate * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + epsilon)
