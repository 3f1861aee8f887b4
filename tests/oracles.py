"""Float64 scalar loops written from the papers: no torch reductions, no sharing with the code under test."""

from __future__ import annotations

import math


def log_softmax_at(logits: list[float], target: int) -> tuple[float, float]:
    """(log p(target), entropy) of one row."""
    top = max(logits)
    total = sum(math.exp(z - top) for z in logits)
    logs = [z - top - math.log(total) for z in logits]
    return logs[target], -sum(math.exp(lp) * lp for lp in logs)


def row_logits(
    hidden: list[float], weight: list[list[float]], scale: float = 1.0, softcap: float | None = None
) -> list[float]:
    logits = [scale * sum(h * w for h, w in zip(hidden, row, strict=True)) for row in weight]
    return logits if softcap is None else [softcap * math.tanh(z / softcap) for z in logits]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def dpo(cw: float, cl: float, rw: float, rl: float, beta: float, smoothing: float = 0.0) -> float:
    """Rafailov et al. eq. 7 with conservative label smoothing; arguments are summed log-probs (policy chosen, rejected;
    reference).
    """
    h = (cw - rw) - (cl - rl)
    return -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)


def dpo_norm(cw, cl, rw, rl, nw, nl, beta, smoothing=0.0) -> float:
    return dpo(cw / nw, cl / nl, rw / nw, rl / nl, beta, smoothing)


def simpo(cw, cl, nw, nl, beta, ratio, smoothing=0.0) -> float:
    h = beta * (cw / nw - cl / nl) - ratio * beta
    return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)


def ipo(cw, cl, rw, rl, nw, nl, beta) -> float:
    return ((cw - rw) / nw - (cl - rl) / nl - 1 / (2 * beta)) ** 2


def wpo(cw, cl, rw, rl, nw, nl, beta) -> float:
    return min(1.0, math.exp(cw / nw + cl / nl)) * dpo(cw, cl, rw, rl, beta)


def attention(q, k, v, scale, window=None, softcap=None, sink=None) -> list[list[float]]:
    """One head of one sequence: q, k, v are lists of vectors."""
    out = []
    for t, query in enumerate(q):
        first = 0 if window is None else max(0, t - window + 1)
        scores = [scale * sum(a * b for a, b in zip(query, k[s], strict=True)) for s in range(first, t + 1)]
        if softcap is not None:
            scores = [softcap * math.tanh(x / softcap) for x in scores]
        top = max(scores)
        weights = [math.exp(x - top) for x in scores]
        total = sum(weights) + (math.exp(sink - top) if sink is not None else 0.0)
        out.append([sum(w * v[first + i][d] for i, w in enumerate(weights)) / total for d in range(len(v[0]))])
    return out


def adamw(params, grads_of, steps, lr_of, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    """Loshchilov & Hutter's AdamW on a flat list of floats."""
    m, s = [0.0] * len(params), [0.0] * len(params)
    for t in range(1, steps + 1):
        for i, g in enumerate(grads_of(params, t)):
            params[i] *= 1 - lr_of(t) * decay
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            s[i] = betas[1] * s[i] + (1 - betas[1]) * g * g
            params[i] -= lr_of(t) * (m[i] / (1 - betas[0] ** t)) / (math.sqrt(s[i] / (1 - betas[1] ** t)) + eps)
    return params
