"""The reference cache: sum log pi_ref(y) of every sequence, computed once, addressed by what determines it.

A row is one sequence. Its address is a hash of its token ids and mask, inside a directory named by the model: weights
fingerprint, config, compute dtype, attention backend. So any beta, loss, order, subset or growth of a dataset finds
what is there and computes the rest, and a changed weight, template, length or dtype finds nothing. A row keeps the sum
and the number of counted tokens, which serves summed and length-normalised losses alike.

On disk: <cache_dir>/reference/<model>/header.json (readable) and segments rows-*.safetensors with `keys` (n, 16 bytes),
`logprobs` (n, fp32) and `counts` (n, int32), each carrying a checksum: a damaged segment is named and put aside, never
used.

S sequences.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from engine import headers, terminal
from engine.data.batch import MicroBatch, micro_batch, sum_by_sequence
from engine.data.packing import pack
from engine.data.store import Examples
from engine.disk import write_new, writing
from engine.errors import UserError, explained
from engine.model.open import Base
from engine.model.policy import Policy
from engine.world import World, on_device

VERSION = 1
DESCRIBED = {"sha256", "model"}  # by the metadata of a segment; a name that is none of these was one
SEQUENCES_PER_SEGMENT = 2**13  # what a run that is asked to end in the middle of one computes again

BETWEEN = 4  # micro-batches between two questions whether the run is to end
LEFT_OVER = 3600.0  # seconds after which a file under a temporary name is nobody's


class Reference:
    """sum log pi_ref of every sequence of the examples that a run uses, in host memory (4 bytes a sequence)."""

    def __init__(self, sums: np.ndarray, per_example: int, computed: int, problem: str = "") -> None:
        self.sums = sums  # fp32 (N, per_example); NaN for examples that the run does not use
        self.per_example = per_example
        self.computed = computed  # sequences that took a forward pass
        self.problem = problem  # why they are not all in the cache, or ''

    def __call__(self, batch: MicroBatch) -> Tensor:
        """(S,) fp32 on the batch's device, in the order of its sequences."""
        if not batch.examples:
            return torch.zeros(len(batch.counts_S), device=batch.ids_T.device)
        sums_S = self.sums[list(batch.examples)].reshape(-1)
        if np.isnan(sums_S).any():
            raise RuntimeError(f"no reference log-prob for an example of {batch.examples}")
        return on_device(torch.as_tensor(sums_S), batch.ids_T.device)

    def require_cached(self) -> None:
        """Raises UserError if another run would have to compute them again."""
        if self.problem:
            raise UserError(f"the reference cache is not written: {self.problem}")


def reference_logprobs(
    policy: Policy,
    base: Base,
    examples: Examples,
    used: np.ndarray,
    world: World,
    *,
    cache_dir: str,
    name: str = "reference",
) -> Reference:
    """The reference log-probs of the examples numbered `used` under `policy` as it is now, from the cache where they
    are there.

    Collective. Prints hit, partial hit (n of m) or miss with the reason. The pass writes a segment every 8,192
    sequences, so a killed one goes on where it was, with the same micro-batches. Raises Stopped, between two of them.
    """
    identity, budget = model_identity(policy.identity, base), base.memory.micro_batch_tokens
    used = np.unique(used)
    keys, counts = examples.keys(used), examples.counts(used)
    directory = (
        Path(cache_dir).expanduser()
        / "reference"
        / hashlib.sha256(json.dumps([VERSION, identity], sort_keys=True).encode()).hexdigest()[:32]
    )
    found = np.full(keys.shape, np.nan, np.float32)

    def look() -> None:
        nonlocal found
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_leftovers(directory)
        header = directory / "header.json"
        fresh = not header.is_file()
        found = _look_up(directory, keys, counts)
        world.say(f"{name}: {_verdict(directory, identity, found, fresh)}")
        described = json.dumps({"version": VERSION, "identity": identity}, indent=1).encode()
        if fresh or header.read_bytes() != described:
            _write_atomically(header, described)

    world.on_main("reference", look)
    problem = ""
    found = world.broadcast(torch.as_tensor(found)).numpy()
    missing = np.flatnonzero(np.isnan(found.reshape(-1)))
    _, first = np.unique(keys.reshape(-1)[missing], return_index=True)
    todo = missing[np.sort(first)]  # sequences that occur twice are computed once
    for start in range(0, len(todo), SEQUENCES_PER_SEGMENT):
        block = todo[start : start + SEQUENCES_PER_SEGMENT]
        found.reshape(-1)[block] = _compute(policy, examples, used, block, world, budget)
        if world.is_main and not problem:
            rows = [array.reshape(-1)[block] for array in (keys, found, counts)]
            problem = _try_to_append(directory, name, rows)
    if len(missing) > len(todo):
        by_key = dict(zip(keys.reshape(-1)[todo].tolist(), found.reshape(-1)[todo].tolist(), strict=True))
        found.reshape(-1)[missing] = [by_key[key] for key in keys.reshape(-1)[missing].tolist()]
    terminal.rest()
    policy.release()
    sums = np.full((len(examples), keys.shape[1]), np.nan, np.float32)
    sums[used] = found
    return Reference(sums, keys.shape[1], len(todo), world.gather(problem)[0])


@torch.no_grad()
def _compute(
    policy: Policy, examples: Examples, used: np.ndarray, block: np.ndarray, world: World, budget: int
) -> np.ndarray:
    """fp32 sums of the sequences numbered `block` (example-major over `used`), on every rank. Raises on numbers that
    are not finite.
    """
    per_example = len(examples.sequences(int(used[0])))
    sequences = [examples.sequences(int(used[i // per_example]))[i % per_example] for i in block]
    bins = pack([len(ids) - 1 for ids, _ in sequences], budget, world.size)[world.rank]
    order: list[int] = []
    parts: list[Tensor] = []
    for number, positions in enumerate(bins):
        if number % BETWEEN == 0:
            world.end_if_asked()
        world.phase("reference log-probs", len(order) * world.size, len(block))
        batch = micro_batch([sequences[i] for i in positions], positions, world.device)
        logprobs_R = policy.logprobs(batch)  # collective, also where the batch is a placeholder
        if positions:
            order += positions
            parts.append(sum_by_sequence(logprobs_R.double(), batch.counts_S).float())
    mine = list(zip(order, torch.cat(parts).tolist() if parts else [], strict=True))  # one wait for the device
    sums = np.full(len(block), np.nan, np.float32)
    for position, value in (pair for part in world.gather(mine) for pair in part):
        sums[position] = value
    if not np.isfinite(sums).all():
        bad = int(used[block[int(np.flatnonzero(~np.isfinite(sums))[0])] // per_example])
        raise UserError(f"the reference log-prob of example {bad} is not finite: the model or its dtype is broken")
    return sums


# --- the files --------------------------------------------------------------------------------------------------------


def _remove_leftovers(directory: Path) -> None:
    """Of runs that were killed while they wrote; others may write now."""
    for path in directory.glob(".*.*"):
        if time.time() - path.stat().st_mtime > LEFT_OVER:
            path.unlink(missing_ok=True)


def _try_to_append(directory: Path, name: str, rows: list[np.ndarray]) -> str:
    """A segment more; or a warning, once, and what went wrong: the run has its numbers."""
    try:
        _append(directory, *rows)
    except OSError as error:
        terminal.say(f"warning: {name}: not cached: {explained(error)}; this run goes on with what it computes")
        return explained(error)
    return ""


def _append(directory: Path, keys: np.ndarray, logprobs: np.ndarray, counts: np.ndarray) -> None:
    arrays = {"keys": np.frombuffer(keys.tobytes(), np.uint8).reshape(-1, 16), "logprobs": logprobs, "counts": counts}
    digest = _checksum(arrays)
    path = directory / f"rows-{digest[:16]}.safetensors"
    partial = directory / f".{path.name}.{os.getpid()}"
    try:
        partial.unlink(missing_ok=True)
        with writing(path):
            about = {"sha256": digest, "model": directory.name}
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, partial, metadata=about)
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _segments(directory: Path) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of every segment whose checksum holds; others are named and renamed out of the way."""
    for path in sorted(directory.glob("rows-*.safetensors")):
        try:
            _check_header(path)
            with safe_open(path, framework="numpy") as f:
                arrays = {name: f.get_tensor(name) for name in ("keys", "logprobs", "counts")}
                about = f.metadata() or {}
            if about.keys() - DESCRIBED:
                raise ValueError(f"its header says {', '.join(sorted(about.keys() - DESCRIBED))[:80]!r} of it")
            if about.get("sha256") != _checksum(arrays):
                raise ValueError("its checksum does not match its content")
            if about.get("model", directory.name) != directory.name:  # an earlier version wrote no model
                raise ValueError("its numbers are another model's")
        except (headers.Unsound, SafetensorError, ValueError, OSError, KeyError) as error:
            terminal.say(
                f"warning: reference: {path} is damaged ({error}); it is not used and is put aside as"
                f" {path.name}.damaged"
            )
            path.rename(path.with_name(path.name + ".damaged"))
            continue
        yield arrays


def _check_header(path: Path) -> None:
    """Raises headers.Unsound for what is no segment."""
    entries = headers.read(path)
    rows = entries["counts"].shape[:1] if "counts" in entries else ()
    expected = {"keys": ("U8", (*rows, 16)), "logprobs": ("F32", rows), "counts": ("I32", rows)}
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    if found != expected:
        raise headers.Unsound(f"holds {str(found)[:120]}, not keys, logprobs and counts of as many rows")


def _look_up(directory: Path, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """fp32 like `keys`: the cached sum where key and count match and the sum is finite, NaN elsewhere.

    Sorted and searched by the first half of the 16 bytes (integers sort a hundred times faster than byte strings), then
    compared whole; two rows that agree in the first half would cost a forward pass, not a wrong number.
    """
    found = np.full(keys.size, np.nan, np.float32)
    wanted = np.frombuffer(keys.tobytes(), "<u8").reshape(-1, 2)
    for arrays in _segments(directory):
        have = np.frombuffer(np.ascontiguousarray(arrays["keys"]).tobytes(), "<u8").reshape(-1, 2)
        if not len(have):
            continue
        order = np.argsort(have[:, 0])
        place = order[np.minimum(np.searchsorted(have[order, 0], wanted[:, 0]), len(have) - 1)]
        hit = (
            (have[place] == wanted).all(1)
            & (arrays["counts"][place] == counts.reshape(-1))
            & np.isfinite(arrays["logprobs"][place])
        )
        found[hit] = arrays["logprobs"][place[hit]]
    return found.reshape(keys.shape)


def _verdict(directory: Path, identity: dict[str, str], found: np.ndarray, fresh: bool) -> str:
    have, total = int(np.isfinite(found).sum()), found.size
    if have == total:
        return f"hit, all {total} sequences are cached in {directory}"
    if have:
        return f"partial hit ({have} of {total}), computing {total - have} sequences"
    if not fresh:
        return (
            f"miss, this model's cache has none of the {total} sequences (other rows, template, tokenizer,"
            " --max_seq_length or --count_turns)"
        )
    others = []
    for header in directory.parent.glob("*/header.json"):
        try:
            other = json.loads(header.read_text(encoding="utf-8"))["identity"]
            others.append(sorted(k for k in identity.keys() | other.keys() if identity.get(k) != other.get(k)))
        except (ValueError, KeyError, OSError, TypeError, AttributeError):  # damaged: it only explains
            continue
    closest = min(others, key=len, default=None)
    why = (
        "no model was cached here yet"
        if closest is None
        else f"other {', '.join(closest)} than the nearest cached model"
    )
    return f"miss ({why}), computing {total} sequences"


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_new(partial, content, 0o600)
        partial.rename(path)
    except OSError as error:  # a write to a full disk names no file
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def config_digest(config: Any) -> str:
    """Of what, besides its weights, determines what a model computes."""
    loose = ("transformers_version", "_name_or_path", "use_cache", "dtype")
    described = {key: value for key, value in config.to_dict().items() if key not in loose}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def model_identity(weights: str, base: Base) -> dict[str, str]:
    """What, besides tokens and mask, determines a log-prob; `weights` is the policy's identity."""
    return {
        "weights": weights,
        "config": config_digest(base.config),
        "dtype": str(base.dtype).removeprefix("torch."),
        "attention": base.how.backend,
        "compiled": str(base.memory.compile),
    }
