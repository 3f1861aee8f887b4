"""Sampling and judging: a line of the file for every response, as soon as it has ended, on whatever rank.

Every rank samples its share of the prompts; the others send their lines to rank 0 over the store that the ranks met at,
so that one process writes, no collective waits for the slowest, and no shared disk is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from engine.data import ChatTokenizer
from engine.flags import SamplingFlags
from engine.model import Base, load_untrained
from engine.world import World
from launch.evaluation.few_shot import Question
from launch.evaluation.file import Name, ResponseFile
from launch.inference import make_sampler
from launch.mail import Mail
from rollout import Request, Rollout, SamplingParams, parallel
from verifiers import Pool
from verifiers.further import ANSWER, LOOSE, asked_of, num_instructions

JUDGE = "verifiers.further:judged"
IN_FLIGHT = 4  # rows that a worker holds: a response waits behind few others before it is written


def ask(
    base: Base,
    world: World,
    flags: SamplingFlags,
    questions: list[Question],
    there: ResponseFile | None,
    settings: dict[str, Any],
) -> None:
    """Samples the responses that are not there yet, on all ranks, and has rank 0, where `there` is, write each as soon
    as it is judged. Collective. Raises UserError where those that are there are another model's.
    """
    parallel.check(base.config, flags.rollout_tensor_parallel, world)
    policy = load_untrained(base, world)
    settings = settings | {"weights": policy.identity}
    world.on_main("weights", lambda: there.check(settings) if there else None)
    missing = world.gather(there.missing if there else None)[0]
    if not missing:
        return
    window = max(len(question.ids) for question in questions) + flags.response_length
    sampler = make_sampler(base, policy, world, flags, window)
    sampler.load(policy)
    del policy
    params = SamplingParams.of(flags, *base.chat.end_ids)
    requests = requests_of(missing, {question.key: question for question in questions}, sampler.team)
    by_example = {example_of(question.key): question for question in questions}
    beside = {"model": base.name, "settings": settings}
    total = len(there.wanted) if there else 0
    bar = tqdm(
        total=total, initial=total - len(missing), unit="response", dynamic_ncols=True, disable=not there or None
    )
    take = lambda line: bar.update() if there and there.write(line) else None
    mail = Mail(world, take, there.path if there else None)
    pool = Pool(world.cores, flags.verifier_mode, module=flags.verifier_module, in_flight=IN_FLIGHT, judge=JUDGE)
    with bar, pool, mail:
        for seed, some in requests.items():
            stream = sampler.stream(some, params, seed=seed, step=0)
            if not sampler.team.leads:  # one rank of a team judges what all of them have sampled
                deque(stream, maxlen=0)
                continue
            for line in lines_of(stream, pool, base.chat, by_example, seed, beside):
                mail.send(line)


def lines_of(
    stream: Iterable[tuple[int, Rollout]],
    pool: Pool,
    chat: ChatTokenizer,
    questions: dict[int, Question],
    seed: int,
    beside: dict[str, Any],
) -> Iterator[str]:
    """A line of the file for every response of the stream: `questions` by the examples of its requests, `beside` what
    all lines say.
    """
    waiting: deque[tuple[Rollout, str, tuple[str, ...]]] = deque()

    def rows() -> Iterator[tuple]:
        for _, rollout in stream:
            question = questions[rollout.example]
            text = chat.response_text(rollout.response_ids)
            asked = asked_of(question.dataset, question.ground_truth)
            waiting.append((rollout, text, asked))
            yield from ((text, question.ground_truth, question.dataset, what) for what in asked)

    verdicts = pool.imap(rows())
    for verdict in verdicts:
        rollout, text, asked = waiting.popleft()
        said = {what: next(verdicts) for what in asked[1:]}
        question = questions[rollout.example]
        row = {
            "key": question.key,
            "seed": seed,
            "sample": rollout.sample,
            "source": question.source,
            "prompt": chat.tokenizer.decode(rollout.prompt_ids, skip_special_tokens=False),
            "response": text,
            "finish_reason": rollout.finish_reason,
            "prompt_tokens": len(rollout.prompt_ids),
            "response_tokens": len(rollout.response_ids),
            "ground_truth": question.ground_truth,
            "dataset": question.dataset,
            "score": verdict.score,
            "status": verdict.status,
            "reason": verdict.reason,
        }
        if ANSWER in said:
            row["answer"] = said[ANSWER].reason if said[ANSWER].score else None
        if LOOSE in said:
            row["loose"] = said[LOOSE].score
            row["instructions"] = num_instructions(question.dataset, question.ground_truth)
        yield json.dumps(row | beside, default=str) + "\n"


def example_of(key: str) -> int:
    """The number by which a question's noise is drawn: of its content, not of its place, so that a part of a
    dataset gets the same responses as the whole.
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")


def requests_of(missing: list[Name], questions: dict[str, Question], team: parallel.Team) -> dict[int, list[Request]]:
    """This team's share of the missing responses, by seed: every n-th question, with all samples of it."""
    by_seed: dict[int, dict[str, list[int]]] = {}
    for key, seed, sample in missing:
        by_seed.setdefault(seed, {}).setdefault(key, []).append(sample)
    return {
        seed: [
            Request(questions[key].ids, example_of(key), sample)
            for key in list(samples)[team.number :: team.count]
            for sample in samples[key]
        ]
        for seed, samples in by_seed.items()
    }


# --- to rank 0 --------------------------------------------------------------------------------------------------------
