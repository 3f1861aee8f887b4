"""What launch.evaluate says: the settings before, the table after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.flags import SamplingFlags
from launch.evaluation.few_shot import FewShot, Question
from launch.evaluation.file import Response
from launch.evaluation.results import Evaluation, Score
from verifiers.further import votes

SHOWN = 4  # responses on the screen


def sampled_how(flags: SamplingFlags, seeds: int, first: int) -> str:
    """'greedy, one response to each prompt of at most 1024 tokens' or what is drawn, on one line."""
    longest, samples = flags.response_length, flags.num_samples_per_prompt
    if flags.temperature == 0:
        return f"greedy, one response to each prompt, of at most {longest} tokens"
    cut = (f", top_k {flags.top_k}" if flags.top_k else "") + (f", top_p {flags.top_p:g}" if flags.top_p < 1 else "")
    which = f"{seeds} seeds ({first} to {first + seeds - 1})" if seeds > 1 else f"seed {first}"
    of_each = f"{samples} samples under " if samples > 1 else "a response under "
    each = "each of " if seeds > 1 else ""
    return f"temperature {flags.temperature:g}{cut}; {of_each}{each}{which}, of at most {longest} tokens"


def examples_how(few_shot: FewShot, file: str | None) -> str:
    """'no examples before the question', or how many of which file and how."""
    if not few_shot.count:
        return "no examples before the question"
    which = "drawn for each question from" if few_shot.drawn else "the first of"
    how = "as turns of the chat" if few_shot.form == "turns" else "as text in the question's turn"
    return f"{few_shot.count} examples before the question, {which} {file}, {how}"


def first_screen(questions: Sequence[Question], model: str, data: str, how: Sequence[str], end: str) -> list[str]:
    """What is evaluated, on what, and how; `end` is how the first prompt ends."""
    counts: dict[str, int] = {}
    for question in questions:
        counts[question.verifier] = counts.get(question.verifier, 0) + 1
    kinds = ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items()))
    lengths = [len(question.ids) for question in questions]
    return [
        f"evaluating {model} on {data}",
        f"  {len(questions):,} prompts ({kinds}) of {min(lengths):,} to {max(lengths):,} tokens, examples included",
        *(f"  {line}" for line in how),
        f"  the first prompt ends with {end!r}",
    ]


def table(found: Evaluation, responses: Sequence[Response]) -> list[str]:
    """All that was measured, aligned; then a few responses with their verdicts."""
    rows: list[tuple[str, Score]] = []
    for kind, groups in found.by.items():
        rows += [(f"{kind} {name}", score) for name, score in groups.items()]
        if kind == "source" and found.over_sources is not None:
            rows.append(("mean over sources", found.over_sources))
    n, k = found.scores_NK.shape
    whole = Score(found.accuracy, found.low, found.high, n - prompts_without(found), n * k)
    rows = rows[:1] if len(rows) == 1 else [("all", whole), *rows]
    rows += [(f"IFEval {name}", score) for name, score in found.ifeval.items()]
    rows += [(f"pass@{of}", score) for of, score in found.pass_at.items()]
    if found.majority is not None:
        rows.append((f"majority@{max(found.pass_at)}", found.majority))
    width = max(8, *(len(name) for name, _ in rows))
    lines = [f"{'':{width}} {'prompts':>8} {'responses':>10} {'score':>8}   95 % interval"]
    for name, score in rows:
        between = f"{score.low:.2%} to {score.high:.2%}"
        lines.append(f"{name:{width}} {score.prompts:8,} {score.responses:10,} {score.mean:8.2%}   {between}")
    return [*lines, *remarks(found, responses), *examples(responses)]


def prompts_without(found: Evaluation) -> int:
    """Prompts with a response that has no verdict."""
    return int(np.isnan(found.scores_NK).any(1).sum())


def remarks(found: Evaluation, responses: Sequence[Response]) -> list[str]:
    """The spread of seeds, lengths, what is not in the table and why."""
    lines = []
    if len(found.seeds) > 1:
        values = [value for value in found.seeds.values() if not np.isnan(value)]
        each = ", ".join(f"{seed}: {value:.2%}" for seed, value in found.seeds.items())
        spread = f"; standard deviation {np.std(values, ddof=1):.2%}" if len(values) > 1 else ""
        lines.append(f"seeds: {each}{spread}")
    stopped = np.mean([response.stopped for response in responses])
    length = np.mean([response.response_tokens for response in responses])
    lines.append(f"responses: {length:.1f} tokens on average, {stopped:.1%} ended by themselves")
    if found.without_verdict:
        prompts = prompts_without(found)
        lines.append(f"left out: {prompts} prompts with {found.without_verdict} responses that could not be verified")
    if found.too_long:
        lines.append(f"left out: {found.too_long} prompts too long for --max_seq_length, and --response_length in it")
    mute = sorted({response.verifier for response in responses if not votes(response.verifier)})
    if found.pass_at and mute:
        lines.append(f"majority is not defined for {', '.join(mute)}: no answer that could be counted is read there")
    return lines


def examples(responses: Sequence[Response]) -> list[str]:
    """A few responses, from the first to the last."""
    some = responses[:: max(1, len(responses) // SHOWN)][:SHOWN]
    return [f"  {response.score:g} ({response.reason[:80]}): {response.text!r}" for response in some]
