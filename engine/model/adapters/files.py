"""Adapters as files: PEFT's format in and out.

An adapter's directory has adapter_config.json and adapter_model.safetensors with `base_model.model.NAME.lora_A.weight`
(r, I) and `...lora_B.weight` (O, r), and of what is trained whole (`modules_to_save`) `base_model.model.NAME.weight`;
ours also has base.json, the fingerprint and form (dense, NF4) of the weights it was trained on and the tokens that were
added to them, and, if any were, the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine import headers
from engine.disk import fresh_directory, writing
from engine.errors import UserError, nearest
from engine.model.adapters import lora
from engine.model.adapters.lora import Adapters
from engine.model.adapters.saved import saved
from engine.model.shards import whole
from engine.run import publish
from engine.world import World

MAX_CONFIG = 2**23  # bytes
CONFIG, TENSORS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
# keys of base.json: of the frozen weights, '' or nf4 or nf4-double; --add_special_tokens with their ids
FORM, ADDED = "form", "added_tokens"
# of LoraConfig, what may be set without meaning anything but plain LoRA on the weights as they are
HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# ways to initialise that leave the model's weights alone
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<leaf>[AB])\.weight")
WHOLE = re.compile(r"base_model\.model\.(?P<name>.+)\.weight")


def read_config(directory: Path) -> dict[str, Any]:
    """Raises UserError for anything but plain LoRA."""
    try:
        if (directory / CONFIG).stat().st_size > MAX_CONFIG:
            raise ValueError
        described = json.loads((directory / CONFIG).read_text(encoding="utf-8"), object_pairs_hook=headers.once)
        kind, rank, alpha, rslora = (
            described["peft_type"],
            described["r"],
            described["lora_alpha"],
            described.get("use_rslora", False),
        )
    except headers.Unsound as why:
        raise UserError(f"{directory / CONFIG}: {why}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        there = (
            " (the adapter of a merged run is in its adapter/)" if (directory / "adapter" / CONFIG).is_file() else ""
        )
        raise UserError(f"{directory}: no usable {CONFIG} of a LoRA adapter{there}") from None
    if kind != "LORA":
        raise UserError(f"{directory}: an adapter of type {str(kind)[:20]!r}; only LoRA is read")
    # no NaN either
    numbers = type(rank) is int and 0 < rank < 2**20 and type(alpha) in (int, float) and 0 < alpha < 2**20
    if not numbers or type(rslora) is not bool:
        raise UserError(
            f"{directory / CONFIG}: r, lora_alpha and use_rslora must be a whole number, a number above 0 and a truth"
            " value"
        )
    for name, value in described.items():
        if value and (name not in HARMLESS or name in ("rank_pattern", "alpha_pattern")):
            raise UserError(f"{directory / CONFIG}: {name[:40]} is not supported, only plain LoRA of one rank")
    names = described.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{directory / CONFIG}: modules_to_save must be a list of names")
    if described.get("bias", "none") != "none":
        raise UserError(f"{directory / CONFIG}: biases stay frozen, only bias none is supported")
    if described.get("init_lora_weights") not in PLAIN_STARTS:
        raise UserError(
            f"{directory / CONFIG}: this init_lora_weights changes the model's own weights; save the adapter as plain"
            " LoRA first"
        )
    return described


def _open(directory: Path) -> Any:
    try:
        headers.read(directory / TENSORS)
        return safe_open(directory / TENSORS, framework="pt")
    except (headers.Unsound, SafetensorError, OSError) as error:
        pickled = (
            "; a pickle file would run code and is never read" if (directory / "adapter_model.bin").is_file() else ""
        )
        why = f" ({error})" if isinstance(error, headers.Unsound) else ""
        raise UserError(f"{directory}: no readable {TENSORS}{pickled}{why}") from None


def modules_of(
    directory: Path, rank: int, layers: dict[str, nn.Linear], trained_whole: dict[str, nn.Module], model: str
) -> tuple[str, ...]:
    """The layers of an adapter's file, all of them layers of this model, with fitting shapes; and it has the
    weights of `trained_whole`. Raises UserError.
    """
    found: dict[str, set[str]] = {}
    whole_modules: set[str] = set()
    with _open(directory) as f:
        for key in f.keys():  # noqa: SIM118 - a file, not a dict
            match, one = KEY.fullmatch(key), WHOLE.fullmatch(key)
            if match is not None and match["name"] in layers:
                layer = layers[match["name"]]
                expected = {"A": [rank, layer.in_features], "B": [layer.out_features, rank]}[match["leaf"]]
                found.setdefault(match["name"], set()).add(match["leaf"])
            elif one is not None and one["name"] in trained_whole:
                weight: Any = trained_whole[one["name"]].weight
                expected = list(weight.shape)
                whole_modules.add(one["name"])
            else:
                close = nearest(match["name"], list(layers)) if match else ""
                raise UserError(
                    f"{directory}: the adapter is of another model: {key} fits no linear layer of {model}"
                    f"{' and nothing in its modules_to_save' if match is None else close}"
                )
            _check_tensor(directory, key, f.get_slice(key), expected)
    if not found or any(leaves != {"A", "B"} for leaves in found.values()):
        raise UserError(f"{directory / TENSORS}: no pairs of lora_A and lora_B")
    if missing := sorted(trained_whole.keys() - whole_modules):
        raise UserError(f"{directory / TENSORS}: no weight of {missing[0]}, which is in modules_to_save")
    return tuple(name for name in layers if name in found)


def _check_tensor(directory: Path, key: str, tensor: Any, expected: list[int]) -> None:
    if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise UserError(f"{directory / TENSORS}: {key} is {tensor.get_dtype()}, not a floating dtype")
    shape = list(tensor.get_shape())
    if shape == expected:
        return
    if KEY.fullmatch(key) is None and shape[1:] == expected[1:]:
        raise UserError(
            f"{directory}: the adapter is of another vocabulary: {key} has {shape[0]} rows, this model {expected[0]};"
            " --add_special_tokens adds tokens"
        )
    raise UserError(
        f"{directory}: the adapter is of another model: {key} is {shape}, this model's layer takes {expected}"
    )


def check_added(directory: Path, added: dict[str, int]) -> None:
    """Raises UserError if the adapter says that it was trained with other tokens added than these, or other ids."""
    try:
        facts = json.loads((directory / BASE).read_text(encoding="utf-8"))
        theirs = facts.get(ADDED)
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # not ours; `read` says what is wrong with a damaged one
    if theirs is None or theirs == added:
        return
    words = lambda tokens: " ".join(map(repr, tokens)) if tokens and isinstance(tokens, dict) else "none"
    raise UserError(
        f"{directory}: the adapter was trained with --add_special_tokens {words(theirs)[:300]}, in this order; now it"
        f" is {words(added)}"
    )


def read(directory: Path, base_weights: str | None) -> tuple[Callable[[str, slice], Tensor], str, str]:
    """(of 'NAME.lora_A', or NAME of what is trained whole, some rows, in fp32; the files' digest; the form of the
    weights that it was trained on).

    Raises UserError if it says that it was trained on other weights than `base_weights` (None: not asked).
    """
    described, form = directory / BASE, ""
    if described.is_file():
        try:
            facts = json.loads(described.read_text(encoding="utf-8"))
            trained_on, form = str(facts["weights"]), str(facts.get(FORM, ""))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            raise UserError(f"{described}: not readable, delete it to use the adapter on any base that fits") from None
        if base_weights is not None and trained_on != base_weights:
            raise UserError(
                f"{directory}: the adapter was trained on other weights ({trained_on[:16]}) than this model's"
                f" ({base_weights})"
            )
    file = _open(directory)
    with open(directory / TENSORS, "rb") as f:
        digest = hashlib.file_digest(f, "sha256")
    digest.update((directory / CONFIG).read_bytes())

    def rows_of(name: str, rows: slice) -> Tensor:
        rows_RI = file.get_slice(f"base_model.model.{name}.weight")[rows].float()
        if not rows_RI.isfinite().all():
            raise UserError(f"{directory / TENSORS}: {name} holds numbers that are not finite")
        return rows_RI

    return rows_of, digest.hexdigest()[:16], form


@torch.no_grad()
def save(
    lm: Any,
    adapters: Adapters,
    directory: Path,
    world: World,
    *,
    base_name: str,
    revision: str,
    base_weights: str,
    added: dict[str, int] | None = None,
    tokenizer: Any = None,
    inside: dict[str, Path] | None = None,
    card: str = "",
) -> None:
    """Writes the trained adapter in PEFT's format, as it is held; the directory appears whole or not at all.
    Collective.

    `base_name`, `revision` ('local': none), the fingerprint `base_weights` and the tokens `added` say what it belongs
    on. `inside` are finished directories to be moved into it, under new names; `card` is its README.md.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    tensors = {}
    for name, module in lora.adapted(lm).items():
        for leaf in ("A", "B") if module.rank else ():
            tensor = whole(getattr(module, f"lora_{leaf}"))
            if world.is_main:
                tensors[f"base_model.model.{name}.lora_{leaf}.weight"] = tensor.cpu().contiguous().clone()
    for name, saved_module in saved(lm).items():
        tensor = whole(saved_module.saved_weight)
        if world.is_main:
            tensors[f"base_model.model.{name}.weight"] = tensor.cpu().contiguous().clone()

    def write() -> None:
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        described = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "revision": None if revision == "local" else revision,
            "r": adapters.rank,
            "lora_alpha": adapters.alpha,
            "use_rslora": adapters.rslora,
            "target_modules": _targets(lm, adapters),
            "modules_to_save": [name.rpartition(".")[2] for name in adapters.saved] or None,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
        (partial / CONFIG).write_text(json.dumps(described, indent=2), encoding="utf-8")
        facts = {"weights": base_weights, FORM: adapters.form, ADDED: added or {}}
        (partial / BASE).write_text(json.dumps(facts), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        publish(partial, directory, inside)

    world.on_main("adapter", lambda: _whole_or_not(partial, write))


def _whole_or_not(partial: Path, write: Callable[[], None]) -> None:
    """What `write` puts into an empty directory; nothing is left of it where that fails."""
    try:
        fresh_directory(partial)
        with writing(partial):
            write()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _targets(lm: Any, adapters: Adapters) -> list[str]:
    """The adapted layers as PEFT matches them: by last name where that means these layers and no other, else by full
    name.
    """
    short = {name.rpartition(".")[2] for name in adapters.modules}
    layers = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear | lora.AdaptedLinear)]
    exact = {name for name in layers if name.rpartition(".")[2] in short} == set(adapters.modules)
    return sorted(short) if exact else list(adapters.modules)
