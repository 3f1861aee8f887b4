"""What is measured of the responses: accuracy by group, pass@k, majority@n, IFEval's four, the spread of seeds.

K responses to each of N prompts are S seeds x n samples: a seed is a repetition of the whole evaluation, its n samples
are what pass@k and majority@n are taken over. A prompt with a response that has no verdict is left out of all.

N prompts · S seeds · n samples · K = S n.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.train import interval
from launch.evaluation.file import Name, Response
from verifiers.further import same, votes

Row = list[Response]  # to one prompt, by seed and sample
BINS = 6  # of lengths


@dataclass(frozen=True)
class Score:
    """A mean in [0, 1] with its 95 % interval, of so many prompts and responses."""

    mean: float
    low: float
    high: float
    prompts: int
    responses: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What launch.evaluate measured.

    scores_NK: float64, NaN where there is no verdict; a row for every one of `keys`, a column for every sample of every
    seed. `by`: kind of group → its name → Score; `over_sources`: the mean of sources, each counting the same, where
    there are several. `pass_at` k of one seed's samples, `majority` of them (None: one sample, or no verifier that
    reads an answer), `ifeval` the four of its metrics, `seeds` the accuracy under each. `too_long`: prompts that left
    no room for a response, of which nothing is known. `output`: the file of responses.
    """

    accuracy: float
    low: float
    high: float
    scores_NK: np.ndarray
    keys: tuple[str, ...]
    by: dict[str, dict[str, Score]]
    over_sources: Score | None
    pass_at: dict[int, Score]
    majority: Score | None
    ifeval: dict[str, Score]
    seeds: dict[int, float]
    without_verdict: int
    too_long: int
    output: Path | None


def evaluation(
    responses: dict[Name, Response], wanted: Sequence[Name], output: Path | None = None, too_long: int = 0
) -> Evaluation:
    """All that is measured of these responses; `wanted` names them by seed, then prompt, then sample."""
    rows: dict[str, Row] = {}
    for name in wanted:
        rows.setdefault(name[0], []).append(responses[name])
    seeds = list(dict.fromkeys(seed for _, seed, _ in wanted))
    samples = len(wanted) // len(rows) // len(seeds)
    scores_NK = np.array([[response.score for response in row] for row in rows.values()])
    judged = [row for row in rows.values() if not any(np.isnan(response.score) for response in row)]
    accuracy, low, high = interval.accuracy(scores_NK)
    return Evaluation(
        accuracy,
        low,
        high,
        scores_NK,
        tuple(rows),
        by={kind: found for kind, found in groups(judged).items() if len(found) > 1 or kind == "verifier"},
        over_sources=over_sources(judged),
        pass_at=passes(judged, len(seeds), samples) if samples > 1 else {},
        majority=majority(judged, len(seeds), samples) if samples > 1 else None,
        ifeval=instruction_following(judged),
        seeds={seed: mean([r.score for row in judged for r in row if r.seed == seed]) for seed in seeds},
        without_verdict=int(np.isnan(scores_NK).sum()),
        too_long=too_long,
        output=output,
    )


def mean(values: Sequence[float]) -> float:
    """NaN of none."""
    return float(np.mean(values)) if len(values) else math.nan


def of_prompts(rows: Sequence[Sequence[float]]) -> Score:
    """Of as many scores for every prompt."""
    scores_NK = np.array(rows, dtype=float).reshape(len(rows), -1)
    return Score(*interval.accuracy(scores_NK), len(rows), scores_NK.size)


# --- by group ---------------------------------------------------------------------------------------------------------


def groups(rows: list[Row]) -> dict[str, dict[str, Score]]:
    """Of prompts by verifier, source and length, and of responses by length and by how they ended."""
    of_prompt: dict[str, Callable[[Response], str]] = {
        "verifier": lambda response: response.verifier,
        "source": lambda response: response.source,
        "prompt tokens": binning([row[0].prompt_tokens for row in rows], lambda response: response.prompt_tokens),
    }
    of_response: dict[str, Callable[[Response], str]] = {
        "response tokens": binning(
            [response.response_tokens for row in rows for response in row], lambda response: response.response_tokens
        ),
        "response ended": lambda response: "by itself" if response.stopped else "cut off",
    }
    found: dict[str, dict[str, Score]] = {}
    for kind, name_of in of_prompt.items():
        scores: dict[str, list[list[float]]] = defaultdict(list)
        for row in rows:
            scores[name_of(row[0])].append([response.score for response in row])
        found[kind] = {name: of_prompts(scores[name]) for name in sorted(scores, key=_numbers_first)}
    for kind, name_of in of_response.items():
        parts: dict[str, list[list[float]]] = defaultdict(list)
        for row in rows:
            of_row: dict[str, list[float]] = defaultdict(list)
            for response in row:
                of_row[name_of(response)].append(response.score)
            for name, some in of_row.items():
                parts[name].append(some)
        found[kind] = {name: of_some(parts[name]) for name in sorted(parts, key=_numbers_first)}
    return found


def over_sources(rows: list[Row]) -> Score | None:
    """The mean of the means of sources, where there are several: MATH's mean over subjects."""
    sources: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        sources[row[0].source].append([response.score for response in row])
    if len(sources) < 2:
        return None
    return Score(*interval.mean_of_groups(list(map(np.array, sources.values()))), len(rows), sum(map(len, rows)))


def of_some(rows: list[list[float]]) -> Score:
    """Of some scores of every prompt, as many as there are."""
    sums_N, counts_N = np.array([sum(row) for row in rows]), np.array([len(row) for row in rows])
    return Score(*interval.clustered(sums_N, counts_N), len(rows), int(counts_N.sum()))


def binning(lengths: Sequence[int], length_of: Callable[[Response], int]) -> Callable[[Response], str]:
    """Lengths between powers of two, five of them at most below the longest."""
    top = max(lengths, default=1).bit_length()
    edges = [2**i for i in range(max(0, top - BINS + 1), top + 1)]

    def name_of(response: Response) -> str:
        upper = next(edge for edge in edges if length_of(response) < edge)
        lower = 0 if upper == edges[0] else upper // 2
        return f"{lower} to {upper - 1}"

    return name_of


def _numbers_first(name: str) -> tuple[int, str]:
    first = name.split()[0] if name else ""
    return (int(first) if first.isdigit() else 0), name


# --- several samples --------------------------------------------------------------------------------------------------


def passes(rows: list[Row], seeds: int, samples: int) -> dict[int, Score]:
    """pass@k for k = 1, 2, 4, ... and n; a response passes with full marks. Of several seeds the mean."""
    right_NS = np.array([[r.score >= 1 for r in row] for row in rows]).reshape(len(rows), seeds, samples).sum(-1)
    found = {}
    for k in sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples}):
        estimates_N = interval.pass_at_k(right_NS, samples, k).mean(-1)
        ones_N = np.ones(len(rows))
        score = interval.clustered(estimates_N, ones_N, most=len(rows) * seeds * samples)
        found[k] = Score(*score, len(rows), len(rows) * seeds * samples)
    return found


def majority(rows: list[Row], seeds: int, samples: int) -> Score | None:
    """Of the prompts whose verifier reads an answer, how often the answer that most of n samples give is right; None
    without such prompts. Each seed has a vote of its own."""
    rows = [row for row in rows if votes(row[0].verifier)]
    if not rows:
        return None
    winners = [[winner(row[s * samples : (s + 1) * samples]) for s in range(seeds)] for row in rows]
    found = of_prompts([[0.0 if of is None else of.score for of in row] for row in winners])
    return replace(found, responses=len(rows) * seeds * samples)


def winner(responses: Sequence[Response]) -> Response | None:
    """The first response that gives the answer that most give; of as many, the answer that is seen first. One without
    an answer votes for nothing; None if none has one."""
    first: list[Response] = []
    count: list[int] = []
    for response in responses:
        if response.answer is None:
            continue
        place = next((i for i, f in enumerate(first) if same(str(f.answer), response.answer, f.verifier)), len(first))
        if place == len(first):
            first.append(response)
            count.append(0)
        count[place] += 1
    return first[count.index(max(count))] if first else None


# --- IFEval -----------------------------------------------------------------------------------------------------------


def instruction_following(rows: list[Row]) -> dict[str, Score]:
    """IFEval's four metrics, of its rows: prompts of which all instructions are followed, and instructions followed,
    strictly and loosely (Zhou et al. 2023, section 2.3); {} without such rows."""
    rows = [row for row in rows if row[0].instructions and row[0].loose is not None]
    if not rows:
        return {}
    found = {}
    per_prompt_N = np.array([row[0].instructions for row in rows])
    for how in ("strict", "loose"):
        share_NK = np.array([[r.score if how == "strict" else r.loose for r in row] for row in rows], dtype=float)
        found[f"prompt-level {how}"] = of_prompts((share_NK > 1 - 1e-9).astype(float).tolist())
        followed_N = np.rint(share_NK * per_prompt_N[:, None]).sum(1)
        trials_N = per_prompt_N * share_NK.shape[1]
        score = interval.clustered(followed_N, trials_N)
        found[f"instruction-level {how}"] = Score(*score, len(rows), share_NK.size)
    return found
