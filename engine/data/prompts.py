"""Prompts with verifiable answers (RLVR rows), in the forms in which they are published.

what is asked     `messages`, `prompt` (text or messages), `question`, `problem`, `query`, `instruction` (and `input`),
                  ShareGPT's `conversations`; `system` and `tools` may stand beside it
the answer        `ground_truth`, verl's `reward_model.ground_truth`, `answer`, `solution`; behind '####' as GSM8K has
                  it, in the last \\boxed as MATH has it; IFEval's `instruction_id_list` and `kwargs`
the verifier      `dataset`, or --verifier, or what `data_source` is known to need, or what the answer's form says
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.data import bad_rows, messages
from engine.data.chat import ChatTokenizer
from engine.data.conversations import asked_turns, note_unread, with_system
from engine.data.cuts import UNCUT
from engine.data.files import Source
from engine.data.messages import Conversation, Notes, note_lines
from engine.data.rows import BadRow
from engine.errors import UserError
from engine.flags import PromptFlags

ASKED = ("messages", "prompt", "question", "problem", "query", "instruction", "conversations")
ANSWERS = ("ground_truth", "reward_model", "answer", "solution")
BOX, SHORT_ANSWER, BRACE = re.compile(r"\\(?:boxed|fbox)\s*"), re.compile(r"[^\s$\\]+"), re.compile(r"(?<!\\)[{}]")
Check = Callable[[Any, Any], None]  # (dataset, ground truth); raises ValueError
# what verl's rows call themselves, with the verifier that judges them; a name may go on, but not with a letter
SOURCES = {
    "openai/gsm8k": "gsm8k",
    "lighteval/math": "math",
    "digitallearninggmbh/math-lighteval": "math",
    "huggingfaceh4/math-500": "math",
    "huggingfaceh4/aime": "math",
    "math": "math",
    "math_dapo": "math",
    "aime": "math",
    "amc": "math",
    "numina": "math",
    "deepscaler": "math",
    "searchr1": "string_matcher",
}


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, up to where the assistant begins to write, and what its answer is verified against; the file that
    its row stands in.
    """

    ids: np.ndarray
    ground_truth: Any
    dataset: str | list[str]
    source: str = ""

    @property
    def verifier(self) -> str:
        """The name, or names, of what judges its answer."""
        return self.dataset.lower() if isinstance(self.dataset, str) else "+".join(map(str.lower, self.dataset))

    @property
    def best_score(self) -> int:
        """Of a right answer: one for each of its verifiers."""
        return 1 if isinstance(self.dataset, str) else len(self.dataset)


ReadPrompt = Callable[[dict, Notes], Prompt]  # raises BadRow


@dataclass(frozen=True)
class PromptReader:
    """row → Prompt. `check(dataset, ground_truth)` raises ValueError for a row that no verifier could judge. Of a
    prompt of more than `longest` tokens, which will be dropped, not all of them need be there.
    """

    chat: ChatTokenizer
    flags: PromptFlags
    check: Check
    fold_system: bool = False
    longest: int = UNCUT

    def __call__(self, row: dict, notes: Notes) -> Prompt:
        """Raises BadRow."""
        said, ground_truth, dataset = self.read(row, notes)
        return Prompt(self.ids(self.worded(said, notes), notes), ground_truth, dataset)

    def read(self, row: dict, notes: Notes) -> tuple[Conversation, Any, str | list[str]]:
        """(what the row asks, its ground truth, its verifier). Raises BadRow."""
        row = with_instructions(row)
        asked = next((column for column in ASKED if row.get(column) is not None), None)
        if asked is None:
            got = ", ".join(sorted(row)[:6]) or "nothing"
            raise BadRow(f"messages: expected what is asked, as one of {', '.join(ASKED)}, got {got}")
        answered = next((column for column in ANSWERS if row.get(column) is not None), None)
        if answered is None:
            others = "; conversations are read by launch.sft, pairs by launch.dpo"
            raise BadRow(f"ground_truth: missing (expected it, or one of {', '.join(ANSWERS[1:])}{others})")
        read = {asked, answered, "dataset", "data_source", "system", "tools"}
        note_unread(row, read | ({"input"} if asked == "instruction" else set()), notes)
        said = self._asked(row, asked, notes)
        dataset, ground_truth = self._judged(row, asked, answered, notes)
        return said, ground_truth, dataset

    def ids(self, said: Conversation, notes: Notes) -> np.ndarray:
        """The tokens of a conversation up to the turn that is to be written. Raises BadRow."""
        said = messages.folded(said) if self.fold_system else said
        ids = self.chat.prompt_ids(said.messages, said.tools, min(self.longest + 1, UNCUT))
        self.chat.note_unshown(said.messages, said.tools, "", notes)
        return ids

    def _asked(self, row: dict, asked: str, notes: Notes) -> Conversation:
        """The conversation up to the turn that is to be written. Raises BadRow."""
        said = messages.read(asked_turns(row, asked), asked, notes)
        said = with_system(replace(said, tools=messages.tools_of(row, notes)), row)
        kept = said.messages
        while kept and kept[-1]["role"] == "assistant":  # a worked answer behind the question is no part of the prompt
            kept = kept[:-1]
        if len(kept) < len(said.messages):
            notes["not used", f"answers at the end of {asked}"] += 1
        if not kept:
            raise BadRow(f"{asked}: expected a turn to answer, got only the assistant's")
        if self.flags.prompt_template is not None and kept[-1]["role"] != "user":
            raise BadRow(f"{asked}: expected the user's turn at the end (--prompt_template), got {kept[-1]['role']}'s")
        return Conversation(kept, said.tools)

    def worded(self, said: Conversation, notes: Notes) -> Conversation:
        """The conversation with the command line's additions: the text around the question, a system turn."""
        kept = said.messages
        if self.flags.prompt_template is not None:
            question = self.flags.prompt_template.replace("{prompt}", kept[-1]["content"])
            kept = [*kept[:-1], kept[-1] | {"content": question}]
        if self.flags.system_prompt is not None:
            if kept[0]["role"] == "system":
                notes["rows keep their own system turn (--system_prompt)", ""] += 1
            else:
                kept = [{"role": "system", "content": self.flags.system_prompt}, *kept]
        return Conversation(kept, said.tools)

    def _judged(self, row: dict, asked: str, answered: str, notes: Notes) -> tuple[str | list[str], Any]:
        """(the verifier, what it compares with). Raises BadRow."""
        answer = _rewarded(row[answered], notes) if answered == "reward_model" else row[answered]
        is_worked = isinstance(answer, str) and answered in ("answer", "solution")
        dataset, source = row.get("dataset"), row.get("data_source")
        named = [dataset, self.flags.verifier, source_verifier(dataset), source_verifier(source)]
        if dataset is None and not any(named):
            named = [_verifier_by_form(asked, answer if is_worked else "")]
        problem = None
        for verifier in filter(None, named):
            truth = _own_answer(answer, verifier) if is_worked else answer
            try:
                self.check(verifier, truth)
            except ValueError as error:
                problem = str(error)
                if not problem.startswith("dataset"):  # the verifier is known, and this is no label for it
                    break
                continue
            if dataset is not None and verifier not in (dataset, source_verifier(dataset)):
                notes["not used", "dataset that is no verifier's name"] += 1
            if source is not None and verifier != source_verifier(source):
                notes["not used", "data_source"] += 1
            return verifier, truth
        if problem is not None:
            raise BadRow(problem)
        unknown = f", and data_source {str(source)[:40]!r} is not a known one" if source is not None else ""
        raise BadRow(f"dataset: missing (the verifier's name; or give --verifier){unknown}")


def with_instructions(row: dict) -> dict:
    """A row of IFEval itself, whose instructions stand beside the prompt, with them as ground truth of `ifeval`; other
    rows as they are.
    """
    if row.get("instruction_id_list") is None or any(row.get(column) is not None for column in ANSWERS):
        return row
    told = {"instruction_id": row["instruction_id_list"], "kwargs": row.get("kwargs")}
    rest = {column: value for column, value in row.items() if column not in ("instruction_id_list", "kwargs")}
    return rest | {"dataset": row.get("dataset") or "ifeval", "ground_truth": told}


def _rewarded(given: Any, notes: Notes) -> Any:
    """The ground truth of verl's reward_model, an object or its JSON text. Raises BadRow."""
    reward = messages.parsed(given, "reward_model")
    if not isinstance(reward, dict) or reward.get("ground_truth") is None:
        raise BadRow("reward_model.ground_truth: missing")
    if not str(reward.get("style") or "rule").startswith("rule"):
        raise BadRow(f"reward_model.style: expected rule, got {str(reward['style'])[:40]!r}")
    for key in {key for key, value in reward.items() if value is not None} - {"ground_truth", "style"}:
        notes["not used", f"reward_model.{key}"] += 1
    return reward["ground_truth"]


def _verifier_by_form(asked: str, worked: str) -> str | None:
    """The verifier that the columns' names and the form of a worked answer stand for."""
    if asked == "problem" or last_boxed(worked) is not None:
        return "math"
    return "gsm8k" if behind_hashes(worked) is not None else None


def _own_answer(answer: str, verifier: str | list[str]) -> str:
    """The final answer of a worked one: behind GSM8K's '####', in MATH's last box; else all of it."""
    boxed = last_boxed(answer) if str(verifier).lower() == "math" else None
    return boxed or behind_hashes(answer) or answer


def behind_hashes(answer: str) -> str | None:
    """What stands behind '####' in the last line, where it is a number as GSM8K has it; None for a heading."""
    line = answer.rstrip().rpartition("\n")[2]
    _, marks, final = line.partition("####")
    return final.strip() if marks and re.search(r"\d", final) and "\\boxed" not in answer else None


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, or behind a \\boxed without braces; None without one that is closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    opened = BOX.match(text, start) if start >= 0 else None
    if opened is None:
        return None
    inside = opened.end()
    if not text.startswith("{", inside):
        short = SHORT_ANSWER.match(text, inside)
        return short.group().rstrip(".,;") if short else None
    depth = 0
    for brace in BRACE.finditer(text, inside):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[inside + 1 : brace.start()].strip()
    return None


def source_verifier(data_source: Any) -> str | None:
    """The verifier that rows of this source are known to need; None for a source that is not known."""
    if not isinstance(data_source, str):
        return None
    name = data_source.strip().lower()
    found = [known for known in SOURCES if re.match(re.escape(known) + r"(?![a-z])", name)]
    return SOURCES[max(found, key=len)] if found else None


def load_prompts(
    source: Source, read: ReadPrompt, max_prompt_tokens: int, on_bad_row: str, max_bad_rows: float = math.inf
) -> tuple[list[Prompt], list[str]]:
    """(prompts, lines that say what was kept, dropped, not used and bad). A prompt longer than `max_prompt_tokens` is
    dropped and counted. Raises UserError.
    """
    prompts, bad, too_long = [], bad_rows.BadRows(), 0
    notes: Notes = Counter()
    for place, row in source.rows():
        bad.rows[bad_rows.file_of(place)] += 1
        noted: Notes = Counter()
        try:
            if isinstance(row, BadRow):
                raise row
            prompt = read(row, noted)
        except BadRow as problem:
            bad.add(place, str(problem))
            if on_bad_row == "error":
                raise UserError(f"{source.name}{place}: {problem}") from None
            continue
        notes += noted
        if len(prompt.ids) > max_prompt_tokens:
            too_long += 1
        else:
            prompts.append(prompt if prompt.source else replace(prompt, source=source.name + place.rpartition(":")[0]))
    dropped = f", {too_long} dropped (longer than {max_prompt_tokens} tokens)" if too_long else ""
    said = f", {bad.count} bad" if bad.count else ""
    lines = [f"{source.name}: {bad.rows.total()} rows, {len(prompts)} kept{dropped}{said}"]
    lines += [*note_lines(notes), *bad_rows.lines(source.name, bad.header())]
    if not prompts:
        why = (
            f"the first bad row is {source.name}{bad.listed[0]}"
            if bad.count
            else f"none has at most {max_prompt_tokens} tokens: raise --max_seq_length, or lower --response_length"
            if too_long
            else "it is empty"
        )
        raise UserError(f"{source.name}: no usable prompt, {why}")
    if refused := bad_rows.refusal(source.name, bad.header(), max_bad_rows):
        raise UserError(refused)
    return prompts, lines


def fingerprint_of(prompts: list[Prompt]) -> str:
    """Of the prompts, what they are verified against, and their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.ids.tobytes() + json.dumps([prompt.ground_truth, prompt.dataset], default=str).encode())
    return digest.hexdigest()
