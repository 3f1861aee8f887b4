"""python -m tests.sizes: how large the code is, after the formatter; what tests/test_architecture.py sets limits to."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("losses", "verifiers", "engine", "rollout", "launch")
ROOMS = (
    "launch.planner",
    "launch.reports",
    "launch",
    "rollout",
    "engine.train",
    "engine.model",
    "engine.data",
    "engine",
    *OURS[:2],
)
WHOLE = ("StageFlags", "Config")  # a whole configuration, as the type of an argument
# called by torch or transformers with all that they hand over
FOREIGN_CALLS = re.compile(r"custom_op|register_fake|staticmethod|triton\.jit")


@dataclass(frozen=True)
class Function:
    """One function or method of ours."""

    path: str
    name: str
    lines: int
    positional: int
    annotations: tuple[str, ...]
    documented: bool


def files(*folders: str) -> Iterator[tuple[str, str]]:
    """(path below the root, text) of every Python file."""
    for folder in folders or OURS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def room_of(path: str) -> str:
    """The room that a file lies in; of a module's dotted name too."""
    dotted = path.removesuffix(".py").replace("/", ".")
    return next((room for room in ROOMS if dotted == room or dotted.startswith(f"{room}.")), "")


def functions(*folders: str) -> Iterator[Function]:
    """Those that our own code calls: operators, kernels and autograd's functions take what they are handed."""
    for path, text in files(*folders):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            a = node.args
            handed = any(FOREIGN_CALLS.search(ast.unparse(d)) for d in node.decorator_list)
            names = [x.arg for x in (*a.posonlyargs, *a.args) if x.arg not in ("self", "cls")]
            written = [ast.unparse(x.annotation) for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.annotation]
            lines = (node.end_lineno or 0) - node.lineno + 1
            documented = ast.get_docstring(node) is not None
            positional = 0 if handed or "kernels" in path else len(names)
            yield Function(path, node.name, lines, positional, tuple(written), documented)


def import_lines(path: str) -> int:
    """Statements at the top of a file that import."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return sum(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)


def stages() -> list[str]:
    """The files of `launch/` that are commands."""
    return [path for path, _ in files("launch") if path.count("/") == 1 and "__main__" in (ROOT / path).read_text()]


def whole_configurations(*folders: str) -> list[str]:
    """Functions that take one, where a group or values would do."""
    return [f"{f.path}:{f.name}" for f in functions(*folders) if set(WHOLE) & set(f.annotations)]


def main() -> None:
    """Prints the table."""
    everything = [*files(*OURS, "tests", "benchmarks")]
    skipped = sum(len(re.findall(r"# fmt: skip$", text, re.M)) for _, text in everything)
    lengths = sorted(((len(text.splitlines()), path) for path, text in files()), reverse=True)
    longest = sorted(functions(), key=lambda f: -f.lines)
    trains = {f.path: f.lines for f in longest if f.name == "train" and f.path.startswith("launch/")}
    of_room = Counter(room_of(path) for path, _ in files())
    lines_of_room = Counter[str]()
    for path, text in files():
        lines_of_room[room_of(path)] += len(text.splitlines())
    rows = {
        "# fmt: skip": str(skipped),
        "longest files": ", ".join(f"{path} {n}" for n, path in lengths[:3]),
        "longest functions": ", ".join(f"{f.path}:{f.name} {f.lines}" for f in longest if f.name != "train")[:150],
        "train": ", ".join(f"{path} {n}" for path, n in sorted(trains.items())),
        "import lines": ", ".join(f"{path} {import_lines(path)}" for path in stages()),
        "most positional parameters": str(max(f.positional for f in longest)),
        "take a whole configuration, engine": str(len(whole_configurations("engine"))),
        "take a whole configuration, rollout": str(len(whole_configurations("rollout"))),
        "take a whole configuration, launch": str(len(whole_configurations("launch"))),
    }
    for name, value in rows.items():
        print(f"{name:38}{value}")
    print(f"\n{'room':38}{'files':>6}{'lines':>8}")
    for room in sorted(of_room):
        print(f"{room:38}{of_room[room]:>6}{lines_of_room[room]:>8}")
    print(f"{'all':38}{sum(of_room.values()):>6}{sum(lines_of_room.values()):>8}")


if __name__ == "__main__":
    main()
