"""The world: one process, or the ranks that torchrun started. The only reader of RANK and its friends."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from huggingface_hub.utils import disable_progress_bars
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engine import progress, redact, signals, terminal
from engine.errors import TODO, UserError, explained, on_one_line, reader_gone

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=15)
FOREVER = timedelta(days=30)  # a store's `wait` that times out is, each time, two warnings of c10d on the screen
_calls = itertools.count()  # names the keys of the store: every rank makes the same calls in the same order


@dataclass(frozen=True)
class World:
    """Who takes part: `rank` of `size` ranks on `device`, a one-dimensional mesh over all, and the store they met
    at.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh
    store: dist.Store
    memory: int  # bytes that this rank may fill: its GPU's, or its share of the host's
    group: Any = None  # for what hosts tell each other; None: the default
    shows: bool = True  # whether phases are this one's to show

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This rank's share of those that may be used."""
        return max(1, available_cores() // self.size)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Any) -> list[Any]:
        """Every rank's picklable object of our own making (never data from outside), on every rank."""
        if self.size == 1:
            return [x]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, x, group=self.group)
        return gathered

    def beside(self) -> World:
        """The same ranks for a thread beside the main one: it gathers in a group of its own, so that neither waits for
        the other, and shows nothing. Collective.
        """
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if self.size > 1 else None
        return replace(self, group=group, shows=False)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's host tensor on every rank, in place."""
        if self.size > 1:
            dist.broadcast(x, 0)
        return x

    def most(self, *numbers: int) -> tuple[int, ...]:
        """The largest of all ranks, number by number: on the hosts, no device is waited for."""
        if self.size == 1:
            return numbers
        x = torch.tensor(numbers)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return tuple(x.tolist())

    def end_if_asked(self) -> None:
        """Raises Stopped on every rank if one of them was asked to end. Collective."""
        (why,) = self.most(signals.REASONS.index(signals.asked()))
        if why:
            raise signals.Stopped(signals.REASONS[why])

    def barrier(self) -> None:
        self.sum(torch.zeros(1, device=self.device))

    def say(self, *lines: str, last: bool = False) -> None:
        """Prints on rank 0, as engine/terminal.py says, above the bar if there is one."""
        if self.is_main:
            terminal.say(*lines, last=last)

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Shows on rank 0 what goes on: on the bar of the run, or where there is none as a bar of its own. `done` may
        count as if every rank were as far as this one.
        """
        if not self.shows:
            return
        progress.note(what, counted=True if total else None)
        if self.is_main:
            terminal.phase(what, min(done, total) if total else done, total)

    def each(self, what: str, items: Sequence[T]) -> Iterator[T]:
        """The items, one after the other, as a phase."""
        for number, item in enumerate(items, start=1):
            self.phase(what, number, len(items))
            yield item

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs `work` on the first rank of every machine and then, against what that one left on disk, on the others.

        The others wait on the store, not in a collective: however long the work takes (tokenising a million rows),
        nothing times out. If the first rank fails, they fail with it, with its message. An OSError becomes a UserError.
        """
        result = self._first(f"{name}/{self.rank - self.local_rank}", self.local_rank == 0, work)
        return result if self.local_rank == 0 else _as_user_error(work)

    def on_main(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs `work` on rank 0 while the others wait as in `once`; they get None, or its UserError."""
        return self._first(name, self.is_main, work)

    def _first(self, name: str, is_first: bool, work: Callable[[], Any]) -> Any:
        key = f"first/{next(_calls)}/{name}"
        if is_first:
            progress.note(name.partition("/")[0], counted=False)
            progress.for_all(True)
            try:
                result = _as_user_error(work)
            except (UserError, signals.Stopped) as error:
                self.store.set(key, f"{'error' if isinstance(error, UserError) else 'stopped'} {error}")
                raise
            finally:
                progress.for_all(False)
            self.store.set(key, "ok")
            return result
        progress.note(f"waiting for {name.partition('/')[0]}", counted=False)
        self.store.wait([key], FOREVER)  # raises RuntimeError at once if the store dies
        status = self.store.get(key).decode()
        if status.startswith("error "):
            raise UserError(status.removeprefix("error "))
        if status.startswith("stopped "):
            raise signals.Stopped(status.removeprefix("stopped "))
        return None

    def agree(self, name: str, value: str) -> None:
        """Raises UserError on every rank whose `value` (a config, a dataset's fingerprint) is not rank 0's."""
        digest, key = hashlib.sha256(value.encode()).hexdigest(), f"agree/{next(_calls)}/{name}"
        if self.is_main:
            self.store.set(key, digest)
        self.store.wait([key], COLLECTIVE_TIMEOUT)
        if self.store.get(key).decode() != digest:
            raise UserError(
                f"rank {self.rank} has another {name} than rank 0: start every rank with the same command and files"
            )


def _come(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Whether the keys are there within so long, by looking (FOREVER). Raises RuntimeError if the store is dead."""
    end = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _as_user_error(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except OSError as error:
        raise UserError(explained(error)) from None


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without a wait: CUDA copies pinned memory beside what the host does next."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def host_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compiler(*names: str) -> str | None:
    """The first of these programs that is there; $CXX stands for what that variable names."""
    return next(
        filter(None, (shutil.which(os.environ.get(name[1:], "") if name.startswith("$") else name) for name in names)),
        None,
    )


def job_left() -> float | None:
    """Seconds that Slurm leaves this job, where it says so."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - time.time() if end.isdecimal() else None


def is_first() -> bool:
    """Whether this process is, or is going to be, rank 0."""
    return int(os.environ.get("RANK", 0)) == 0


def start(deterministic: bool = False, quiet: bool = False) -> World:
    """Joins the process group that the environment describes (none: a group of one). `quiet`: only warnings, errors and
    the last line are shown. Raises UserError.
    """
    _configure_terminal(quiet)
    rank, size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if size == 1 else "false")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank} wants GPU {local_rank} and this machine has {torch.cuda.device_count()}: lower"
            " --nproc_per_node"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=_store(rank, size),
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("ranks",))
    store = dist.PrefixStore("triptych", dist.distributed_c10d._get_default_store())
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else host_memory() // size
    return World(rank, size, local_rank, device, mesh, store, memory)


def _configure_terminal(quiet: bool = False) -> None:
    """As the user's environment says (https://no-color.org)."""
    dumb, colour = os.environ.get("TERM") == "dumb", not os.environ.get("NO_COLOR")
    terminal.configure(dumb=dumb, colour=colour, quiet=quiet)
    if quiet or not terminal.is_terminal(sys.stderr):
        disable_progress_bars()
        os.environ.setdefault(
            "HF_DATASETS_DISABLE_PROGRESS_BARS", "1"
        )  # read when datasets is imported, which is later


def _address() -> tuple[str, int]:
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 29500))


def another_store(seconds: float) -> dist.Store:
    """A connection of its own to the store where ranks met: one that is shared by threads is one thread's at a time,
    also while that one waits.
    """
    return dist.PrefixStore(f"watch_{_restart()}", _connect(seconds))


def _connect(seconds: float) -> dist.Store:
    return dist.TCPStore(*_address(), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def _restart() -> str:
    """Which generation of ranks this is, under `torchrun --max-restarts`."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _is_the_agents() -> bool:
    """Whether the store is torchrun's own, which outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(rank: int, size: int) -> dist.Store:
    """A store scoped to this restart: under `torchrun --max-restarts`, a dead generation's addresses stay in the
    agent's store.
    """
    if size == 1:
        return dist.HashStore()
    address, is_master = _address(), rank == 0 and not _is_the_agents()
    try:
        store = dist.TCPStore(*address, world_size=size, is_master=is_master, timeout=COLLECTIVE_TIMEOUT)
    except dist.DistNetworkError as error:
        if "address already in use" not in str(error).lower():
            raise
        raise UserError(
            f"port {address[1]} is in use, by another run perhaps: give torchrun another --master_port"
        ) from None
    if _restart() != "0" and store.check(["stopped"]):
        raise signals.Stopped(f"{store.get('stopped').decode()} (torchrun started it again)")
    return dist.PrefixStore(f"run_{_restart()}", store)


def main(command: Callable[[], object], resumable: bool = False) -> None:
    """Runs a command's body as a process: one line and status 2 for a UserError, one line for another rank's death or
    Ctrl-C. `resumable`: signals and the end of the job ask it to end, and it looks whether they did; a stage sees to
    that itself (engine/watch.py).
    """
    redact.guard()
    signals.a_command(True)
    try:
        with signals.listening(None, job_left()) if resumable else contextlib.nullcontext():
            _run(command)
    except Exception as error:  # that nobody expected: as Python prints it, without secrets
        terminal.traceback_of(error)
        sys.exit(1)
    finally:
        signals.a_command(False)


def _run(command: Callable[[], object]) -> None:
    rank = int(os.environ.get("RANK", 0))
    _configure_terminal()
    status, line = 0, ""
    try:
        command()
    except UserError as error:
        status, line = 2, f"error: {error}" if _speaks(rank, str(error)) else ""
    except signals.Stopped as stop:
        status, line = signals.STOPPED, f"stopped: {stop}" if rank == 0 else ""
        _remember(str(stop), rank)
    except KeyboardInterrupt:
        status, line = 130, "interrupted; the same command goes on from the last checkpoint" if rank == 0 else ""
    except BrokenPipeError:
        status = reader_gone()
    except OSError as error:
        if error.filename is None and error.errno not in TODO:
            raise
        status, line = 2, f"error: {explained(error)}"
    except RuntimeError as error:
        signs = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting"
        from_the_store = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
        if not from_the_store and not any(sign in str(error) for sign in signs):
            raise
        status = 1
        line = (
            f"error: rank {rank}: another rank died or stopped answering; its own message says why ({str(error)[:160]})"
        )
    if line:
        terminal.error(on_one_line(line))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def _remember(stopped: str, rank: int) -> None:
    """For the ranks that torchrun starts again after this: what was asked to end stays ended."""
    if rank == 0 and dist.is_initialized() and _is_the_agents():
        with contextlib.suppress(RuntimeError):
            _connect(60).set("stopped", stopped)


def _speaks(rank: int, message: str) -> bool:
    """Whether this rank prints its UserError: rank 0 does, and another only if rank 0 does not say the same.

    Rank 0 leaves its message in the store and stays until the others have read it, two seconds at most.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or not dist.is_initialized():
        return rank == 0  # before the ranks have met, all of them read the same command line
    store = dist.PrefixStore("triptych", dist.distributed_c10d._get_default_store())
    patience = 2.0
    try:
        if rank == 0:
            store.set("user_error", message)
            with contextlib.suppress(RuntimeError):
                _come(store, [f"user_error_read/{other}" for other in range(1, size)], patience)
            return True
        if not _come(store, ["user_error"], patience):
            return True  # no word from rank 0: it has not failed
        said = store.get("user_error").decode() == message
        store.set(f"user_error_read/{rank}", "")
        return not said
    except RuntimeError:  # rank 0 is gone, and its store with it
        return True
