"""A greedy sample, to look at. It runs the whole prefix again for every token: simple, and slow; rollouts are another
matter.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.data.batch import micro_batch
from engine.data.chat import ChatTokenizer
from engine.data.store import Examples
from engine.model.policy import Policy
from engine.world import World


@torch.no_grad()
def greedy(policy: Policy, chat: ChatTokenizer, prompt_ids: np.ndarray, max_new_tokens: int, world: World) -> str:
    """The continuation of `prompt_ids` up to the end of turn, as text. Collective: every rank computes the same."""
    ids = [int(i) for i in prompt_ids]
    for _ in range(max_new_tokens):
        last = np.zeros(len(ids) + 1, bool)
        last[-1] = True
        batch = micro_batch([(np.array([*ids, 0]), last)], (0,), world.device)
        # one rank's rounding must not end another's loop
        token = int(world.broadcast(policy.argmax(batch).cpu()).item())
        if token in chat.end_ids:
            break
        ids.append(token)
    policy.release()
    return chat.tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=False)


def first_prompt(examples: Examples) -> np.ndarray:
    """The ids of the first example up to its first trained token."""
    ids, mask = examples.sequences(0)[0]
    return np.asarray(ids[: int(np.flatnonzero(mask)[0])])
