"""The catalogue of mutants fits the code as it is: the drill itself is `make mutants`."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

from tests.mutants.catalogue import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]


@cache
def text_of(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def defined(file: str) -> frozenset[str]:
    """The functions at the top of a test file."""
    return frozenset(node.name for node in ast.parse(text_of(file)).body if isinstance(node, ast.FunctionDef))


@cache
def definitions(file: str) -> tuple[tuple[int, int], ...]:
    """(first, last) line of everything that stands at the top of a file, so that one of them is parsed, not all."""
    nodes = ast.parse(text_of(file)).body
    starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) for node in nodes]
    return tuple(zip(starts, (node.end_lineno or 0 for node in nodes), strict=True))


def parses(mutant: Mutant) -> bool:
    """Whether what stands at the top around the mutant is still Python."""
    text = text_of(mutant.file)
    first = text[: text.index(mutant.old)].count("\n") + 1
    last = first + mutant.old.count("\n")
    spans = [(a, b) for a, b in definitions(mutant.file) if b >= first and a <= last]
    lines = text.splitlines(keepends=True)
    around = "".join(lines[spans[0][0] - 1 : spans[-1][1]])
    try:
        ast.parse(
            around.replace(mutant.old, mutant.new) if mutant.old in around else text.replace(mutant.old, mutant.new)
        )
    except SyntaxError:
        return False
    return True


def test_every_mutant_has_one_place():
    stale = {m.name: n for m in MUTANTS if (n := text_of(m.file).count(m.old)) != 1}
    assert not stale


def test_every_mutant_is_another_program():
    assert not [m.name for m in MUTANTS if m.old == m.new or not parses(m)]


def test_names_are_unique_and_there_are_enough():
    assert len(MUTANTS) >= 150 and not [name for name, n in Counter(m.name for m in MUTANTS).items() if n > 1]
    places = Counter((m.file, m.old, m.new) for m in MUTANTS)
    assert max(places.values()) == 1


def test_the_tests_of_every_mutant_are_there():
    for mutant in MUTANTS:
        assert mutant.tests, mutant.name
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).is_file(), (mutant.name, file)
            assert not name or name.partition("[")[0] in defined(file), (mutant.name, test)
