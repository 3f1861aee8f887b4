"""What `launch.generate` reads from the command line, and what it writes of responses."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.data import ChatTokenizer, Question, QuestionReader
from engine.data.rows import BadRow
from engine.errors import UserError
from launch.display import shown
from rollout import Rollout


def check_output(output: str | None) -> None:
    """Raises UserError for a file that could not be written, before anything is sampled."""
    if output is None:
        return
    path = Path(output).absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--output {output}: {'is a directory' if path.is_dir() else 'no such directory'}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--output {output}: cannot be written")


def questions_of(texts: Sequence[str], read: QuestionReader, room: int) -> list[Question]:
    """What --prompt says, each text as the user's first turn. Raises UserError."""
    questions = []
    for place, text in enumerate(texts, 1):
        try:
            question = read({"prompt": [{"role": "user", "content": text}]}, Counter())
        except BadRow as problem:
            raise UserError(f"--prompt {place}: {problem}") from None
        if len(question.ids) > room:
            raise UserError(
                f"--prompt {place}: {len(question.ids)} tokens; --max_seq_length and --response_length leave room for"
                f" {room}"
            )
        questions.append(question)
    return questions


def rows_of(rollouts: Iterable[Rollout], questions: list[Question], chat: ChatTokenizer) -> Iterable[dict]:
    """A row of the file for each response."""
    for rollout in rollouts:
        question, response = questions[rollout.example], chat.response_text(rollout.response_ids)
        yield {
            "prompt": chat.tokenizer.decode(rollout.prompt_ids, skip_special_tokens=False),
            "messages": [*question.messages, {"role": "assistant", "content": response}],
            "response": response,
            "finish_reason": rollout.finish_reason,
            "tokens": len(rollout.response_ids),
            "sample": rollout.sample,
            **question.labels,
        }


def write(path: Path, rollouts: list[Rollout], questions: list[Question], chat: ChatTokenizer) -> None:
    """The file appears whole, in place of an earlier one, or not at all. Raises UserError."""
    partial = path.with_name(f".{path.name}.whole")
    try:
        with partial.open("w", encoding="utf-8") as out:
            for row in rows_of(rollouts, questions, chat):
                out.write(json.dumps(row, default=str) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"--output {path}: {error.strerror}") from None


def summary(rollouts: list[Rollout], chat: ChatTokenizer, count: int) -> list[str]:
    """The first responses with their prompts, and a line on all."""
    lines = []
    for rollout in rollouts[:count]:
        asked = chat.tokenizer.decode(rollout.prompt_ids, skip_special_tokens=False)
        tokens, end = len(rollout.response_ids), {"stop": "", "length": ", cut at --response_length"}
        lines += [
            f"--- prompt {rollout.example + 1}" + (f", response {rollout.sample + 1}" if rollout.sample else ""),
            *([shown(asked.strip())] if not rollout.sample else []),
            f"--- {tokens} token{'s' * (tokens != 1)}{end[rollout.finish_reason]}",
            shown(chat.response_text(rollout.response_ids).strip("\n")),
        ]
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    stopped = sum(rollout.finish_reason == "stop" for rollout in rollouts)
    more = f" ({len(rollouts) - count} more are not shown)" if count < len(rollouts) else ""
    return [
        *lines,
        f"{len(rollouts)} responses, {sum(lengths) / len(lengths):.1f} tokens on average, {stopped} ended by"
        f" themselves{more}",
    ]
