"""Two models on the same problems: which is better, by how much, and could it be chance?

    python -m launch.evaluate --model_name_or_path A --dataset_name problems.jsonl --output a.jsonl
    python -m launch.evaluate --model_name_or_path B --dataset_name problems.jsonl --output b.jsonl
    python -m launch.compare a.jsonl b.jsonl

Responses are matched by the problem and its ground truth, whatever the models, templates and examples before the
question. A problem counts once, with the mean of its samples and seeds. The interval and p are of paired answers
(engine/train/paired.py), so they tell apart what two accuracies with an interval each could not. Not covered: what
another training run, of another seed, would give.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import parse
from engine.errors import UserError, in_one_line
from engine.flags import flag
from engine.train.paired import Paired, paired
from launch import commands
from launch.evaluation.file import Response, read_responses

NAMED = 5  # prompts that are in one file alone
OF_THE_MODEL = ("weights", "tokenizer")  # settings that two models differ in


@dataclass(frozen=True, kw_only=True)
class Config:
    __doc__ = __doc__
    a: str = flag(None, "what launch.evaluate --output wrote for the model to start from", positional=True)
    b: str = flag(None, "the same for the model that is compared with it", positional=True)


@dataclass(frozen=True)
class Comparison:
    """B against A: over all prompts, and by verifier and by source where there are several.

    `only_a` and `only_b` are the keys of prompts that are in one alone, `without_verdict` how many matched prompts are
    left out since a response of theirs has no verdict, `settings` what differs, as name → (A's, B's).
    """

    overall: Paired
    by: dict[str, dict[str, Paired]]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    without_verdict: int
    settings: dict[str, tuple[Any, Any]]

    def lines(self, a: str = "A", b: str = "B") -> list[str]:
        """For the screen, with these names for the two."""
        lines = [sentence(self.overall, a, b)]
        width = max([len(name) for groups in self.by.values() for name in groups], default=0)
        for kind, groups in self.by.items():
            lines += [f"  {kind} {name:{width}}  {short(found, a, b)}" for name, found in groups.items()]
        if self.by:
            lines.append("  (groups are looked at one by one: of twenty without a difference, one has p < 0.05)")
        for name, keys in ((a, self.only_a), (b, self.only_b)):
            if keys:
                more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
                lines.append(f"only in {name}, not compared: {len(keys)} prompts ({', '.join(keys[:NAMED])}{more})")
        if self.without_verdict:
            lines.append(f"not compared: {self.without_verdict} prompts with a response that could not be verified")
        if self.settings:
            differing = (f"{name} {_word(of_a)} -> {_word(of_b)}" for name, (of_a, of_b) in self.settings.items())
            lines.append(f"settings that differ: {', '.join(differing)}")
        return [*lines, "not covered: how far another training run of the same recipe, of another seed, would differ"]


def compare(a: str | Path, b: str | Path) -> Comparison:
    """The comparison of two files that launch.evaluate wrote. Raises UserError."""
    (of_a, settings_a), (of_b, settings_b) = read_responses(Path(a)), read_responses(Path(b))
    return compared(of_a, of_b, settings_a, settings_b)


def compared(
    a: Iterable[Response], b: Iterable[Response], settings_a: dict[str, Any], settings_b: dict[str, Any]
) -> Comparison:
    """The comparison of two models' responses. Raises UserError as `matched` does."""
    by_key_a, by_key_b = by_prompt(a), by_prompt(b)
    both = matched(*({key: of[0].verifier for key, of in by_key.items()} for by_key in (by_key_a, by_key_b)))
    judged = [key for key in both if not any(np.isnan(r.score) for r in by_key_a[key] + by_key_b[key])]

    def over(keys: list[str]) -> Paired:
        return paired(
            [[r.score for r in by_key_a[key]] for key in keys], [[r.score for r in by_key_b[key]] for key in keys]
        )

    by: dict[str, dict[str, Paired]] = {}
    for kind in ("verifier", "source"):
        groups: dict[str, list[str]] = {}
        for key in judged:
            response = by_key_a[key][0]
            groups.setdefault(response.verifier if kind == "verifier" else response.source, []).append(key)
        if len(groups) > 1:
            by[kind] = {name: over(keys) for name, keys in sorted(groups.items())}
    differing = {
        name: (settings_a.get(name), settings_b.get(name))
        for name in sorted({*settings_a, *settings_b}.difference(OF_THE_MODEL))
        if settings_a.get(name) != settings_b.get(name)
    }
    only_a, only_b = (
        tuple(k for k in of if k not in other) for of, other in ((by_key_a, by_key_b), (by_key_b, by_key_a))
    )
    return Comparison(over(judged), by, only_a, only_b, len(both) - len(judged), differing)


def matched(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """The keys of the prompts that both have, of key → verifier. Raises UserError for none, and for a prompt that is
    judged by another verifier in one than in the other."""
    both = [key for key in a if key in b]
    if not both:
        raise UserError("the two have no prompt in common: expected responses to the same problems")
    for key in both:
        if a[key] != b[key]:
            raise UserError(f"prompt {key} is judged by {a[key]} in the one and by {b[key]} in the other")
    return both


def by_prompt(responses: Iterable[Response]) -> dict[str, list[Response]]:
    """Responses by the key of their prompt."""
    found: dict[str, list[Response]] = {}
    for response in responses:
        found.setdefault(response.key, []).append(response)
    return found


def sentence(found: Paired, a: str, b: str) -> str:
    """'B is better than A by 3.1 points (52.0 % against 48.9 %), 95 % 1.4 to 4.9, p = 0.0005 (1,319 prompts; ...)'."""
    if not found.prompts:
        return "no prompt is left to compare"
    better, worse, sign = (b, a, 1) if found.difference >= 0 else (a, b, -1)
    of_better, of_worse = (found.mean_b, found.mean_a) if sign > 0 else (found.mean_a, found.mean_b)
    low, high = (found.low, found.high) if sign > 0 else (-found.high, -found.low)
    interval = f"95 % {100 * low:+.1f} to {100 * high:+.1f}, {p_value(found.p)}"
    means = f"{of_better:.1%} against {of_worse:.1%}"
    if found.difference == 0:
        head = f"{a} and {b} are equal ({found.mean_a:.1%}), {interval}"
    else:
        head = f"{better} is better than {worse} by {100 * abs(found.difference):.1f} points ({means}), {interval}"
    return f"{head} ({counts(found, a, b)})"


def counts(found: Paired, a: str, b: str) -> str:
    """'1,319 prompts; 88 only B right, 47 only A right', or which has the higher mean."""
    if found.single:
        return f"{found.prompts:,} prompts; {found.better_b} only {b} right, {found.better_a} only {a} right"
    return f"{found.prompts:,} prompts; {b} scores higher on {found.better_b}, {a} on {found.better_a}"


def short(found: Paired, a: str, b: str) -> str:
    """The same as one row of a table: B minus A."""
    points = f"{100 * found.difference:+6.1f} points, 95 % {100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f"{points}, {p_value(found.p)} ({counts(found, a, b)})"


def p_value(p: float) -> str:
    """'p = 0.03', to two digits that count."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def _word(value: Any) -> str:
    return "none" if value is None else str(value)[:40]


def run(config: Config) -> None:
    """The command. Raises UserError."""
    if config.a is None or config.b is None:
        raise UserError("command line: expected two files of responses, A.jsonl B.jsonl (--help says how to make them)")
    print(f"A: {config.a}\nB: {config.b}")
    print("\n".join(compare(config.a, config.b).lines()))


if __name__ == "__main__":
    in_one_line(lambda: run(parse(Config, elsewhere=commands)))
