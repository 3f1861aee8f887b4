"""The policy: a decoder of transformers, built on the meta device, sharded, and filled from safetensors.

`Policy` is the FSDP root: body and head run inside its forward, so that every parameter is a plain tensor when it is
used.

T tokens of the stream · R rows that count · D hidden · V vocabulary.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from engine import adapters as adapter_files
from engine import attention, lora, weights
from engine.batch import MicroBatch, micro_batch
from engine.errors import UserError
from engine.lora import Adapters
from engine.shards import local
from engine.world import World
from losses.logprobs import (
    LogitTransform,
    LossOfLogprobs,
    linear_argmax,
    linear_logprobs,
    linear_loss,
    naive_logprobs,
    naive_loss,
)

MIXING = {"full_attention", "sliding_attention"}  # layer types that mix tokens only through the registered attention


class Root(nn.Module):
    """An FSDP root around a model `lm` of transformers: the body, and the verbs that both kinds of root need."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        self.gradient_sync = "every"
        self.gathered_dtype: torch.dtype | None = None  # None: what is gathered travels as it is held
        self.adapters: Adapters | None = None
        self.base_weights = ""  # the fingerprint of what was read, without adapters
        self.identity = ""  # and of all that determines the numbers it starts with

    def hidden(self, batch: MicroBatch) -> Tensor:
        """The last hidden states of the stream's tokens, (T, D); only inside `forward`."""
        return self.lm.base_model(
            input_ids=batch.ids_T[None], position_ids=batch.positions_T[None], use_cache=False, packing=batch
        ).last_hidden_state[0]

    def sync_gradients(self, last: bool) -> None:
        """Before a micro-batch, which is the step's last or not.

        gradient_sync 'every': weights are gathered for each forward and each backward pass, gradients reduced after
        each; 'keep': weights are gathered once a step; 'last': and gradients, whole until then, reduced once.
        """
        if self.gradient_sync == "every":
            return
        self.set_reshard_after_forward(False)
        self.set_reshard_after_backward(last)
        if self.gradient_sync == "last":
            self.set_requires_gradient_sync(last)

    def release(self) -> None:
        """Frees gathered weights after forwards without a backward, so that the next forward gathers the current ones."""
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


class Policy(Root):
    """A causal language model whose forward ends in log-probs or in a loss, never in logits."""

    def __init__(self, lm: nn.Module, head: str) -> None:
        super().__init__(lm)
        self.head = head
        self.transform = _logit_transform(lm.config)
        self.temperature = 1.0  # at which log-probs are taken: in RLVR, the one at which responses are sampled

    def forward(
        self,
        batch: MicroBatch,
        loss_of_logprobs: LossOfLogprobs | None = None,
        sequences_per_group: int | None = None,
        mode: str = "logprobs",
    ) -> Tensor:
        """log p of every counted token, (R,) fp32; or, given `loss_of_logprobs`, the loss that it makes of them.

        The loss is called with the log-probs of some groups and the slice of those groups; a group is
        `sequences_per_group` consecutive sequences (2: preference pairs), or, if None, one counted token. See
        `losses.linear_loss`. mode 'entropy' gives log-probs and entropies, (2, R); 'argmax' the likeliest token at
        every counted position, (R,) int64; 'own_logits' the model's own logits of all tokens, (T, V), by the library's
        unpacked path, for `check_packing`.
        """
        if mode == "own_logits":
            return self._own_logits(batch)
        hidden_RD = self.hidden(batch).index_select(0, batch.rows_R)
        weight_VD = self.lm.get_output_embeddings().weight
        transform = self.transform.at(self.temperature)
        if mode == "argmax":
            return linear_argmax(hidden_RD, weight_VD)
        if mode == "entropy":
            return torch.stack(
                linear_logprobs(hidden_RD, weight_VD, batch.targets_R, entropy=True, transform=transform)
            )
        if loss_of_logprobs is None:
            logprobs = linear_logprobs if self.head == "fused" else naive_logprobs
            return logprobs(hidden_RD, weight_VD, batch.targets_R, transform=transform)
        loss = linear_loss if self.head == "fused" else naive_loss
        cuts = None if sequences_per_group is None else batch.cuts[::sequences_per_group] if batch.examples else (0,)
        return loss(hidden_RD, weight_VD, batch.targets_R, loss_of_logprobs, cuts, transform)

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
    """What the family does to its logits; the load-time probe refuses a family for which this is not the whole truth."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = config.logit_scale
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def load_config(directory: Path) -> Any:
    """The decoder's configuration. Raises UserError for what Triptych does not train, by name."""
    if not (directory / "config.json").is_file() and (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} is an adapter: give the model it was trained on, and this to --adapter_name_or_path"
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: no usable config.json ({str(error).splitlines()[0][:200]})") from None
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    layer_types = set(getattr(config, "layer_types", None) or ())
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{directory}: {name} is not a decoder that AutoModelForCausalLM knows")
    if config.get_text_config() is not config:
        raise UserError(f"{directory}: {name} is multimodal; only its text decoder, saved by itself, can be trained")
    if not layer_types <= MIXING:
        raise UserError(
            f"{directory}: {name} mixes tokens by {', '.join(sorted(layer_types - MIXING))}; only attention can be"
            " packed"
        )
    return config


def build(
    config: Any,
    world: World,
    *,
    dtype: torch.dtype,
    backend: str,
    head: str,
    master: torch.dtype = torch.float32,
    adapters: Adapters | None = None,
) -> Policy:
    """The sharded policy on the world's device, with room for its weights and none read. Raises UserError.

    Masters of dtype `master` in shards of 1 / world size, `dtype` for compute, gradients reduced in fp32 as plain sums
    (FSDP's averaging is off: the launch file owns the denominator). With adapters, only these are trained and the model
    itself is held in the compute dtype or in 4 bits.
    """
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=master, attn_implementation=attention.register(backend)
        )
    return _cut(Policy(lm, head), world, dtype, master, adapters)


def load(
    directory: Path,
    config: Any,
    world: World,
    *,
    dtype: torch.dtype,
    backend: str,
    head: str,
    master: torch.dtype = torch.float32,
    adapters: Adapters | None = None,
    start: Path | None = None,
) -> tuple[Policy, str]:
    """`build` with the checkpoint's weights, the adapters new or from the directory `start`. Collective.

    Returns the policy and what identifies its numbers: the weights' fingerprint, the form of 4 bits, the adapter's
    digest. No rank ever holds the whole model. Raises UserError.
    """
    policy = build(config, world, dtype=dtype, backend=backend, head=head, master=master, adapters=adapters)
    _fill(policy, directory, world, start, narrowed=master.itemsize < dtype.itemsize)
    check_packing(policy, config, world, dtype, f" with the adapter {start}" if start else "")
    return policy, policy.identity


def load_value_config(directory: Path, vocab_size: int) -> Any:
    """The configuration of a value model for a policy of this vocabulary. Raises UserError."""
    config = load_config(directory)
    if config.vocab_size != vocab_size:
        raise UserError(
            f"{directory}: the value model has a vocabulary of {config.vocab_size}, the policy one of {vocab_size}"
        )
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(
            f"{directory}: transformers has no {config.model_type} with a scalar head, which the value model needs"
        )
    config.num_labels = 1
    return config


def build_value_model(
    config: Any,
    world: World,
    *,
    dtype: torch.dtype,
    backend: str,
    master: torch.dtype = torch.float32,
    adapters: Adapters | None = None,
) -> ValueModel:
    """As `build`, of the configuration that `load_value_config` gives; under adapters the scalar head is trained whole."""
    with torch.device("meta"):
        lm = AutoModelForSequenceClassification.from_config(
            copy.deepcopy(config), dtype=master, attn_implementation=attention.register(backend)
        )
    return _cut(ValueModel(lm), world, dtype, master, adapters)


def load_value_model(
    directory: Path,
    world: World,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    backend: str,
    master: torch.dtype = torch.float32,
    adapters: Adapters | None = None,
    start: Path | None = None,
) -> ValueModel:
    """The sharded value model: a reward model with its head, or any decoder with a head of zeros. Collective. Raises
    UserError.
    """
    config = load_value_config(directory, vocab_size)
    value_model = build_value_model(config, world, dtype=dtype, backend=backend, master=master, adapters=adapters)
    _fill(value_model, directory, world, start, narrowed=master.itemsize < dtype.itemsize)
    return value_model


def _cut(root: Root, world: World, dtype: torch.dtype, master: torch.dtype, adapters: Adapters | None) -> Any:
    """Adapted, sharded, and moved from the meta device to memory that nothing has filled yet."""
    lm = root.lm.eval()  # eval: dropout would be randomness with a state
    root.adapters = adapters
    if adapters is not None:
        left = lora.adapt(lm, adapters, frozen=dtype, master=master)
        if left:
            world.say(
                f"not in 4 bits: {len(left)} matrices whose rows are not whole blocks of 64, or that are stacked, the"
                f" first {left[0]}"
            )
    # adapters cast themselves and the frozen weights are in the compute dtype already: FSDP gathers each tensor as it
    # is held
    root.gathered_dtype = None if adapters else dtype
    shard(root, lm.base_model.layers, world, root.gathered_dtype)
    root.to_empty(device=world.device)
    return root


def _fill(root: Root, directory: Path, world: World, start: Path | None, narrowed: bool) -> None:
    """Weights from the checkpoint, adapters from `start` or new, and the root's identity; `narrowed`: masters round
    what is computed with.
    """
    weights.initialise_buffers(root.lm, directory)
    root.identity = root.base_weights = f"{weights.stream(directory, root.lm, world):016x}"
    if (adapters := root.adapters) is not None:
        same = (
            root.base_weights if isinstance(root, Policy) else None
        )  # a value model has another head than what it starts from
        tensors, digest, form = adapter_files.read(start, same) if start else (None, "", adapters.form)
        if form != adapters.form:
            form = {"": "as they are", "nf4": "in NF4", "nf4-double": "in NF4 with double quantisation"}.get(
                form, "in another form"
            )
            world.say(f"warning: {start} was trained on weights held {form}, which are other numbers than these")
        lora.initialise(root.lm, adapters.seed, tensors)
        root.identity += (f"-{adapters.form}" if adapters.form else "") + (f"-adapter-{digest}" if digest else "")
    root.identity += "-rounded" if narrowed else ""


def shard(root: nn.Module, layers: nn.ModuleList, world: World, dtype: torch.dtype | None) -> None:
    """fully_shard on every decoder layer and the root, with sums instead of averages; dtype None: no cast before the
    gathering.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=precision)
    fully_shard(root, mesh=world.mesh, mp_policy=precision)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def choose_gradient_sync(
    requested: str, root: Root, world: World, models: int = 1, working: int = 0
) -> tuple[str, str]:
    """(mode, why) of `Root.sync_gradients`: the one of the fewest collectives that fits.

    last: whole weights in the dtype they travel in, and fp32 gradients of what is trained, take at most half of the
    memory that this rank's shards of weights, gradients and moments and `working` bytes (activations, the head) leave;
    keep: the weights alone do; else every. Times `models` where so many like `root` are trained at once. One rank
    gathers nothing, but FSDP casts and copies all weights for every pass: on a GPU it keeps the copy where that fits,
    on a CPU memory counts for more. Reckoned from sizes, not measured: a run that resumes must choose the same.
    """
    if requested != "auto":
        return requested, "as asked"
    alone = world.size == 1
    if alone and not local(next(root.parameters())).is_cuda:
        return "every", "one rank has nothing to gather"
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    else:
        memory = weights.host_memory() // world.size
    memory = min(world.gather(memory))  # ranks that chose differently would wait for each other for ever
    travels = [
        root.gathered_dtype if root.gathered_dtype and p.is_floating_point() else p.dtype for p in root.parameters()
    ]
    gathered = models * sum(p.numel() * dtype.itemsize for p, dtype in zip(root.parameters(), travels, strict=True))
    gradients = models * 4 * root.num_trained
    state = (models * sum(p.numel() * p.dtype.itemsize for p in root.parameters()) + 3 * gradients) // world.size
    room = max(0, memory - state - working) / 2
    mode = "last" if not alone and gathered + gradients <= room else "keep" if gathered <= room else "every"
    return (
        mode,
        (
            f"{'one rank, which keeps or copies; ' if alone else ''}whole weights {gathered / 2**30:.3g} GiB, whole"
            f" gradients {gradients / 2**30:.3g}, room for them {room / 2**30:.3g} of {memory / 2**30:.3g}"
        ),
    )


@torch.no_grad()
def check_packing(policy: Policy, config: Any, world: World, dtype: torch.dtype, adapted: str = "") -> None:
    """Two packed sequences must have the log-probs of the model's own logits for each alone, else the model is refused
    by name.

    This catches decoders that mix tokens other than through attention (state spaces, convolutions), that read positions
    or masks in ways the packed path does not serve, or that transform logits unknown to `_logit_transform`. The root
    mean square of the difference may be 16 roundings of the compute dtype (in float32 1e-4) of the log-probs' spread.
    """
    window = getattr(config, "sliding_window", None) or 0
    lengths = (window + 5, 9) if 0 < window <= 64 else (13, 9)
    generator = np.random.Generator(np.random.Philox(key=0))
    sequences = [(generator.integers(0, config.vocab_size, n + 1), np.ones(n + 1, bool)) for n in lengths]
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    try:
        packed_R = policy(micro_batch(sequences, (0, 1), world.device))
        alone_R = []
        for i, sequence in enumerate(sequences):
            batch = micro_batch([sequence], (i,), world.device)
            logprobs_TV = policy(batch, mode="own_logits").float().log_softmax(-1)
            alone_R.append(logprobs_TV.gather(1, batch.targets_R[:, None]).squeeze(1))
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "Connection" in str(error):  # of the machine, not of the model
            raise
        raise UserError(f"{name} cannot be packed: {' '.join(str(error).split())[:200]}") from error
    finally:
        policy.release()
    expected_R = torch.cat(alone_R)
    difference = (packed_R - expected_R).square().mean().sqrt().item()
    if not math.isfinite(difference):
        raise UserError(f"{name}{adapted}: log-probs are not finite numbers")
    bound = max(16 * torch.finfo(dtype).eps, 1e-4) * max(1.0, expected_R.std().item())
    if not difference <= bound:
        raise UserError(
            f"{name} cannot be packed: log-probs of packed sequences differ from those alone by {difference:.1e} (bound"
            f" {bound:.1e})"
        )
