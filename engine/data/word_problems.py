"""The demonstration's language: a small world of word problems, a tiny Llama that has never read one, and what the
three acts are taught with. All of it is made from a seed on the spot.

A problem tells of one or two changes to a number of things; a worked answer takes them in turn and ends in the number:

    Ada has 12 coins. Ada finds 5 more and then gives away 3. How many coins are there now?
    12 + 5 = 17. 17 - 3 = 14.
    #### 14

Conversations are answered by somebody careless, who errs in every step with probability `SLIP`; a model tuned on them
knows the right answer among others. Pairs are a right and a wrong answer to one problem, the wrong way round in
`MISJUDGED` of them. Problems for the verifier carry the number alone. No two of the three share a problem, nor does any
with the problems held out. For a real small model, which can half solve them as it is, there are easier ones in plain
words (`practice` and `exam`): stories with one change, and bare sums.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.embedded import save_model
from engine.data.store import build_once

VERSION = 6
SLIP, MISJUDGED = 0.25, 0.1
LARGEST, MOST = 19, 5  # of things, and of a change
SIZES = {"conversations": 8000, "pairs": 4096, "problems": 1024, "held_out": 256, "practice": 1024, "exam": 240}

NAMES = ("Ada", "Bela", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
THINGS = ("coins", "shells", "stamps", "marbles", "pears", "buttons", "cards", "beads")
GAINS = ("finds {n} more", "is given {n} more", "buys {n} more")
LOSSES = ("gives away {n}", "loses {n}", "sells {n}")


class WordProblems(NamedTuple):
    """Where the model and the data lie."""

    model: Path
    conversations: Path
    pairs: Path
    problems: Path
    held_out: Path
    practice: Path
    exam: Path


class Problem(NamedTuple):
    """A number of things, and one or two changes to it (gains > 0 > losses)."""

    name: str
    thing: str
    start: int
    changes: tuple[int, ...]
    verbs: tuple[str, ...]

    @property
    def question(self) -> str:
        told = " and then ".join(verb.format(n=abs(c)) for verb, c in zip(self.verbs, self.changes, strict=True))
        return f"{self.name} has {self.start} {self.thing}. {self.name} {told}. How many {self.thing} are there now?"

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.start, *self.changes

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)


def word_problems(root: Path) -> WordProblems:
    """The model and data under `root`, made if they are not there."""
    directory = root / f"word-problems-v{VERSION}"
    found = WordProblems(directory / "model", *(directory / f"{name}.jsonl" for name in SIZES))

    def build(partial: Path) -> None:
        generator = np.random.Generator(np.random.Philox(key=[VERSION, 13]))
        stories = _problems(generator, apart=set())
        held_out: dict[tuple[int, ...], Problem] = {}
        while len(held_out) < SIZES["held_out"]:
            problem = next(stories)
            if len(problem.changes) == 2:  # unseen together; each step alone is seen
                held_out.setdefault(problem.numbers, problem)
        stories = _problems(generator, apart=set(held_out))
        told = {name: [next(stories) for _ in range(SIZES[name])] for name in ("conversations", "pairs", "problems")}
        easy = _easy(generator)
        rows = {
            "conversations": [_conversation(problem, generator) for problem in told["conversations"]],
            "pairs": [_pair(problem, generator) for problem in told["pairs"]],
            "problems": [_verifiable(problem.question, problem.answer) for problem in told["problems"]],
            "held_out": [_verifiable(problem.question, problem.answer) for problem in held_out.values()],
            "practice": [next(easy) for _ in range(SIZES["practice"])],
            "exam": [next(easy) for _ in range(SIZES["exam"])],
        }
        for name, of_file in rows.items():
            text = "".join(json.dumps(row) + "\n" for row in of_file)
            (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
        turns = [turn for row in rows["conversations"] for turn in row["messages"]]
        corpus = [f"<|{turn['role']}|>\n{turn['content']}\n" for turn in turns]
        save_model(partial / "model", corpus, seed=VERSION, hidden_size=96, num_hidden_layers=3)

    build_once(directory, found.exam.is_file, build)
    return found


def _problems(generator: np.random.Generator, apart: set[tuple[int, ...]]) -> Iterator[Problem]:
    """Without end: one change or two; none of the numbers `apart`, none below 0 or above LARGEST, no text twice."""
    seen: set[str] = set()
    while True:
        problem = _problem(
            generator, changes=int(generator.integers(1, 3)), start=int(generator.integers(2, 13)), most=MOST
        )
        totals = np.cumsum(problem.numbers)
        if problem.question in seen or problem.numbers in apart or totals.min() < 0 or totals.max() > LARGEST:
            continue
        seen.add(problem.question)
        yield problem


def _problem(generator: np.random.Generator, *, changes: int, start: int, most: int) -> Problem:
    by = tuple(int(c) for c in generator.integers(1, most + 1, changes) * generator.choice((-1, 1), changes))
    name, thing = (options[generator.integers(len(options))] for options in (NAMES, THINGS))
    return Problem(name, thing, start, by, tuple((GAINS if c > 0 else LOSSES)[generator.integers(3)] for c in by))


def _easy(generator: np.random.Generator) -> Iterator[dict]:
    """Without end, for a real small model: in turn a story with one change and a bare sum, of numbers of one digit; no
    text twice.
    """
    seen: set[str] = set()
    while True:
        story = _problem(generator, changes=1, start=int(generator.integers(2, 13)), most=9)
        terms = generator.integers(2, 10, int(generator.integers(2, 4))).tolist()
        asked = {
            "stories": (story.question, story.answer),
            "sums": (f"What is {' + '.join(map(str, terms))}?", sum(terms)),
        }
        for source, (question, answer) in asked.items():
            if question not in seen and answer >= 0:
                seen.add(question)
                yield _verifiable(question, answer) | {"source": source}


def _worked(problem: Problem, generator: np.random.Generator, slip: float) -> tuple[str, bool]:
    """(a worked answer whose every step goes wrong with probability `slip`, whether it ends in the right number)."""
    total, steps = problem.start, []
    for change in problem.changes:
        off = int(generator.choice((-2, -1, 1, 2))) if generator.random() < slip else 0
        result = max(0, total + change + off)
        steps.append(f"{total} {'+' if change > 0 else '-'} {abs(change)} = {result}.")
        total = result
    return f"{' '.join(steps)}\n#### {total}", total == problem.answer


def _asked(problem: Problem) -> dict[str, str]:
    return {"role": "user", "content": problem.question}


def _conversation(problem: Problem, generator: np.random.Generator) -> dict:
    answer, _ = _worked(problem, generator, SLIP)
    return {"source": "triptych", "messages": [_asked(problem), {"role": "assistant", "content": answer}]}


def _pair(problem: Problem, generator: np.random.Generator) -> dict:
    """A right answer and a wrong one; which is called the better one is wrong in `MISJUDGED` of them."""
    right, wrong = "", ""
    while not (right and wrong):
        answer, is_right = _worked(problem, generator, SLIP)
        right, wrong = (answer, wrong) if is_right else (right, answer)
    answers = (wrong, right) if generator.random() < MISJUDGED else (right, wrong)
    chosen, rejected = ([_asked(problem), {"role": "assistant", "content": answer}] for answer in answers)
    return {"source": "triptych", "prompt": problem.question, "chosen": chosen, "rejected": rejected}


def _verifiable(question: str, answer: int) -> dict:
    return {"messages": [{"role": "user", "content": question}], "ground_truth": str(answer), "dataset": "gsm8k"}
