"""Bad flags and recipes: each is refused in one line that names the flag or key, before anything is opened.

They are parsed and checked as a stage does it; a few go through the real entry point, for the exit status.
"""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faultdrill.apart import apart
from benchmarks.faultdrill.suite import Case, Cases, Suite
from engine.config import parse
from engine.errors import UserError
from launch import commands, dpo, grpo, ppo, sft
from tests import ranks

STAGES = {"sft": sft, "dpo": dpo, "ppo": ppo, "grpo": grpo}
LIMIT = 10.0  # seconds on a busy machine; milliseconds on an idle one


@dataclass(frozen=True)
class Bad:
    """Words of a command line, or the text of a recipe, and a pattern of the refusal."""

    stage: str
    words: str
    said: str
    recipe: str | None = None


# fmt: off
FLAGS = [
    ("sft", "--learning_rat 1", r"unknown flag --learning_rat \(did you mean learning_rate\?\)"),
    ("sft", "--learning_rate fast", "--learning_rate: expected a finite number"),
    ("sft", "--learning_rate nan", "--learning_rate: expected a finite number"),
    ("sft", "--learning_rate inf", "--learning_rate: expected a finite number"),
    ("sft", "--learning_rate -1", "--learning_rate"),
    ("sft", "--max_seq_length 0", "--max_seq_length must be greater than 0"),
    ("sft", "--max_seq_length 1.5", "--max_seq_length: expected a whole number"),
    ("sft", "--max_seq_length many", "--max_seq_length: expected a whole number"),
    ("sft", "--micro_batch_tokens -5", "--micro_batch_tokens must be greater than 0"),
    ("sft", "--batch_size 0", "--batch_size"),
    ("sft", "--num_train_epochs -1", "--num_train_epochs"),
    ("sft", "--warmup_ratio 2", "--warmup_ratio"),
    ("sft", "--weight_decay -0.1", "--weight_decay"),
    ("sft", "--max_grad_norm -1", "--max_grad_norm"),
    ("sft", "--optimizer adm", "--optimizer: adm is not one of .*did you mean adamw"),
    ("sft", "--dtype float8", "--dtype: float8 is not one of"),
    ("sft", "--dtype float16", "--dtype float16 is refused"),
    ("sft", "--lr_scheduler_type zigzag", "--lr_scheduler_type: zigzag is not one of"),
    ("sft", "--reduce_loss median", "--reduce_loss: median is not one of"),
    ("sft", "--on_bad_row ignore", "--on_bad_row: ignore is not one of error, skip"),
    ("sft", "--max_bad_rows 1.5", "--max_bad_rows: expected a share of a file's rows below 1, or a whole number"),
    ("sft", "--max_bad_rows -1", "--max_bad_rows must not be negative"),
    ("sft", "--max_bad_rows few", "--max_bad_rows: expected a finite number"),
    ("sft", "--save_steps -1", "--save_steps must not be negative"),
    ("sft", "--save_total_limit 0", "--save_total_limit must be at least 1"),
    ("sft", "--patience 0", "--patience must be greater than 0"),
    ("sft", "--max_hours -1", "--max_hours must be greater than 0"),
    ("sft", "--resume yesterday", "--resume yesterday: expected auto, never or the path"),
    ("sft", "--quiet --dry_run", "--quiet would hide what --dry_run is for"),
    ("sft", "--compile perhaps", "--compile: expected true or false"),
    ("sft", "--beta 0.1", "--beta belongs to launch.dpo"),
    ("sft", "--loss_type dpo", "--loss_type belongs to launch.dpo"),
    ("sft", "--kl_coef 0.1", "--kl_coef belongs to"),
    ("sft", "--dataset_name a.jsonl --mixer_list a 1.0", "two ways to say one thing"),
    ("sft", "--model_name_or_path somewhere", "--model_name_or_path needs --dataset_name"),
    ("sft", "rows.jsonl", "unexpected word 'rows.jsonl'"),
    ("sft", "learning_rate=1", "flags are given as --name value, this one is --learning_rate"),
    ("sft", "--use_lora --lora_rank 0", "--lora_rank"),
    ("sft", "--lora_rank 8", "--lora_rank"),
    ("dpo", "--beta -1", "--beta"),
    ("dpo", "--loss_type dpo_nrm", "--loss_type.*dpo_norm"),
    ("dpo", "--label_smoothing 0.7", "--label_smoothing"),
    ("dpo", "--count_turns some", "--count_turns: some is not one of"),
    ("dpo", "--preference_numbers sign", "--preference_numbers is not read without --preference_column"),
    ("dpo", "--preference_column a --chosen_by_score b", "two ways to say one thing"),
    ("dpo", "--chosen_by_score a b c", "--chosen_by_score: expected"),
    ("dpo", "--gamma_beta_ratio 1 --loss_type dpo", "--gamma_beta_ratio"),
    ("ppo", "--temperature -1", "--temperature must be between 0"),
    ("ppo", "--top_p 2", "--top_p must be between"),
    ("ppo", "--gamma 2", "--gamma"),
    ("ppo", "--response_length 0", "--response_length must be greater than 0"),
    ("ppo", "--num_mini_batches 0", "--num_mini_batches must be greater than 0"),
    ("ppo", "--prompt_template {x}", "--prompt_template: expected {prompt} once"),
    ("ppo", "--overlong_penalty 1", "--overlong_penalty is not read without --overlong_buffer"),
    ("grpo", "--advantage median", "--advantage: median is not one of"),
    ("grpo", "--num_samples_per_prompt 0", "--num_samples_per_prompt must be greater than 0"),
]
RECIPES = [
    ("a: [", "expected|not (readable|YAML)|YAML"),
    ("- 1\n- 2", "expected"),
    ("learning_rate: 1\nlearning_rate: 2", "learning_rate"),
    ("learning_rat: 1", "unknown key learning_rat .*did you mean learning_rate"),
    ("learning_rate: [1]", "learning_rate: expected a finite number"),
    ("compile: maybe", "compile: expected true or false"),
    ("max_seq_length: 2.5", "max_seq_length: expected a whole number"),
    ("dataset_name: no", "dataset_name: expected text"),
    ("optimizer: {name: adamw}", "optimizer .* is refused: AdamW"),
    ("kl_coef: 0.1", "kl_coef belongs to"),
    ("x: !!python/object/apply:os.system ['true']", "."),
    ("a: &a [x, x]\nb: &b [*a, *a]\nlearning_rate: *b", "."),
    ("max_bad_rows: 1.5", "--max_bad_rows: expected a share"),
    ("\x00", "."),
]
# fmt: on
BAD = [Bad(*one) for one in FLAGS] + [Bad("sft", "--config {}/recipe.yaml", said, text) for text, said in RECIPES]
BAD += [Bad("sft", "--config {}/nowhere.yaml", "nowhere.yaml")]
# by the entry point: two of the above, and what a stage finds out when it puts its objective together
OBJECTIVE = ("--beta -1", "--loss_type dpo_nrm", "--label_smoothing 0.7", "--gamma_beta_ratio 1 --loss_type dpo")
WHOLE = [0, 1, *(i for i, bad in enumerate(BAD) if bad.words in OBJECTIVE)]


def refused(number: int, directory: Path) -> str:
    """'' where it is refused in one line that says this."""
    bad = BAD[number]
    if bad.recipe is not None:
        (directory / "recipe.yaml").write_text(bad.recipe, encoding="utf-8")
    words, began = bad.words.replace("{}", str(directory)).split(), time.monotonic()
    stage = STAGES[bad.stage]
    try:
        parse(stage.Config, words, elsewhere=commands).check()
    except UserError as error:
        line = str(error)
        if "\n" in line or not re.search(bad.said, line):
            return f"said {line[:200]!r}, expected {bad.said}"
        return "" if time.monotonic() - began < LIMIT else f"took {time.monotonic() - began:.0f} s"
    except SystemExit as ended:
        return f"ended with {ended.code}"
    except Exception as error:  # the traceback that a user would see
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "taken"


def through_the_entry_point(number: int, directory: Path) -> str:
    bad = BAD[number]
    result = ranks.launch(bad.words.split(), module=f"launch.{bad.stage}", log=directory / "log")
    said = result.codes == [2] and "Traceback" not in result.output and re.search(f"error: .*{bad.said}", result.output)
    return "" if said else f"{result.codes} {result.output[-300:]}"


def _name(number: int) -> str:
    bad = BAD[number]
    return f"launch.{bad.stage} {bad.words if bad.recipe is None else repr(bad.recipe[:30])}"


def cases(count: int, seed: int) -> Iterator[Case]:
    order = random.Random(seed).sample(range(len(BAD)), len(BAD))
    for number in [n for n in order if n not in WHOLE][: count - len(WHOLE)]:
        yield Case(_name(number), functools.partial(refused, number))
    for number in WHOLE:
        yield Case(f"python -m {_name(number)}", functools.partial(through_the_entry_point, number))


def control(hook: str, *numbers: int) -> Cases:
    def of(count: int, seed: int) -> Iterator[Case]:
        for number in numbers:
            work = functools.partial(refused, number)
            yield Case(_name(number), functools.partial(apart, work, hook=f"tests.faults:{hook}"))

    return of


SUITE = Suite(
    name="configs",
    unit="bad flags and recipes",
    promise="refused in one line that names the flag or key, status 2, no traceback",
    sizes=(60, len(BAD)),
    cases=cases,
    controls={"unknown names are passed over": control("unknown_flags_are_passed_over", 0)},
)
