"""A decoder of transformers on the mesh: built on the meta device, adapted, sharded, and filled from safetensors."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from engine.disk import disguised_in
from engine.errors import UserError
from engine.model import attention, limits, weights
from engine.model.adapters import files as adapter_files
from engine.model.adapters import lora
from engine.model.adapters.lora import Adapters
from engine.model.policy import Policy, Root, ValueModel
from engine.model.probe import check_packing
from engine.world import World

AnyRoot = TypeVar("AnyRoot", bound=Root)
CAUSAL = "whose config.json has an architecture ...ForCausalLM"
GENERATES = re.compile("CausalLM|LMHead")
MIXING = {"full_attention", "sliding_attention"}  # layer types that mix tokens only through the registered attention


@dataclass(frozen=True)
class How:
    """How a root is held and computed: compute dtype, attention backend, head, dtype of the masters, and what is
    adapted.
    """

    dtype: torch.dtype
    backend: str
    head: str = "fused"
    master: torch.dtype = torch.float32
    adapters: Adapters | None = None
    rows_there: int | None = None  # that the checkpoint has for tokens, where the model has more (--add_special_tokens)
    untied: bool = False  # embedding and head are one tensor in the checkpoint and two in the model
    start: Path | None = None  # the adapter that training starts from


def load_config(directory: Path) -> Any:
    """The decoder's configuration. Raises UserError for what Triptych does not train, by name."""
    if not (directory / "config.json").is_file() and (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} is an adapter: give the model it was trained on, and this to --adapter_name_or_path"
        )
    if not directory.is_file() and not (directory / "config.json").is_file():  # a plan has the file alone
        raise UserError(f"{directory}: no config.json{_instead(directory)}")
    described = directory if directory.is_file() else directory / "config.json"
    if not (hint := disguised_in(directory)):
        limits.check_numbers(described, limits.read_json(described))
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a configuration's own checks raise whatever they do: the user reads one line
        why = hint or "no usable config.json"
        raise UserError(f"{directory}: {why} ({' '.join(str(error).split())[:200] or type(error).__name__})") from None
    if config.dtype is not None and not isinstance(config.dtype, torch.dtype):
        raise UserError(f"{described}: dtype: expected the name of one, got {str(config.dtype)[:40]}")
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    if getattr(config, "is_encoder_decoder", False) or _is_encoder(config):
        raise UserError(f"{directory}: {name} is no decoder: an encoder writes no text; give a model {CAUSAL}")
    layer_types = set(getattr(config, "layer_types", None) or ())
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{directory}: {name} is not a decoder that AutoModelForCausalLM knows; give a model {CAUSAL}")
    if config.get_text_config() is not config:
        raise UserError(f"{directory}: {name} is multimodal; only its text decoder, saved by itself, can be trained")
    if not layer_types <= MIXING:
        raise UserError(
            f"{directory}: {name} mixes tokens by {', '.join(sorted(layer_types - MIXING))}; only attention can be"
            " packed"
        )
    return config


def layers_of(config: Any) -> int:
    """How many layers a configuration describes."""
    return int(getattr(config, "num_hidden_layers", 0) or 0)


def _is_encoder(config: Any) -> bool:
    """Families that are encoders unless told otherwise, with weights of an encoder's head or of none."""
    names = getattr(config, "architectures", None) or ()
    return getattr(config, "is_decoder", True) is False and bool(names) and not any(map(GENERATES.search, names))


def _instead(directory: Path) -> str:
    """What a directory without a configuration holds, and what to do."""
    if any(directory.glob("*.gguf")):
        return ", but GGUF files, which are made for inference: give the model that they were made from"
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:4]) or "nothing"
    return f", but {found}: expected a directory as save_pretrained writes it"


def build_policy(config: Any, world: World, how: How) -> Policy:
    """The sharded policy on the world's device, with room for its weights and none read. Raises UserError.

    Masters in shards of 1 / world size, gradients reduced in fp32 as plain sums (FSDP's averaging is off: the launch
    file owns the denominator). With adapters, only these are trained and the model itself is held in the compute dtype
    or in 4 bits.
    """
    return _cut(Policy(_on_meta(AutoModelForCausalLM, config, how), how.head), world, how)


def load_policy(directory: Path, config: Any, world: World, how: How) -> Policy:
    """`build_policy` with the checkpoint's weights, the adapters new or from the directory `how.start`. Collective.

    Its `identity` names its numbers: the weights' fingerprint, the form of 4 bits, the adapter's digest. No rank ever
    holds the whole model. Raises UserError.
    """
    lm = _on_meta(AutoModelForCausalLM, config, how)
    weights.check_room(directory, lm)
    policy = _cut(Policy(lm, how.head), world, how)
    _fill(policy, directory, world, how)
    check_packing(policy, config, world, how.dtype, f" with the adapter {how.start}" if how.start else "")
    return policy


def load_value_config(directory: Path, vocab_size: int, rows_there: int | None = None) -> Any:
    """The configuration of a value model for a policy of this vocabulary, which one of `rows_there` grows to. Raises
    UserError.
    """
    config = load_config(directory)
    if config.vocab_size == rows_there:
        config.vocab_size = vocab_size
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


def build_value_model(config: Any, world: World, how: How) -> ValueModel:
    """As `build_policy`, of the configuration that `load_value_config` gives; under adapters the scalar head is trained
    whole.
    """
    return _cut(ValueModel(_on_meta(AutoModelForSequenceClassification, config, how)), world, how)


def load_value_model(directory: Path, world: World, how: How, vocab_size: int) -> ValueModel:
    """The sharded value model: a reward model with its head, or any decoder with a head of zeros. Collective. Raises
    UserError.
    """
    config = load_value_config(directory, vocab_size, how.rows_there)
    limits.check_layers(directory, layers_of(config), len(weights.files_by_name(directory)))
    value_model = build_value_model(config, world, how)
    grows = load_config(directory).vocab_size != vocab_size
    _fill(value_model, directory, world, how if grows else replace(how, rows_there=None))
    return value_model


def _on_meta(family: Any, config: Any, how: How) -> nn.Module:
    with torch.device("meta"):
        implementation = attention.register(how.backend)
        try:
            return family.from_config(copy.deepcopy(config), dtype=how.master, attn_implementation=implementation)
        except Exception as error:  # a configuration's numbers and names may break anything in a family's own code
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"{config.model_type}: its config.json describes no model that can be built ({why})"
            ) from None


def _cut(root: AnyRoot, world: World, how: How) -> AnyRoot:
    """Adapted, sharded, and moved from the meta device to memory that nothing has filled yet."""
    lm, adapters = root.lm.eval(), how.adapters  # eval: dropout would be randomness with a state
    root.adapters = adapters
    if adapters is not None:
        left = lora.adapt(lm, adapters, frozen=how.dtype, master=how.master)
        if left:
            world.say(
                f"not in 4 bits: {len(left)} matrices whose rows are not whole blocks of 64, or that are stacked, the"
                f" first {left[0]}"
            )
    # adapters cast themselves and the frozen weights are in the compute dtype already: FSDP gathers each tensor as it
    # is held
    root.gathered_dtype = None if adapters else how.dtype
    shard(root, lm.base_model.layers, world, root.gathered_dtype)
    root.to_empty(device=world.device)
    return root


def _fill(root: Root, directory: Path, world: World, how: How) -> None:
    """Weights from the checkpoint, adapters from `how.start` or new, and the root's identity."""
    weights.initialise_buffers(root.lm, directory)
    fingerprint = weights.stream(directory, root.lm, world, rows_there=how.rows_there, untied=how.untied)
    root.identity = root.base_weights = f"{fingerprint:016x}"
    if (adapters := root.adapters) is not None:
        start = how.start
        same = root.base_weights if isinstance(root, Policy) else None  # a value model's head is not its start's
        tensors, digest, form = adapter_files.read(start, same) if start else (None, "", adapters.form)
        if form != adapters.form:
            forms = {"": "as they are", "nf4": "in NF4", "nf4-double": "in NF4 with double quantisation"}
            held = forms.get(form, "in another form")
            world.say(f"warning: {start} was trained on weights held {held}, which are other numbers than these")
        lora.initialise(root.lm, adapters.seed, tensors)
        root.identity += (f"-{adapters.form}" if adapters.form else "") + (f"-adapter-{digest}" if digest else "")
    narrowed = how.master.itemsize < how.dtype.itemsize  # masters round what is computed with
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
