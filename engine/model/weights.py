"""Weights in and out: safetensors streamed into shards, a fingerprint of what was read, and Hugging Face's format on
the way out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine import headers
from engine.disk import disguised
from engine.errors import UserError, nearest
from engine.model.adapters import lora
from engine.model.adapters.saved import ORIGINAL, SavedModule, checkpoint_name, vocabulary_modules
from engine.model.shards import local, local_rows
from engine.world import World

INDEX = "model.safetensors.index.json"
MIX_ELEMENTS = 2**22
ROWS_TO_ADD = 2**12  # of an embedding that are in memory at a time
SCALAR_HEAD = "score.weight"


def resolve(name_or_path: str, revision: str | None, flag: str = "--model_name_or_path") -> tuple[Path, str]:
    """(local directory, resolved revision or 'local') of a model: a directory as it is, a hub id downloaded once."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path), "local"
    parent = Path(name_or_path).parent
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1 or parent.is_dir():
        siblings = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise UserError(f"{flag} {name_or_path}: no such directory{nearest(name_or_path, siblings)}")
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            name_or_path, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        )
    except Exception as error:
        # the hub's client raises its transport's own errors: whatever it is, the user reads one line
        raise UserError(
            f"{flag} {name_or_path}: neither a directory nor to be had from the hub ({type(error).__name__}: no"
            " network, no such id, or no leave to read it); give a directory, or log in by `hf auth login`"
        ) from None
    return Path(directory), Path(directory).name


# --- in ---------------------------------------------------------------------------------------------------------------


def files_by_name(directory: Path) -> dict[str, Path]:
    """Tensor name → file, of a model directory with one safetensors file or several and an index, all of whose headers
    are sound. An index names files beside it (which may be links, as the hub's cache has them). Raises UserError.
    """
    single, index = directory / "model.safetensors", directory / INDEX
    if index.is_file():
        weight_map = _weight_map(index)
        found = {file: header(directory / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in found[file]:
                raise UserError(f"{index}: weight_map: {name[:80]} is not in {file}{nearest(name, found[file])}")
        for file, entries in found.items():
            if lost := next((name for name in entries if weight_map.get(name) != file), None):
                raise UserError(f"{index}: weight_map: {lost[:80]} of {file} is not named, or named elsewhere")
        return {name: directory / file for name, file in weight_map.items()}
    if single.is_file():
        return dict.fromkeys(header(single), single)
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(directory.glob(pattern))]
    why = "is the download complete?"
    if pickles:
        why = (
            f"{pickles[0]}: a pickle file would run code and is never read: save the model again by save_pretrained,"
            " which writes safetensors"
        )
    raise UserError(f"{directory}: no model.safetensors and no {INDEX}; {why}")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → the name of a file beside the index. Raises UserError."""
    try:
        if index.stat().st_size > headers.MAX_HEADER:
            raise headers.Unsound("larger than 32 MiB")
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=headers.once)["weight_map"]
        if not isinstance(weight_map, dict):
            raise TypeError
    except headers.Unsound as why:
        raise UserError(f"{index}: not an index of safetensors files ({why})") from None
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        raise UserError(f"{index}: not an index of safetensors files") from None
    texts = all(isinstance(file, str) for file in weight_map.values())
    for file in set(weight_map.values()) if texts else weight_map.values():
        plain = isinstance(file, str) and Path(file).name == file and "\0" not in file
        if not plain or not (index.parent / file).is_file():
            raise UserError(f"{index}: weight_map: names {str(file)[:200]}, which is not a file beside it")
    return weight_map


def header(path: Path) -> Mapping[str, headers.Entry]:
    """Name → tensor, of a safetensors file whose header is sound. Raises UserError."""
    try:
        return headers.read(path)
    except (headers.Unsound, OSError) as why:
        raise UserError(f"{path}: {disguised(path) or f'not a readable safetensors file ({why})'}") from None


def _open(path: Path):
    header(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {disguised(path) or f'not a readable safetensors file ({error})'}") from None


def initialise_buffers(lm: Any, directory: Path) -> None:
    """Fills buffers that no checkpoint holds (rotary frequencies, embedding scales), by the family's own
    initialiser.
    """
    for name, module in lm.named_modules():
        transient = [b for b in module._non_persistent_buffers_set if module._buffers[b] is not None]
        for b in transient:
            if module._buffers[b].is_floating_point():
                module._buffers[b].fill_(float("nan"))
        if transient:
            lm._init_weights(module)
        for b in transient:
            if module._buffers[b].isnan().any():
                raise UserError(f"{directory}: {type(lm).__name__} does not say how to fill its buffer {name}.{b}")


@torch.no_grad()
def stream(directory: Path, lm: Any, world: World, *, rows_there: int | None = None, untied: bool = False) -> int:
    """Copies the checkpoint into this rank's shards, tensor by tensor and slice by slice; 4-bit layers quantise theirs
    as it comes.

    Returns the fingerprint of what was read (as float32, whatever dtype or form holds it). Collective. Adapters are
    left alone, but what is trained whole starts as it is read. Given `rows_there`, embedding and head have so many rows
    in the checkpoint and more in `lm`: each further one is the mean of those (`mean_row`), and counts as read.
    `untied`: the head starts as the embedding, whatever the checkpoint has under its name. A scalar head
    (`score.weight`) that the checkpoint lacks starts at 0, and a language-model head that `lm` lacks is left where it
    is. Raises UserError for other missing, unexpected or misshapen tensors. Checkpoints whose names differ from the
    module's (older layouts, mixtures of experts) go through transformers' own loader instead, which holds the model in
    host memory once a rank.
    """
    files = files_by_name(directory)
    own, also, tied = _targets(lm)
    vocabulary = [f"{name}.weight" for name in vocabulary_modules(lm)]
    if untied and len(vocabulary) == 2:
        embedding, head = vocabulary
        also[embedding] = [*also.get(embedding, ()), own.pop(head), *also.pop(head, ())]
        tied.add(head)
    if SCALAR_HEAD in own and SCALAR_HEAD not in files:
        own.pop(SCALAR_HEAD).zero_()
        tied.add("lm_head.weight")
    missing, unexpected = sorted(own.keys() - files.keys()), sorted(files.keys() - own.keys() - tied)
    unexpected = [name for name in unexpected if not name.endswith("rotary_emb.inv_freq")]
    if missing or unexpected:
        source = _through_transformers(directory, lm, list(own), missing, unexpected)
    else:
        source = _by_slices(files, own)
    fingerprint, problem = 0, ""
    for name, read in source:
        target = own[name]
        four_bit = isinstance(target, lora.AdaptedLinear)
        rows = local_rows(target.codes if four_bit else target)
        expected = (target.out_features, target.in_features) if four_bit else tuple(target.shape)
        there = rows_there if name in vocabulary else None
        if there is not None:
            expected = (there, *expected[1:])
        shape, piece = read(rows if there is None else slice(min(rows.start, there), min(rows.stop, there)))
        if tuple(shape) != expected:
            raise UserError(f"{directory}: {name} has shape {tuple(shape)}, the config says {expected}")
        if there is not None and rows.stop > (first := max(rows.start, there)):
            piece = torch.cat([piece, mean_row(read, there).expand(rows.stop - first, -1)])
        problem = problem or _unusable(name, piece, four_bit or target.is_floating_point())
        if four_bit:
            target.fill(piece)
        else:
            for p in (target, *also.get(name, ())):
                local(p).copy_(piece)
        piece = piece.to(world.device)
        fingerprint = (fingerprint + _mix(name, piece, rows.start * (piece[0].numel() if piece.numel() else 0))) % 2**64
    if problem := next(filter(None, world.gather(problem)), ""):
        raise UserError(f"{directory}: {problem}")
    parts = torch.tensor(
        [fingerprint - 2**64 if fingerprint >= 2**63 else fingerprint], dtype=torch.int64, device=world.device
    )
    return int(world.sum(parts).item()) % 2**64


def _unusable(name: str, piece: Tensor, floating: bool) -> str:
    """Why a tensor's numbers cannot be those of weights, or ''."""
    if piece.is_floating_point() != floating:
        kind = "a floating dtype" if floating else "whole numbers"
        return f"{name} holds {str(piece.dtype).removeprefix('torch.')}, expected {kind}"
    if not floating or piece.dtype.itemsize == 1:  # torch knows no isfinite of a float of one byte
        return ""
    lost = 0 if piece.isfinite().all() else int((~piece.isfinite()).sum())
    return f"{name} holds {lost:,} numbers that are not finite" if lost else ""


def check_room(directory: Path, lm: Any) -> None:
    """Raises UserError where a model, built without memory, has many more numbers than its files: a configuration that
    asks for what is not there is told before anything is allocated.
    """
    files = files_by_name(directory)
    found = [(name, header(path)[name]) for name, path in files.items()]
    if any(entry.dtype in ("U8", "I8", "F4", "I32") and len(entry.shape) > 1 for _, entry in found):
        return  # packed: what it holds is another matter, and is told when it is read
    there = sum(entry.elements for _, entry in found)
    sizes = {name: p.numel() for name, p in lm.named_parameters()}
    vocabulary = sum(sizes.get(f"{name}.weight", 0) for name in vocabulary_modules(lm))
    wanted = sum(sizes.values())
    if wanted > there + 2 * vocabulary and wanted > 1.5 * there:
        largest = max((name for name in sizes), key=lambda name: sizes[name])
        raise UserError(
            f"{directory}: config.json describes {wanted:,} numbers, the files hold {there:,}: the largest tensor is"
            f" {largest} with {sizes[largest]:,}"
        )
    if vocabulary > 4 * there:
        raise UserError(
            f"{directory}: config.json: vocab_size x hidden_size is {vocabulary:,} numbers, the files hold {there:,}"
        )


def _targets(lm: Any) -> tuple[dict[str, Any], dict[str, list[Any]], set[str]]:
    """By a checkpoint's names: (tensors to fill, and 4-bit layers, which take their matrix; of these names tensors that
    take the same; names of tensors that are another's).
    """
    own: dict[str, Any] = {}
    also: dict[str, list[Any]] = {}
    for name, p in lm.named_parameters():
        path, _, leaf = name.rpartition(".")
        layer = lm.get_submodule(path)
        four_bit = isinstance(layer, lora.AdaptedLinear) and layer.four_bit
        if name.endswith(".codes") and four_bit:
            own[name.removesuffix("codes") + "weight"] = layer
        elif isinstance(layer, SavedModule):
            if leaf == "saved_weight":
                own[f"{path}.weight"] = p
        elif ORIGINAL in name:
            also.setdefault(checkpoint_name(name), []).append(p)
        elif not (isinstance(layer, lora.AdaptedLinear) and name.endswith(lora.OWN)):
            own[name] = p
    persistent = {checkpoint_name(name) for name in lm.state_dict(keep_vars=True)}
    own |= {name: b for n, b in lm.named_buffers() if (name := checkpoint_name(n)) in persistent}
    return own, also, {name for name in persistent if name not in own and not name.endswith(lora.OWN)}


def mean_row(read: Callable[[slice], tuple[Any, Tensor]], rows: int) -> Tensor:
    """(1, D) the mean of a tensor's rows, in its dtype: what a new token starts with, the same for every sharding.

    Added in float64, row after row and by one thread, so that the number of threads does not decide a bit. The library
    draws new rows around the same mean; no draw is needed here: equal rows part at the first step, since no two tokens
    stand in the same places.
    """
    total, dtype = np.zeros(0), torch.float32
    for start in range(0, rows, ROWS_TO_ADD):
        _, piece = read(slice(start, min(start + ROWS_TO_ADD, rows)))
        part = np.add.reduce(piece.double().numpy(), axis=0)
        total, dtype = (part if start == 0 else total + part), piece.dtype
    return torch.from_numpy(total / rows)[None].to(dtype)


def _by_slices(files: dict[str, Path], own: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    by_file: dict[Path, list[str]] = {}
    for name in own:
        by_file.setdefault(files[name], []).append(name)
    for path, names in by_file.items():
        with _open(path) as f:
            for name in names:
                tensor = f.get_slice(name)
                yield (
                    name,
                    lambda rows, tensor=tensor: (
                        tensor.get_shape(),
                        tensor[rows] if tensor.get_shape() else tensor[...],
                    ),
                )


def _through_transformers(
    directory: Path, lm: Any, wanted: list[str], missing: list[str], unexpected: list[str]
) -> Iterator[tuple[str, Any]]:
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory}: an adapter_config.json beside the model, which transformers would load in its place:"
            " take it out, or give the adapter to --adapter_name_or_path"
        )
    config = type(lm.config).from_pretrained(directory)
    try:
        whole, report = type(lm).from_pretrained(
            directory, config=config, dtype="auto", output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{directory}: {str(error).splitlines()[0][:200]}") from None
    lost = {
        name if isinstance(name, str) else name[0] for name in (*report["missing_keys"], *report["mismatched_keys"])
    } & set(wanted)
    if lost:
        name = min(lost)
        raise UserError(f"{directory}: tensor {name} is missing or has another shape{nearest(name, unexpected)}")
    if nowhere := sorted(set(report["unexpected_keys"]) & set(unexpected)):
        raise UserError(f"{directory}: {type(lm).__name__} has no place for {len(nowhere)} tensors, as {nowhere[0]}")
    state = dict(whole.named_parameters()) | dict(whole.named_buffers())
    for name in wanted:
        yield (
            name,
            lambda rows, name=name: (
                state[name].shape,
                state[name].detach()[rows] if state[name].dim() else state[name],
            ),
        )


def _mix(name: str, piece: Tensor, offset: int) -> int:
    """sum over elements of a 64-bit hash of (name, index, bits in float32), modulo 2^64: the same for every
    sharding.
    """
    salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
    flat = piece.reshape(-1)
    total = 0
    for start in range(0, len(flat), MIX_ELEMENTS):  # a few temporaries of 32 MiB, whatever the tensor
        x = flat[start : start + MIX_ELEMENTS]
        x = (x.float().view(torch.int32) if x.is_floating_point() else x).to(torch.int64)
        index = torch.arange(offset + start, offset + start + len(x), device=x.device)
        x = (x * -7046029254386353131) ^ (index * -4417276706812531889 + salt)
        x = (x ^ (x >> 32)) * -8796714831421723037
        x = (x ^ (x >> 29)) * -4417276706812531889
        total += int((x ^ (x >> 32)).sum().item())
    return total % 2**64


# --- out --------------------------------------------------------------------------------------------------------------
