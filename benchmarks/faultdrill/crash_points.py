"""SIGKILL before every change to the file system that the engine makes on purpose to keep something.

Saving and rotating a checkpoint, exporting, writing an adapter, appending to a reference cache, building a token store,
rows of metrics, a run's directory: each on tiny inputs by the engine's own classes, killed before its n-th opening for
writing, rename, removal or fsync, for every n. In the variant `torn` the machine is taken to have died as well: every
file loses three quarters of what no fsync had reached. Afterwards exactly the old state or the new one is read, the
same work can be done again, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faultdrill import crash_controls, lab
from benchmarks.faultdrill.events import Events, listing, tear
from benchmarks.faultdrill.suite import Case, Cases, Suite
from tests.ranks import context

PATIENCE = 60.0
WRONG = 3
VARIANTS = ("killed", "torn")


class Point(NamedTuple):
    """Before the number-th change that this rank makes."""

    work: str
    ranks: int
    rank: int
    number: int
    variant: str

    @property
    def name(self) -> str:
        return f"{self.work}-{self.ranks}.rank{self.rank}.{self.number}.{self.variant}"


# --- one process of a piece of work -----------------------------------------------------------------------------------


def _process(environment: dict[str, str], what: dict[str, Any]) -> None:
    """Does a piece of work (`mode` act) or checks what is left of it, as the rank that the environment says."""
    os.environ.update(environment)
    directory, rank = Path(what["directory"]), int(environment["RANK"])
    log = os.open(f"{directory}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        verdict = _work(what, directory, rank, said.getvalue)
    Path(what["verdict"]).write_text(json.dumps(verdict))
    if what["mode"] == "check" and verdict:
        os._exit(WRONG)  # whoever waits for this rank is killed


def _work(what: dict[str, Any], directory: Path, rank: int, said: Any) -> Any:
    import torch

    from engine import world

    torch.set_num_threads(1)
    dies = rank == what["rank"] and what["mode"] == "act"
    synced = Path(f"{directory}.synced") if what["mode"] == "act" else None
    events = Events(lambda n: os.kill(os.getpid(), 9) if dies and n == what["number"] else None, synced)
    if what["control"]:
        crash_controls.CONTROLS[what["control"]]()
    work = crash_controls.PIECES[what["work"]](world.start(quiet=False), directory, Path(what["shared"]))
    if what["mode"] == "check":
        try:
            problem = work.check(said)
            if not problem:
                work.world.barrier()
            return problem
        except Exception as error:  # whatever it is, what was left cannot be used
            return f"{type(error).__name__}: {error}"[:300]
    work.prepare()
    work.world.barrier()
    if work.world.is_main:
        Path(f"{directory}.before").write_text(json.dumps({str(k): v for k, v in listing(directory).items()}))
    work.world.barrier()
    events.begin()
    work.act()
    events.end()
    work.world.barrier()
    return events.names


def _run(work: str, ranks: int, directory: Path, **what: Any) -> tuple[list[int | None], list[Any]]:
    """(statuses, verdicts) of all ranks; when one dies, all are killed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = []
    verdicts = [Path(f"{directory}.verdict-{rank}") for rank in range(ranks)]
    told = {"work": work, "directory": str(directory), "shared": str(_shared()), "rank": -1, "number": -1} | what
    for rank, verdict in enumerate(verdicts):
        verdict.unlink(missing_ok=True)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in names.items()} | {"CUDA_VISIBLE_DEVICES": ""}
        process = context.Process(target=_process, args=(environment, told | {"verdict": str(verdict)}))
        process.start()
        processes.append(process)
    try:
        lab.wait_for(processes, together=True, seconds=PATIENCE)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
                process.join()
    read = [json.loads(v.read_text()) if v.is_file() and v.stat().st_size else None for v in verdicts]
    return [process.exitcode for process in processes], read


@functools.cache
def _shared() -> Path:
    """The model and rows of all points, and what work that is left alone ends in."""
    shared = lab.root() / "crash"
    shared.mkdir()
    (shared / "model").symlink_to(lab.root() / "model")
    rows = [{"ids": [(7 * i + j) % 97 for j in range(5 + i % 4)]} for i in range(24)]
    (shared / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (shared / "expected").mkdir()
    return shared


# --- points -----------------------------------------------------------------------------------------------------------


@functools.cache
def changes(work: str, ranks: int) -> list[list[str]]:
    """Of every rank, the changes that the work makes where nothing strikes."""
    directory = lab.root() / f"crash-{work.replace(' ', '-')}-{ranks}"
    directory.mkdir()
    codes, names = _run(work, ranks, directory, mode="act", control="")
    if set(codes) != {0}:
        raise RuntimeError(f"{work} on {ranks} does not run: {codes} {Path(f'{directory}.log').read_text()[-300:]}")
    expected = _shared() / "expected" / type_name(work)
    if (directory / "final").is_dir() and not expected.exists():
        shutil.copytree(directory / "final", expected)
    if work == "cache":
        crash_controls.keep_sums(directory, _shared() / "expected" / "sums.npy")
    return names


def type_name(work: str) -> str:
    return crash_controls.PIECES[work].__name__


def points(pieces: list[tuple[str, int]]) -> list[Point]:
    found = []
    for work, ranks in pieces:
        for rank, names in enumerate(changes(work, ranks)):
            numbers = range(1, len(names) + 1 + (rank == 0))  # the last: after all of it
            found += [Point(work, ranks, rank, number, variant) for number in numbers for variant in VARIANTS]
    return found


def ours() -> list[tuple[str, int]]:
    return [(name, ranks) for name, work in crash_controls.OURS.items() for ranks in work.ranks]


def cases(count: int, seed: int) -> Iterator[Case]:
    """All points, or so many of every piece of work."""
    chance = random.Random(f"points {seed}")
    by_piece = [[p for p in points([piece])] for piece in ours()]
    for every in by_piece:
        chance.shuffle(every)
    longest = max(map(len, by_piece))
    in_turn = [every[i] for i in range(longest) for every in by_piece if i < len(every)]
    for point in in_turn[:count]:
        yield Case(point.name, functools.partial(strike, point, ""))


def strike(point: Point, control: str, directory: Path) -> str:
    """Dies there, and looks at what is left."""
    root = directory / "work"
    root.mkdir()
    codes, _ = _run(point.work, point.ranks, root, mode="act", rank=point.rank, number=point.number, control=control)
    where = (changes(point.work, point.ranks)[point.rank][point.number - 1 :] or ["the end"])[0]
    if not set(codes) <= {0, 1, -9}:  # 1: it was told of the other's death sooner than it was killed
        return f"ended with {codes} before the kill: {_tail(root)}"
    if point.variant == "torn":
        before = {int(k): tuple(v) for k, v in json.loads(Path(f"{root}.before").read_text()).items()}
        tear(root, before, Path(f"{root}.synced"))
    codes, verdicts = _run(point.work, point.ranks, root, mode="check", control=control)
    problem = next((verdict for verdict in verdicts if verdict), "")
    if set(codes) != {0} and not problem:
        return f"before '{where}': the check ended with {codes}: {_tail(root)}"
    return f"before '{where.replace(str(root), '')}': {problem}" if problem else ""


def _tail(root: Path) -> str:
    return Path(f"{root}.log").read_text(errors="replace")[-300:]


# --- broken variants, and a peer --------------------------------------------------------------------------------------


def broken(count: int, seed: int, control: str) -> Iterator[Case]:
    """The points at which that promise counts, from the last on."""
    work, ranks, variant = crash_controls.WHERE[control]
    last = max(len(names) for names in changes(work, ranks))
    spaced = [last + 1, last - 1, *range(last - 3, 0, -3)] if variant else [last + 1]
    for number in spaced[:count]:
        point = Point(work, ranks, 0, number, variant or "killed")
        yield Case(f"{control}: {point.name}", functools.partial(strike, point, control))


def peer(count: int, seed: int, work: str) -> Iterator[Case]:
    chance = random.Random(f"peer {seed}")
    every = points([(work, ranks) for ranks in crash_controls.PIECES[work].ranks])
    chance.shuffle(every)
    for point in every[:count]:
        yield Case(point.name, functools.partial(strike, point, ""))


controls: dict[str, Cases] = {name: functools.partial(broken, control=name) for name in crash_controls.CONTROLS}
baselines: dict[str, Cases] = {name: functools.partial(peer, work=name) for name in crash_controls.PEERS}
SUITE = Suite(
    name="crash_points",
    unit="points",
    promise="exactly the old or the new state, nothing left behind",
    sizes=(36, 1000),  # with --full all of them, which are fewer
    cases=cases,
    controls=controls,
    baselines=baselines,
    left_out=["torn directories: a rename that was made is taken to have reached the disk"],
)
