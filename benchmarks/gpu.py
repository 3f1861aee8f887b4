"""What `make gpu` runs on a CUDA machine: sections in the order of their value, each a process with a time box, one line of JSON each.

    python -m benchmarks.gpu [--only NAME ...] [--skip NAME ...] [--minutes 8] [--again] [--rehearse]

Nothing needs to be installed beside torch, transformers, triton and pytest, and nothing is fetched. A section that fails or runs out of its
time is a line too, and the next one runs. Lines are written as sections end, so a run that is killed keeps what it had; started again on
the same commit and device it goes on after it. $OUT, or benchmarks/out, gets three files: gpu.jsonl (the lines; the first says what machine
it is), gpu.log (all that was printed) and gpu.txt (the summary). `--rehearse` runs every section tiny, on whatever device there is: a
test of this script, not a measurement. Without CUDA it says so and exits 0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTE = 400  # characters of what went wrong
PATIENCE = 10  # seconds for a killed process to give its memory back


def main(argv: list[str] | None = None) -> int:
    from benchmarks.gpu_sections import SECTIONS

    args = options(argv, list(SECTIONS))
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit from outside: what there is, is still summed up
    context = processes()
    machine = ask(context, describe)
    if machine["device"] == "cpu" and not args.rehearse:
        print("no CUDA device on this machine: nothing to do (the CPU suite is `make test`)")
        return 0
    machine |= {"rehearsal": args.rehearse}
    out.mkdir(parents=True, exist_ok=True)
    lines = Lines(out / "gpu.jsonl", machine, args.again)
    names = [name for name in SECTIONS if (not args.only or name in args.only) and name not in args.skip]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="triptych-gpu-") as temporary, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(lambda: summarise(out / "gpu.txt", machine, lines.rows(), time.monotonic() - start))
        for name in names:
            if name in lines.done:
                print(f"{name}: done already", flush=True)
                continue
            left = 60 * args.minutes - (time.monotonic() - start)
            if left < 10:
                print(f"{name}: no time left", flush=True)
                continue
            row = run(context, name, Path(temporary), args.rehearse, min(SECTIONS[name].box * (5 if args.rehearse else 1), left), out / "gpu.log")
            lines.append(row)
            print(f"{'ok  ' if row['ok'] else 'FAIL'} {name}, {row['seconds']:.0f} s {row['note']}".rstrip(), flush=True)
    failed = [row["section"] for row in lines.rows() if not row["ok"] and row["section"] in names]
    return 1 if failed else 0


def processes() -> Any:
    """How sections are started. On CUDA afresh: some library asks for devices when it is imported, and a fork of that process could not use them."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")  # imported once, for all sections of a rehearsal
    context.set_forkserver_preload(["benchmarks.gpu_sections"])
    return context


def options(argv: list[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    listed = ", ".join(f"'{name}'" for name in names)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"of {listed}")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--minutes", type=float, default=8, help="of everything; a section gets no more than what is left (default: 8)")
    parser.add_argument("--again", action="store_true", help="also what the lines of this commit and device have already")
    parser.add_argument("--rehearse", action="store_true", help="every section, tiny, on whatever device there is")
    args = parser.parse_args(argv)
    for name in (*args.only, *args.skip):
        if name not in names:
            from engine.errors import nearest

            parser.error(f"{name!r} is no section: {listed}{nearest(name, names)}")
    return args


class Lines:
    """The file of lines. Lines of another commit, device or kind of run are put aside under another name."""

    def __init__(self, path: Path, machine: dict[str, Any], again: bool) -> None:
        self.path = path
        rows = self.rows()
        same = ("device", "commit", "torch", "rehearsal")
        if path.is_file() and (not rows or any(self.machine.get(key) != machine[key] for key in same)):
            path.rename(path.with_name(f"{path.stem}-earlier.jsonl"))
            rows = []
        self.done = set() if again else {row["section"] for row in rows if row["ok"]}
        if not path.is_file():
            self.append(machine)

    def append(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """The newest line of every section, in the order of their first ones; a torn line is left out."""
        self.machine, found = {}, {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "section" in row:
                found[row["section"]] = row
            else:
                self.machine = row
        return list(found.values())


def run(context: Any, name: str, directory: Path, rehearse: bool, seconds: float, log: Path) -> dict[str, Any]:
    """The section's line: its figures, or why there are none."""
    receiving, sending = context.Pipe(duplex=False)
    began = time.monotonic()
    process = context.Process(target=_section, args=(name, directory, rehearse, log, sending))
    process.start()
    sending.close()
    ok, figures, note = False, {}, f"stopped after {seconds:.0f} s"
    try:
        if receiving.poll(seconds):
            ok, figures, note = receiving.recv()
    except EOFError:
        process.join()
        note = f"died with status {process.exitcode}"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no group of its own yet
            os.killpg(process.pid, signal.SIGKILL)  # with its compilers and workers
        process.kill()
        process.join(PATIENCE)
    return {"section": name, "ok": ok, "seconds": round(time.monotonic() - began, 1), "note": note, "figures": figures}


def _section(name: str, directory: Path, rehearse: bool, log: Path, sending: Any) -> None:
    """In the child: a session of its own, so that all it started can be ended, and all it prints in the log."""
    os.setsid()
    with open(log, "ab", buffering=0) as f:
        for stream in (1, 2):
            os.dup2(f.fileno(), stream)
    print(f"\n{'=' * 20} {name} {'=' * 20}", flush=True)
    from benchmarks import gpu_sections

    lab = gpu_sections.Lab(directory, rehearse)
    try:
        answer = True, gpu_sections.SECTIONS[name].run(lab), ""
    except gpu_sections.Skipped as why:
        answer = True, {}, f"skipped: {why}"
    except BaseException as error:  # whatever it is, it is a line, and the next section runs
        traceback.print_exc()
        answer = False, {}, f"{type(error).__name__}: {' '.join(str(error).split())}"[:NOTE]
    gpu_sections.clean(directory)
    sys.stdout.flush()
    sending.send(answer)


def ask(context: Any, question: Any) -> Any:
    """The answer of a child: this process must not touch the device, whose memory the sections measure."""
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(question, sending))
    process.start()
    sending.close()  # so that a child that dies ends the waiting
    try:
        if receiving.poll(2 * 60):
            return receiving.recv()
        sys.exit("error: this machine did not say what it is within two minutes")
    except EOFError:
        sys.exit("error: this machine could not be described; the reason stands above")
    finally:
        process.kill()
        process.join(PATIENCE)


def _answer(question: Any, sending: Any) -> None:
    sending.send(question())


def describe() -> dict[str, Any]:
    """What machine this is, and which optional packages it has."""
    import torch
    import transformers

    from benchmarks.measure import device_of, machine

    device = device_of(None)
    found = machine(device) | {"transformers": transformers.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {"memory GiB": round(facts.total_memory / 2**30, 1), "multiprocessors": facts.multi_processor_count}
    else:
        found |= {"device": "cpu"}
    for package in ("triton", "bitsandbytes", "datasets", "flash_attn", "flash_attn_interface"):
        spec = importlib.util.find_spec(package)
        found[package] = "" if spec is None else getattr(importlib.import_module(package), "__version__", "there") if package == "triton" else "there"
    return found


def summarise(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]], seconds: float) -> None:
    """Every figure, on the screen and in `path`."""
    lines = ["=" * 100, ", ".join(f"{key} {value}" for key, value in machine.items() if value not in ("", False)), f"{seconds:.0f} s in all", "=" * 100]
    for row in rows:
        lines.append(f"{'ok  ' if row['ok'] else 'FAIL'}  {row['section']:<14} {row['seconds']:5.0f} s  {row['note']}".rstrip())
        for key, value in row["figures"].items():
            text = str(value).splitlines() or [""]
            lines += [f"        {key:<28} {text[0]}", *(f"          {line}" for line in text[1:])]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
