"""A run's directory: who uses it, what configuration it belongs to, and whether it is finished."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from engine import config as configuration
from engine.disk import keep, sha256, take_in_turn, write_new
from engine.errors import UserError
from engine.flags import RunFlags
from engine.world import World

FINAL = ".final"  # in output_dir: what final/ holds
OWNER = ".run"  # in --checkpoint_dir: the run that it belongs to
# what may change between a run and its resumption: none of it touches the trajectory
CHANGEABLE = {
    "output_dir",
    "cache_dir",
    "micro_batch_tokens",
    "save_steps",
    "save_total_limit",
    "checkpoint_dir",
    "max_hours",
    "patience",
    "resume",
    "on_bad_row",
    "max_bad_rows",
    "dry_run",
    "quiet",
    "report_to",
    "profile",
    "export_dtype",
    "export_adapter",
    "eval_steps",
    "dataset_num_proc",
    "cache_logprobs_only",
    "rollout_slots",
    "rollout_memory",
    "rollout_weights",
}


@contextlib.contextmanager
def open_run(flags: RunFlags, values: dict[str, Any], world: World, facts: dict[str, Any]) -> Iterator[bool]:
    """Locks --output_dir, checks that it is this configuration's, writes config.yaml; yields True if the run is already
    finished.

    `values` are all flags of the run. Raises UserError if another process is in it, if it holds a run of another
    configuration (the first differing flag is named), or if it is not empty under --resume never.
    """
    output_dir = Path(flags.output_dir)
    lock = None

    def prepare() -> bool:
        nonlocal lock
        if flags.resume == "never" and output_dir.is_dir() and any(output_dir.iterdir()):
            raise UserError(f"--resume never: {output_dir} is not empty")
        if output_dir.exists() and not output_dir.is_dir():
            raise UserError(f"--output_dir {output_dir}: is a file")
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            lock = _lock(output_dir / ".lock")
        except OSError as error:
            raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror}): give another") from None
        if flags.checkpoint_dir is not None:
            _keep_checkpoints_in(Path(flags.checkpoint_dir).expanduser().absolute(), output_dir.absolute())
        defaults = {name: flag.default for name, flag in configuration.flags_of(type(flags)).items()}
        _check_same_configuration(values, defaults, output_dir / "config.yaml")
        if any((output_dir / "final" / name).is_file() for name in ("config.json", "adapter_config.json")):
            _check_final(output_dir)
            return True
        partial = output_dir / ".config.yaml.partial"
        configuration.save(values, partial, facts)
        keep(partial)
        partial.rename(output_dir / "config.yaml")
        return False

    finished = any(world.gather(world.on_main("open_run", prepare)))
    try:
        yield finished
    finally:
        if lock is not None:
            os.close(lock)


def _keep_checkpoints_in(directory: Path, output_dir: Path) -> None:
    """output_dir/checkpoints is a link to --checkpoint_dir, which belongs to one run and says to which. Raises
    UserError.
    """
    link, owner = output_dir / "checkpoints", directory / OWNER
    if link.is_symlink() and link.readlink() != directory:
        raise UserError(f"--checkpoint_dir {directory}: this run's checkpoints are in {link.readlink()}: give that")
    if not link.is_symlink() and link.is_dir():
        if any(link.iterdir()):
            raise UserError(
                f"--checkpoint_dir {directory}: there are checkpoints in {link}: move them, or leave it out"
            )
        link.rmdir()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        named = owner.read_text(encoding="utf-8") if owner.is_file() else ""
        if named not in ("", str(output_dir)):
            raise UserError(f"--checkpoint_dir {directory} is that of the run {named}: give another")
        if not named:
            partial = owner.with_name(f"{OWNER}.partial")
            write_new(partial, str(output_dir), 0o600)
            keep(partial)
            partial.rename(owner)
        if not link.is_symlink():
            link.symlink_to(directory)
    except OSError as error:
        raise UserError(f"--checkpoint_dir {directory}: cannot be written ({error.strerror}): give another") from None


def is_gone(checkpoints: Path) -> bool:
    """Whether what --checkpoint_dir named lies on a disk that is no longer mounted."""
    return checkpoints.is_symlink() and not (checkpoints / OWNER).is_file()


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise UserError(f"{path.parent} is in use by process {holder}") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def settings(values: dict[str, Any]) -> dict[str, Any]:
    """Of all flags those on which a run's trajectory depends, as YAML and JSON hold them."""
    read = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {name: value for name, value in read.items() if value is not None and name not in CHANGEABLE}


@contextlib.contextmanager
def waiting_for(path: Path, world: World) -> Iterator[None]:
    """One run at a time in the body, the others wait: for what several runs would make at once."""
    descriptor = None

    def take() -> None:
        nonlocal descriptor
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        take_in_turn(descriptor)

    world.on_main("waiting_for", take)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _check_same_configuration(values: dict[str, Any], defaults: dict[str, Any], path: Path) -> None:
    """A flag that an earlier version did not have, and that is at its default now, is the same. Raises UserError."""
    if not path.is_file():
        return
    try:
        earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(earlier, dict) or not all(isinstance(name, str) for name in earlier):
            raise ValueError
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{path} is damaged: delete it or give another --output_dir") from None
    now = settings(values)
    for name in sorted((earlier.keys() | now.keys()) - CHANGEABLE):
        if earlier.get(name) != now.get(name) and (name in earlier or now[name] != defaults.get(name)):
            raise UserError(
                f"{path.parent} holds a run with --{name} {earlier.get(name)}, now it is {now.get(name)}: give another"
                " --output_dir"
            )


def flags_in(run: Path | None) -> dict[str, Any]:
    """All flags of a run's config.yaml; none where it cannot be read."""
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if run is not None else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


@contextlib.contextmanager
def profiler(enabled: bool, output_dir: Path, world: World) -> Iterator[Any]:
    """Traces the third to fifth step it is told of (`.step()`) into output_dir/trace.json; without --profile, does
    nothing.
    """
    if not enabled:
        yield None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path = output_dir / ("trace.json" if world.size == 1 else f"trace-rank{world.rank}.json")
    schedule = torch.profiler.schedule(wait=2, warmup=0, active=3, repeat=1)
    ready = lambda profile: profile.export_chrome_trace(str(path))
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=ready) as profile:
        yield profile


def remember_final(output_dir: Path) -> None:
    """What final/ holds, so that one that was damaged since is not taken for a finished run."""
    final, partial = output_dir / "final", output_dir / f"{FINAL}.partial"
    paths = [
        p for p in final.rglob("*") if p.suffix == ".safetensors" or p.name in ("config.json", "adapter_config.json")
    ]
    facts = {str(path.relative_to(final)): [path.stat().st_size, sha256(path)] for path in sorted(paths)}
    partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    keep(partial)
    partial.rename(output_dir / FINAL)


def forget_final(output_dir: Path) -> None:
    """Another final/ is about to be written."""
    output_dir.stat()  # a mount that is gone is not made again elsewhere
    (output_dir / FINAL).unlink(missing_ok=True)


def _check_final(output_dir: Path) -> None:
    """Raises UserError if final/ is not what the run wrote."""
    final, path = output_dir / "final", output_dir / FINAL
    path.with_name(f"{FINAL}.partial").unlink(missing_ok=True)  # of a run that was killed as it wrote it
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name, (size, digest) in facts.items():
            file = final / name
            if not file.is_file() or file.stat().st_size != size or sha256(file) != digest:
                raise UserError(
                    f"{file} is missing or damaged: delete {final}, and the same command writes it again from the last"
                    " checkpoint"
                )
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}, which says what {final} holds, is damaged: delete it") from None


def publish(partial: Path, final: Path, inside: dict[str, Path] | None) -> None:
    """Gives a finished directory its name, with other finished directories in it, once all of it is on the disk; what
    had the name goes.
    """
    for name, directory in (inside or {}).items():
        directory.rename(partial / name)
    keep(partial)
    before = final.with_name(f".{final.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if final.exists():  # half of it would be taken for whole
        final.rename(before)
    partial.rename(final)
    shutil.rmtree(before, ignore_errors=True)
