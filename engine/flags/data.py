"""The flags of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.errors import UserError
from engine.flags.declare import DATA, RUN, Seeded, flag, require_not_negative


@dataclass(frozen=True, kw_only=True)
class TextFlags(Seeded):
    """How much of a text, and where what is made of texts is kept."""

    max_seq_length: int = flag(2048, "prompt + response, in tokens", DATA, aliases=("max_length",))
    cache_dir: str = flag(
        "~/.cache/triptych", "tokenised data and reference log-probs, shared by all runs of a user", RUN
    )


@dataclass(frozen=True, kw_only=True)
class DataFlags(TextFlags):
    """Which rows, and how much of each."""

    dataset_name: str = flag(
        None,
        "file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; text also .gz, .zst), 'data/*.jsonl', directory, hub id or"
        " id:config; without it, embedded data",
        DATA,
        excludes=("mixer_list",),
    )
    dataset_revision: str | None = flag(None, "branch, tag or commit of the dataset on the hub", DATA)
    dataset_split: str = flag(
        "train", "split of a hub dataset, or of a directory whose files are named after splits", DATA
    )
    on_bad_row: str = flag(
        "skip", "a malformed row stops the run or is skipped, counted and listed", DATA, choices=("error", "skip")
    )
    max_bad_rows: float = flag(
        0.01,
        "more bad rows in a file than this share of its rows (rounded up; from 1 on: than this number) end the run"
        " before it begins",
        DATA,
    )
    system_role: str = flag(
        "template",
        "a system turn is left to the chat template, or folded into the first turn of the user",
        DATA,
        choices=("template", "fold"),
    )

    @property
    def bad_row_policy(self) -> dict[str, Any]:
        """What is done about bad rows."""
        return {"on_bad_row": self.on_bad_row, "max_bad_rows": self.max_bad_rows}

    def check_rows(self) -> None:
        """Raises UserError for a bound that is neither a share nor a number."""
        if not 0 <= self.max_bad_rows < 1 and self.max_bad_rows % 1:
            raise UserError(
                f"--max_bad_rows: expected a share of a file's rows below 1, or a whole number of them, got"
                f" {self.max_bad_rows:g}"
            )
        require_not_negative(self, "max_bad_rows")


@dataclass(frozen=True, kw_only=True)
class MixtureFlags(DataFlags):
    """Which rows to train on, and which to hold out."""

    mixer_list: tuple[str, ...] | None = flag(
        None,
        "a mixture instead of --dataset_name: NAME AMOUNT NAME AMOUNT ..., AMOUNT a fraction (1.0) or a number of rows"
        " (2000)",
        DATA,
        many=True,
    )
    eval_dataset_name: str | None = flag(None, "held-out data, like --dataset_name", DATA, aliases=("eval_dataset",))
    eval_split: str = flag("test", "--dataset_split of --eval_dataset_name", DATA)
    dataset_num_proc: int | None = flag(None, "processes that tokenise a large dataset; without it, one per core", DATA)

    @property
    def names_data(self) -> bool:
        return self.dataset_name is not None or self.mixer_list is not None


@dataclass(frozen=True, kw_only=True)
class SystemFlags:
    """What stands before the first turn."""

    system_prompt: str | None = flag(None, "system turn of the rows that have none", DATA, aliases=("system",))


@dataclass(frozen=True, kw_only=True)
class QuestionFlags(SystemFlags):
    """What is said around a question."""

    prompt_template: str | None = flag(
        None, "text around the question, with {prompt} in its place: '{prompt} Put the answer in \\boxed{}.'", DATA
    )

    def check_prompts(self) -> None:
        """Raises UserError for a template without a place for the prompt."""
        if self.prompt_template is not None and self.prompt_template.count("{prompt}") != 1:
            raise UserError(f"--prompt_template: expected {{prompt}} once, got {self.prompt_template[:80]!r}")


@dataclass(frozen=True, kw_only=True)
class PromptFlags(QuestionFlags):
    """What a problem's row leaves to the command line."""

    verifier: str | None = flag(None, "what judges the rows that name no verifier themselves", DATA)


@dataclass(frozen=True, kw_only=True)
class ConversationFlags:
    """What of a conversation's row is trained."""

    text_column: str | None = flag(None, "train this column as plain text, whole, in place of conversations", DATA)
    only_label: bool = flag(
        False, "of rows of an answer and whether it was liked (KTO's label), train those that were", DATA
    )
    history_thoughts: str = flag(
        "rendered",
        "earlier turns whose thought the template leaves out: trained as they are rendered, or each turn as an example"
        " of its own that has its thought",
        DATA,
        choices=("rendered", "each"),
    )


@dataclass(frozen=True, kw_only=True)
class PairFlags:
    """Which of two answers is better, where the columns are not named chosen and rejected."""

    preference_column: str | None = flag(
        None, "column that says which of response_a and response_b (or 1 and 2) is better", DATA
    )
    preference_numbers: str | None = flag(
        None,
        "its numbers: a sign (below 0 the first, 0 a tie), or the index in the better answer's name",
        DATA,
        choices=("sign", "index"),
    )
    chosen_by_score: tuple[str, ...] | None = flag(
        None,
        "best against worst of `completions`, or of rows of one response each, by this score; or the score columns of"
        " both answers",
        DATA,
        many=True,
    )

    def check_pairs(self) -> None:
        """Raises UserError for flags that contradict each other."""
        if self.preference_column and self.chosen_by_score:
            raise UserError("--preference_column and --chosen_by_score are two ways to say one thing: give one of them")
        if self.preference_numbers and not self.preference_column:
            raise UserError("--preference_numbers is not read without --preference_column")
        if self.chosen_by_score and len(self.chosen_by_score) > 2:
            raise UserError(
                "--chosen_by_score: expected the name of a score, or the columns of both answers' scores, got"
                f" {len(self.chosen_by_score)} words"
            )
