"""The roots of FSDP: a policy, whose forward ends in log-probs or in a loss and never in logits, and a value model.

Body and head run inside the root's forward, so that every parameter is a plain tensor when it is used. A policy has
several verbs, all of which go through that one forward:

    policy.logprobs(batch)                log p of every counted token, (R,) fp32
    policy.loss(batch, loss_of_logprobs)  the loss that a function makes of them, a scalar
    policy.logprobs_and_entropy(batch)    log-probs and entropies, (2, R) fp32
    policy.argmax(batch)                  the likeliest token at every counted position, (R,) int64

T tokens of the stream · R rows that count · D hidden · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from engine.data.batch import MicroBatch
from engine.model import attention
from engine.model.adapters import lora
from engine.model.adapters.lora import Adapters
from engine.model.shards import local
from losses.logprobs import (
    LogitTransform,
    LossOfLogprobs,
    linear_argmax,
    linear_logprobs,
    linear_loss,
    naive_logprobs,
    naive_loss,
)


class Root(nn.Module):
    """An FSDP root around a model `lm` of transformers: the body, and the verbs that both kinds of root need."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm: Any = lm  # a decoder of transformers, whose members a type checker cannot know
        self.gradient_sync = "every"
        self.rounds_up = False  # compiled layers take streams of few lengths
        self.gathered_dtype: torch.dtype | None = None  # None: what is gathered travels as it is held
        self.adapters: Adapters | None = None
        self.base_weights = ""  # the fingerprint of what was read, without adapters
        self.identity = ""  # and of all that determines the numbers it starts with

    def hidden(self, batch: MicroBatch) -> Tensor:
        """The last hidden states of the stream's tokens, (T, D); only inside `forward`."""
        stream = batch.rounded_up() if self.rounds_up else batch
        ids_1T, positions_1T = stream.ids_T[None], stream.positions_T[None]
        body = self.lm.base_model
        return body(input_ids=ids_1T, position_ids=positions_1T, use_cache=False, packing=stream).last_hidden_state[0]

    def sync_gradients(self, last: bool) -> None:
        """Before a micro-batch, which is the step's last or not.

        gradient_sync 'every': weights are gathered for each forward and each backward pass, gradients reduced after
        each; 'keep': weights are gathered once a step; 'last': and gradients, whole until then, reduced once.
        """
        if self.gradient_sync == "every":
            return
        cut: Any = self  # fully_shard has made it an FSDPModule
        cut.set_reshard_after_forward(False)
        cut.set_reshard_after_backward(last)
        if self.gradient_sync == "last":
            cut.set_requires_gradient_sync(last)

    def release(self) -> None:
        """Frees gathered weights after forwards without a backward, so that the next forward gathers the current
        ones.
        """
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def num_parameters(self) -> int:
        """Numbers of the model, however it holds them, adapters not counted."""
        return lora.count(self.lm)[1]

    @property
    def bytes_held(self) -> int:
        """Of this rank's shards."""
        return sum(local(p).nbytes for p in self.parameters())

    @property
    def num_trained(self) -> int:
        return lora.count(self.lm)[0]


class Released(Protocol):
    """What holds gathered weights after a forward pass without a backward pass."""

    def release(self) -> None:
        """Frees them."""


def release(*roots: Released | None) -> None:
    """Frees what these have gathered."""
    for root in roots:
        if root is not None:
            root.release()


class Policy(Root):
    """A causal language model whose forward ends in log-probs or in a loss, never in logits."""

    def __init__(self, lm: nn.Module, head: str) -> None:
        super().__init__(lm)
        self.head = head
        self.transform = _logit_transform(lm.config)
        self.temperature = 1.0  # at which log-probs are taken: in RLVR, the one at which responses are sampled

    def forward(self, batch: MicroBatch, verb: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """What a verb below computes, inside FSDP's hooks: weights are gathered around it. Collective, also without
        work.
        """
        return verb(batch, *arguments)

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """log p of every counted token, (R,) fp32."""
        return self(batch, self._logprobs)

    def loss(
        self, batch: MicroBatch, loss_of_logprobs: LossOfLogprobs, sequences_per_group: int | None = None
    ) -> Tensor:
        """The scalar that `loss_of_logprobs` makes of the log-probs.

        It is called with the log-probs of some groups and the slice of those groups; a group is `sequences_per_group`
        consecutive sequences (2: preference pairs), or, if None, one counted token. See `losses.linear_loss`.
        """
        return self(batch, self._loss, loss_of_logprobs, sequences_per_group)

    def logprobs_and_entropy(self, batch: MicroBatch) -> Tensor:
        """log p and entropy of every counted token, (2, R) fp32."""
        return self(batch, self._logprobs_and_entropy)

    def argmax(self, batch: MicroBatch) -> Tensor:
        """The likeliest token at every counted position, (R,) int64."""
        return self(batch, self._argmax)

    def own_logits(self, batch: MicroBatch) -> Tensor:
        """The model's own logits of all tokens, (T, V), by the library's unpacked path: what packing must agree
        with.
        """
        return self(batch, self._own_logits)

    # --- inside forward -----------------------------------------------------------------------------------------------

    def _head(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor, LogitTransform]:
        """(hidden states of the counted positions, the head's weight, targets, what the family does to its logits)."""
        hidden_RD = self.hidden(batch).index_select(0, batch.rows_R)
        weight_VD = self.lm.get_output_embeddings().weight
        return hidden_RD, weight_VD, batch.targets_R, self.transform.at(self.temperature)

    def _logprobs(self, batch: MicroBatch) -> Tensor:
        hidden_RD, weight_VD, targets_R, transform = self._head(batch)
        logprobs = linear_logprobs if self.head == "fused" else naive_logprobs
        out_R: Any = logprobs(hidden_RD, weight_VD, targets_R, transform=transform)
        return out_R

    def _loss(self, batch: MicroBatch, loss_of_logprobs: LossOfLogprobs, sequences_per_group: int | None) -> Tensor:
        hidden_RD, weight_VD, targets_R, transform = self._head(batch)
        loss = linear_loss if self.head == "fused" else naive_loss
        cuts = None
        if sequences_per_group is not None:
            cuts = batch.cuts[::sequences_per_group] if batch.examples else (0,)
        return loss(hidden_RD, weight_VD, targets_R, loss_of_logprobs, cuts, transform)

    def _logprobs_and_entropy(self, batch: MicroBatch) -> Tensor:
        hidden_RD, weight_VD, targets_R, transform = self._head(batch)
        both = linear_logprobs(hidden_RD, weight_VD, targets_R, entropy=True, transform=transform)
        return torch.stack(list(both))

    def _argmax(self, batch: MicroBatch) -> Tensor:
        hidden_RD, weight_VD, _, _ = self._head(batch)
        return linear_argmax(hidden_RD, weight_VD)

    def _own_logits(self, batch: MicroBatch) -> Tensor:
        config = self.lm.config
        config._attn_implementation = "eager"
        try:
            return self.lm(input_ids=batch.ids_T[None], use_cache=False).logits[0]
        finally:
            config._attn_implementation = attention.NAME


class ValueModel(Root):
    """A causal body with a scalar head: V(state before each counted token), (R,) fp32."""

    def forward(self, batch: MicroBatch) -> Tensor:
        score = self.lm.score
        values_R1 = score(self.hidden(batch).index_select(0, batch.rows_R).to(score.weight.dtype))
        return torch.squeeze_copy(values_R1.float(), 1)  # not a view: FSDP hangs a hook on what is returned


def _logit_transform(config: Any) -> LogitTransform:
    """What the family does to its logits; the load-time probe refuses a family for which this is not the whole
    truth.
    """
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = config.logit_scale
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))
