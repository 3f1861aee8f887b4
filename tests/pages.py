"""The project's pages as data: fenced blocks, code in the text, links, headings; and the commands that they show."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("losses", "verifiers", "engine", "rollout", "launch")
KINDS = ("python", "torchrun", "make", "pip", "cd", "echo", "git", "tensorboard")  # first words of commands
SHELL = ("sh", "bash", "console")
OURS = re.compile(r"(python -m (launch|benchmarks|tests|pytest)\b|torchrun .*-m launch\.|make |pip install )")
BEYOND = re.compile(r"[|&;<>]+")  # what ends a command in a line of the shell
NAMED = re.compile(r"`([\w./-]+)`[^`]*:$")  # 'The file `rows.jsonl`:' before a block says what the block is


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins at, and the file that the line before names."""

    language: str
    text: str
    line: int
    file: str | None


@dataclass(frozen=True)
class Page:
    """A page of Markdown, by its path from the root."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self) -> Iterator[Block]:
        before, inside, start, language = "", None, 0, ""
        for number, line in enumerate(self.source.splitlines(), 1):
            mark = line.strip()
            if inside is None and mark.startswith("```"):
                inside, start, language = [], number, mark.strip("`").split(" ")[0]
            elif inside is not None and mark == "```":
                named = NAMED.search(before)
                yield Block(language, "\n".join(inside), start, named.group(1) if named else None)
                inside, before = None, ""
            elif inside is not None:
                inside.append(line)
            elif mark:
                before = mark
        assert inside is None, f"{self.name}:{start}: the block has no end"

    @property
    def text(self) -> str:
        """The page without its fenced blocks."""
        return re.sub(r"(?ms)^\s*```.*?^\s*```\s*$", "", self.source)

    @property
    def code(self) -> list[str]:
        """What stands between backquotes in the text."""
        return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", self.text)]

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", self.text))

    @property
    def anchors(self) -> set[str]:
        """As GitHub and the site generators make them of headings."""
        heads = re.findall(r"(?m)^#+ +(.+?)\s*$", self.text)
        plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).lower() for head in heads]
        return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in plain}

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """(where, words) of every command in a block, and of those in the text."""
        for block in self.blocks():
            lines = joined(block.text)
            first = next((words[0] for line in lines for words in split(line)), "")
            if block.language in SHELL or (not block.language and first in KINDS):
                for line in lines:
                    yield from ((f"{self.name}:{block.line}", words) for words in split(line))
        for code in self.code:
            if OURS.match(code) and not code.endswith(" -m"):
                yield from ((self.name, words) for words in split(code))


def pages() -> list[Page]:
    names = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    return [Page(name) for name in names]


def joined(text: str) -> list[str]:
    """The lines of the shell, those that end in a backslash with the next."""
    return [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]


def split(line: str) -> Iterator[list[str]]:
    """The commands of a line, without comments, redirections, variables set for them, and the dots that leave out."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if BEYOND.fullmatch(word) and ("<" in word or ">" in word):
            redirected = True
        elif BEYOND.fullmatch(word):
            if words:
                yield words
            words, redirected = [], False
        elif not redirected and word != "..." and (words or not re.fullmatch(r"[A-Z_]+=.*", word)):
            words.append(word)


@cache
def names_in(file: str) -> frozenset[str]:
    """What a file defines: functions, classes, constants, and in a class its methods and fields, as Class.name too."""
    found: set[str] = set()

    def walk(node: ast.AST, within: str) -> None:
        for child in ast.iter_child_nodes(node):
            targets: list[str] = []
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                targets = [child.name]
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                of = child.targets if isinstance(child, ast.Assign) else [child.target]
                targets = [n.id for t in of for n in ast.walk(t) if isinstance(n, ast.Name)]
            found.update(targets + [f"{within}.{name}" for name in targets if within])
            walk(child, child.name if isinstance(child, ast.ClassDef) else within)

    walk(ast.parse((ROOT / file).read_text(encoding="utf-8")), "")
    return frozenset(found)


@cache
def messages() -> tuple[str, ...]:
    """Every text in the rooms that speak to a user, '\0' in place of what is put into it."""
    found = []
    for room in ("engine", "rollout", "launch"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)
