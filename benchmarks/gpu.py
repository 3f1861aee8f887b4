"""What `make gpu` runs on a CUDA machine: sections in the order of their value, each a process with a time box, one
line of JSON each.

    python -m benchmarks.gpu [--only NAME ...] [--skip NAME ...] [--minutes 8] [--again] [--rehearse]

Needs torch, transformers, triton and pytest; nothing is installed or fetched. $OUT, or benchmarks/out, gets three
files:

    gpu.jsonl   a line of machine facts, then a line as each section ends: section, ok, seconds, note, figures
    gpu.log     all that the sections printed, under headings
    gpu.txt     the summary, which is also printed at the end, and when the run is interrupted

A section that fails or is over its time is a line too, with the figures that it had, and the next one runs. Started
again, a run goes on after the sections that are ok for the same sources on the same device. `--rehearse` runs every
section tiny, on whatever device there is: a test of this script, not a measurement. Without CUDA it says so and exits
0.

This process imports neither torch nor a model and never touches the device, whose memory the sections measure.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import nearest

ROOT = Path(__file__).resolve().parent.parent
BOXES = {  # the sections in order of value, and the most seconds of each
    "facts": 60,
    "loss": 60,
    "attention": 60,
    "decode": 60,
    "sft eager": 40,
    "sft compiled": 60,
    "rollout": 60,
    "profile": 50,
    "dpo compiled": 60,
    "ppo": 60,
    "lora 8b": 90,
    "qlora 8b": 90,
    "dpo eager": 60,
    "tests": 150,
}
REHEARSAL_BOX = 120  # of any section: this may be a busy laptop
LEAST = 10  # seconds: with less left than this, no section is started
GRACE = 5  # seconds that a section may take to end after its last word
SLICE = 0.5  # seconds after which an interruption is looked for
# facts of a machine under which a section need not run again
SAME = ("device", "commit", "sources", "torch", "rehearsal")
PREFIX = "triptych-gpu-"
PACKAGES = ("bitsandbytes", "datasets", "flash_attn", "flash_attn_interface", "liger_kernel", "trl", "peft")


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "out")
    context = processes()
    machine = _asked(context, describe) | {"rehearsal": args.rehearse}
    if machine["accelerator"] != "cuda" and not args.rehearse:
        print("no CUDA device on this machine: nothing to do (the CPU suite is `make test`)")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    lines = Lines(out / "gpu.jsonl", machine)
    names = [name for name in BOXES if (not args.only or name in args.only) and name not in args.skip]
    waiting = [name for name in names if args.again or not lines.done(name)]
    for name in names:
        if name not in waiting:
            print(f"{name}: done already", flush=True)
    # set by Ctrl-C and by what ends a run that is over its limit: the summary must still be printed
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    start = time.monotonic()
    try:
        with temporary_directory() as directory:
            while waiting and not stop.is_set():
                name, left = waiting[0], 60 * args.minutes - (time.monotonic() - start)
                if left < LEAST:
                    break
                box = min(REHEARSAL_BOX if args.rehearse else BOXES[name], left)
                row = run(context, name, directory, args.rehearse, box, out / "gpu.log", stop)
                lines.append(row)
                waiting.pop(0)
                print(
                    f"{'ok  ' if row['ok'] else 'FAIL'} {name}, {row['seconds']:.0f} s {row['note'][:200]}".rstrip(),
                    flush=True,
                )
    finally:
        summarise(out / "gpu.txt", machine, lines.rows, waiting, time.monotonic() - start)
    failed = any(not row["ok"] for row in lines.rows.values() if row["section"] in names)
    return 130 if stop.is_set() else int(failed)


def processes() -> Any:
    """How sections are started. Beside a GPU afresh: some library asks for devices when it is imported, and a fork of
    that process could not use them.
    """
    if any(Path("/dev").glob("nvidia*")):
        return multiprocessing.get_context("spawn")
    # tiny work on a machine that may be busy: threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")  # imports once, for all sections of a rehearsal
    context.set_forkserver_preload(["benchmarks.gpu_sections"])
    return context


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    listed = ", ".join(f"'{name}'" for name in BOXES)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"of {listed}")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME")
    parser.add_argument(
        "--minutes", type=float, default=8, help="of everything; a section gets no more than what is left (default: 8)"
    )
    parser.add_argument(
        "--again", action="store_true", help="also what is ok already for these sources and this device"
    )
    parser.add_argument("--rehearse", action="store_true", help="every section, tiny, on whatever device there is")
    args = parser.parse_args(argv)
    for name in (*args.only, *args.skip):
        if name not in BOXES:
            print(f"error: {name!r} is not a section{nearest(name, BOXES)}; there are {listed}", file=sys.stderr)
            sys.exit(2)
    return args


class Lines:
    """gpu.jsonl, to which lines are only added: a line of machine facts opens a part.

    `rows` are the newest lines, by section, of the parts of this machine and these sources.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path, self.rows = path, {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self._torn = bool(text) and not text.endswith("\n")  # a run was killed while it wrote
        ours = False
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if "section" not in row:
                    ours = all(row.get(key) == machine[key] for key in SAME)
                elif ours:
                    self.rows[row["section"]] = row
        if not ours:
            self.append(machine)

    def done(self, name: str) -> bool:
        return name in self.rows and self.rows[name]["ok"]

    def append(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(("\n" if self._torn else "") + json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self._torn = False
        if "section" in row:
            self.rows[row["section"]] = row


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Where sections keep the models that they share. What killed runs left of theirs is removed first: it may be 20
    GB.
    """
    for stale in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), open(stale / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another run's is in use
            shutil.rmtree(stale, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name,
        open(Path(name) / "lock", "ab") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(name)


# --- a section's process ----------------------------------------------------------------------------------------------


def run(
    context: Any, name: str, directory: Path, rehearse: bool, seconds: float, log: Path, stop: threading.Event
) -> dict[str, Any]:
    """The section's line: its figures, and why there are not more."""
    receiving, sending = context.Pipe(duplex=False)
    # `leash` is held here alone: when this process dies, in whatever way, the section ends
    held, leash = context.Pipe(duplex=False)
    log_start, began = log.stat().st_size if log.is_file() else 0, time.monotonic()
    process = context.Process(target=_section, args=(name, directory, rehearse, log, sending, held))
    process.start()
    sending.close()
    held.close()
    ok, figures, note = False, {}, f"stopped after {seconds:.0f} s"
    try:
        while (left := began + seconds - time.monotonic()) > 0:
            if stop.is_set():
                note = "interrupted"
                break
            if not receiving.poll(min(left, SLICE)):
                continue
            key, value = receiving.recv()
            if key is None:
                ok, note = value
                process.join(GRACE)
                break
            figures[key] = value
    except EOFError:
        process.join()
        note = f"died with status {process.exitcode}"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with its compilers and workers
        if process.is_alive():  # before it had a group of its own
            process.kill()
        process.join(GRACE)  # a device may take its time to give memory back
        leash.close()
    clean(directory)
    if not ok:
        note = " | ".join([note, *_tail(log, log_start)])
    return {"section": name, "ok": ok, "seconds": round(time.monotonic() - began, 1), "note": note, "figures": figures}


def _tail(log: Path, start: int) -> list[str]:
    """The last lines that the section printed, short."""
    text = b""
    if log.is_file():
        with open(log, "rb") as f:
            f.seek(max(start, log.stat().st_size - 4000))
            text = f.read()
    found = [line.strip() for line in text.decode(errors="replace").replace("\r", "\n").splitlines()]
    return [line[:200] for line in found if line and not line.startswith("=====")][-3:]


def clean(directory: Path) -> None:
    """What a section leaves that the next does not need: runs with their exported weights, traces, plans."""
    for path in (*directory.glob("run*"), *directory.glob("*.json")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _section(name: str, directory: Path, rehearse: bool, log: Path, sending: Any, held: Any) -> None:
    """In the child: a session of its own, so that all it starts ends with it; what it prints goes to the log, figures
    to `sending`.
    """
    os.setsid()
    threading.Thread(target=_end_with, args=(held,), daemon=True).start()
    with open(log, "ab", buffering=0) as f:
        for stream in (1, 2):
            os.dup2(f.fileno(), stream)
    print(f"\n{'=' * 20} {name} {'=' * 20}", flush=True)
    from benchmarks import gpu_sections

    try:
        for figure in gpu_sections.SECTIONS[name](gpu_sections.Lab(directory, rehearse)):
            sending.send(figure)
        answer = True, ""
    except gpu_sections.Skipped as why:
        answer = True, f"skipped: {why}"
    except BaseException as error:  # whatever it is, it is a line, and the next section runs
        traceback.print_exc()
        answer = False, f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    sys.stdout.flush()
    sending.send((None, answer))


def _end_with(held: Any) -> None:
    """Ends this process's group when the runner is gone."""
    with contextlib.suppress(EOFError, OSError):
        held.recv_bytes()
    os.killpg(os.getpgrp(), signal.SIGKILL)


# --- the machine ------------------------------------------------------------------------------------------------------


def _asked(context: Any, question: Callable[[], Any]) -> Any:
    """The answer of a child."""
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(question, sending))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        sys.exit("error: the machine could not be described; what is printed above says why")
    finally:
        process.join()


def _answer(question: Callable[[], Any], sending: Any) -> None:
    sending.send(question())


def describe() -> dict[str, Any]:
    """What machine this is, of which sources, and which optional packages it has."""
    import torch
    import transformers

    from benchmarks.measure import device_of, machine

    device = device_of(None)
    found = machine(device) | {"accelerator": device.type, "cores": os.cpu_count()}
    found |= {"transformers": transformers.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {
            "memory GiB": round(facts.total_memory / 2**30, 1),
            "multiprocessors": facts.multi_processor_count,
            "driver": _driver(),
        }
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    there = [package for package in PACKAGES if importlib.util.find_spec(package)]
    return found | {"triton": triton, "packages": there, "sources": _sources()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().partition("\n")[0]
            or "unknown"
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _sources() -> str:
    """A fingerprint of the programs: a copy without a repository has no commit, and a dirty one's says little."""
    digest = hashlib.sha256()
    rooms = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(path for room in rooms for path in room.rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def summarise(
    path: Path, machine: dict[str, Any], rows: dict[str, dict[str, Any]], waiting: list[str], seconds: float
) -> None:
    """Every figure, on the screen and in `path`, in the order of the sections."""
    facts = {
        key: " ".join(value) if isinstance(value, list) else value
        for key, value in machine.items()
        if value not in (None, False, [])
    }
    missing = f"; not run: {', '.join(waiting)}" if waiting else ""
    lines = [
        "=" * 100,
        ", ".join(f"{key} {value}" for key, value in facts.items()),
        f"{seconds:.0f} s now{missing}",
        "=" * 100,
    ]
    for name in BOXES:
        if (row := rows.get(name)) is None:
            continue
        lines.append(
            f"{'ok  ' if row['ok'] else 'FAIL'}  {name:<14} {row['seconds']:5.0f} s  {row['note'][:300]}".rstrip()
        )
        for key, value in row["figures"].items():
            first, *more = str(value).splitlines() or [""]
            lines += [f"    {key:<27} {first}", *(f"      {line}" for line in more)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
