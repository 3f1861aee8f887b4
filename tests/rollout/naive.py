"""The sampler written out: every token by the library's own forward over all that is before it, one response at a time,
no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rollout import Request, SamplingParams
from rollout.choice import choose
from rollout.noise import response_key


@torch.no_grad()
def sample(
    lm: Any, requests: Sequence[Request], params: SamplingParams, *, seed: int, step: int
) -> list[tuple[list[int], str, list[float], list[float]]]:
    """(tokens, why the response ended, log-probs, log-probs at temperature 1) of each request, of a model of the
    library's.
    """
    found = []
    for request in requests:
        key = torch.tensor([response_key(seed, step, request.example, request.sample)])
        prompt = [int(i) for i in request.prompt_ids]
        limit = request.max_new_tokens or params.max_new_tokens
        tokens: list[int] = []
        logprobs: list[float] = []
        logprobs_t1: list[float] = []
        reason = ""
        while not reason:
            logits_1V = lm(torch.tensor([prompt + tokens])).logits[0, -1:].float()
            token, logprob, logprob_t1 = choose(logits_1V, params, key, torch.tensor([len(tokens)]))
            tokens.append(int(token))
            logprobs.append(float(logprob))
            logprobs_t1.append(float(logprob_t1))
            reason = "stop" if tokens[-1] in params.stop_ids else "length" if len(tokens) == limit else ""
        found.append((tokens, reason, logprobs, logprobs_t1))
    return found
