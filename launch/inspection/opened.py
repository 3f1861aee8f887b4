"""The flags of launch.data, and what they name: tokenizer, datasets, evaluation sets, read as the stage reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.data import ChatTokenizer, PromptReader, embedded
from engine.data.conversations import form_of
from engine.data.cuts import UNCUT
from engine.data.files import Source, open_source
from engine.data.judgements import PAIRS, Judgement
from engine.data.rows import BadRow
from engine.data.sources import conversations_prepared, mixture, pairs_prepared
from engine.errors import UserError
from engine.flags import fill, flag
from engine.model import open_model
from engine.world import World
from launch.inspection.likeness import EvaluationSet
from launch.inspection.look import AsFarAsItGoes, ConversationReader, PairReader, ProblemReader, Reader, asked_text
from launch.judges import checker, pinned

THE_DATA = "what is shown"
READ = (  # the stages' flags that decide what is shown; the others are the training's
    *("model_name_or_path", "model_revision", "add_special_tokens", "chat_template", "dataset_name", "mixer_list"),
    *("dataset_revision", "dataset_split", "eval_dataset_name", "eval_split", "max_seq_length", "on_bad_row"),
    *(
        "max_bad_rows",
        "system_role",
        "cache_dir",
        "dataset_num_proc",
        "seed",
        "text_column",
        "only_label",
        "history_thoughts",
    ),
    *("preference_column", "preference_numbers", "chosen_by_score", "count_turns", "verifier", "prompt_template"),
    *("system_prompt", "verifier_mode", "verifier_module", "response_length"),
)
KINDS = {"sft": "conversations", "dpo": "pairs", "ppo": "problems", "grpo": "problems"}  # of rows that a stage reads


@dataclass(frozen=True, kw_only=True)
class InspectionFlags:
    """What is looked for in a dataset, and what is shown of it."""

    against: tuple[str, ...] | None = flag(
        None,
        "evaluation sets that the rows must not hold: files, directories or hub ids with prompts in any form that is"
        " read (their split: --eval_split); --eval_dataset_name is one of them",
        THE_DATA,
        many=True,
    )
    drop_overlap: str | None = flag(
        None, "with --against: write the rows that do not overlap to this file, as JSON lines", THE_DATA
    )
    page: str | None = flag(None, "write a page of examples with their masks to this file", THE_DATA)
    examples: int = flag(0, "print so many examples, trained tokens in [[ ]]", THE_DATA)


@dataclass(frozen=True)
class Opened:
    """What the flags name. `names` are the datasets' as they were given, with the amounts taken."""

    stage: str
    config: Any
    chat: ChatTokenizer
    names: list[tuple[str, str]]
    sources: list[Source]
    readers: list[Reader]
    limit: int
    limit_flag: str
    evaluations: list[tuple[EvaluationSet, int]]

    @property
    def kind(self) -> str:
        return KINDS[self.stage]


def stage_of(row: dict) -> tuple[str, str]:
    """(the first stage that reads it, the columns that say so) of a row. Raises BadRow for one that no stage reads."""

    def there(*columns: str) -> bool:
        return all(row.get(column) is not None for column in columns)

    pair = next((pair for pair in (("chosen", "rejected"), *PAIRS, ("completions",)) if there(*pair)), None)
    if pair:
        return "dpo", " and ".join(pair)
    for column in ("ground_truth", "reward_model"):
        if there(column):
            return "ppo", column
    if there("problem") and (there("answer") or there("solution")):
        return "ppo", "problem"
    try:
        return "sft", form_of(row)
    except BadRow:
        if there("answer") or there("solution"):
            return "ppo", "answer" if there("answer") else "solution"
        raise


def guessed(config: Any) -> tuple[str, str]:
    """(stage, why) of the first row that is one, of what the flags name. Raises UserError."""
    names = mixture(config)
    if names[0][0] is None:
        return "sft", "nothing is named, so the embedded conversations are shown"
    source = open_source(names[0][0], config.dataset_split, config.dataset_revision)
    for place, row in source.rows():
        if isinstance(row, dict):
            try:
                stage, columns = stage_of(row)
            except BadRow as bad:
                raise UserError(f"{source.name}{place}: no stage reads it ({bad})") from None
            return stage, f"guessed from {columns}"
    return "sft", "there is no row to guess from"


@contextmanager
def opened(stage: str, config: Any, world: World) -> Iterator[Opened]:
    """Opens all that the flags name; a verifier of one's own lives as long as the body. Raises UserError."""
    config.check()
    config = _with_embedded(stage, config, world)
    base = open_model(
        replace(config, load_in_4bit=False, double_quant=False, adapter_name_or_path=None, attention="auto"), world
    )
    names = mixture(config)
    sources = [open_source(name, config.dataset_split, config.dataset_revision) for name, _ in names]
    limit, limit_flag = config.max_seq_length, f"--max_seq_length {config.max_seq_length}"
    evaluations = [evaluation_set(name, config.eval_split) for name in _evaluations(config)]
    if KINDS[stage] != "problems":
        read = [_reader(stage, config, base.chat, source) for source in sources]
        sources, readers = [source for source, _ in read], [reader for _, reader in read]
        yield Opened(stage, config, base.chat, names, sources, readers, limit, limit_flag, evaluations)
        return
    config = replace(config, verifier_module=pinned(config.verifier_module))
    limit = base.longest_prompt(config.max_seq_length, config.response_length)
    limit_flag = f"{limit} tokens (--max_seq_length less --response_length)"
    with checker(config.verifier_mode, config.verifier_module) as check:
        whole = PromptReader(base.chat, config, check, fold_system=config.system_role == "fold")
        prompts = ProblemReader(AsFarAsItGoes(whole, replace(whole, longest=limit)), limit)
        readers = [prompts for _ in sources]
        yield Opened(stage, config, base.chat, names, sources, readers, limit, limit_flag, evaluations)


def _reader(stage: str, config: Any, chat: ChatTokenizer, source: Source) -> tuple[Source, Reader]:
    if stage == "sft":
        _, prepare = conversations_prepared(config, chat, config, UNCUT)
    else:
        _, prepare = pairs_prepared(config, config.count_turns, chat, config, UNCUT)
    source, whole = prepare(source)
    encode = AsFarAsItGoes(whole, replace(whole, max_length=config.max_seq_length))  # type: ignore[type-var]
    if stage == "sft":
        return source, ConversationReader(encode, config.text_column, config.max_seq_length)
    judgement = Judgement(config.preference_column, config.preference_numbers, config.chosen_by_score)
    return source, PairReader(encode, judgement, config.max_seq_length)


def _with_embedded(stage: str, config: Any, world: World) -> Any:
    """With the embedded tokenizer where no model is named, and the embedded data where none is."""
    lengths: dict[str, Any] = {"response_length": 1024} if KINDS[stage] == "problems" else {}
    if config.model_name_or_path is None:
        made = world.once("embedded", lambda: embedded(Path(config.cache_dir).expanduser()))
        data = "" if config.names_data else ", on embedded rows"
        world.say(f"no --model_name_or_path: counted by the embedded tokenizer, whose tokens are few and short{data}")
        config = replace(config, model_name_or_path=str(made.model))
        if not config.names_data:
            config = replace(config, dataset_name=str(made._asdict()[f"train_{KINDS[stage]}"]))
        if lengths:
            config, lengths = replace(config, max_seq_length=min(config.max_seq_length, 256)), {"response_length": 24}
    return fill(config, **lengths)


def _evaluations(config: Any) -> list[str]:
    named = [*(config.against or ()), *([config.eval_dataset_name] if config.eval_dataset_name else [])]
    return list(dict.fromkeys(named))


def evaluation_set(name: str, split: str) -> tuple[EvaluationSet, int]:
    """(the prompts of an evaluation set in any form, how many of its rows say none). Raises UserError."""
    source = open_source(name, split, None)
    prompts, first_bad, unread = [], "it is empty", 0
    for place, row in source.rows():
        try:
            if isinstance(row, BadRow):
                raise row
            prompts.append((f"{Path(source.name).name}{place}", asked_text(row)))
        except BadRow as bad:
            first_bad, unread = first_bad if unread else f"the first row is {place}: {bad}", unread + 1
    if not prompts:
        raise UserError(f"--against {name}: no row says what is asked, {first_bad}")
    return EvaluationSet.of(Path(source.name).name, prompts), unread
