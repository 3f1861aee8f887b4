"""The table of instructions: id -> rule, for the three published sets, and the arguments that each takes.

IFEval's 25 (google_rules.py), the 29 that open-instruct's IFEvalG adds (openinstruct_rules_*.py), and IFBench's 58
(ifbench_rules_*.py). In mode 'reference' an instruction has the rule of the code that its rows are published with.
"""

import inspect
from collections.abc import Callable
from functools import cache

from verifiers.ifeval import (
    google_rules,
    ifbench_rules_custom,
    ifbench_rules_format,
    ifbench_rules_sentences,
    ifbench_rules_words,
    language,
    openinstruct_rules_copies,
    openinstruct_rules_words,
    parts_of_speech,
)
from verifiers.ifeval.arguments import typed_arguments
from verifiers.ifeval.google_rules import RELATIONS, Followed, Regex
from verifiers.strings import nearest, shown
from verifiers.verdict import GroundTruthError

GOOGLE = google_rules.INSTRUCTIONS
OPEN_INSTRUCT = openinstruct_rules_copies.RULES | openinstruct_rules_words.RULES
IFBENCH = (
    ifbench_rules_words.RULES | ifbench_rules_sentences.RULES | ifbench_rules_format.RULES | ifbench_rules_custom.RULES
)
INSTRUCTIONS: dict[str, Callable[..., Followed]] = GOOGLE | OPEN_INSTRUCT | IFBENCH
REFERENCE: dict[str, Callable[..., Followed]] = (
    google_rules.REFERENCE
    | openinstruct_rules_copies.REFERENCE
    | openinstruct_rules_words.REFERENCE
    | ifbench_rules_words.REFERENCE
    | ifbench_rules_sentences.REFERENCE
    | ifbench_rules_format.REFERENCE
    | ifbench_rules_custom.REFERENCE
)

# Arguments that the references read as regular expressions: by name in IFEval's own, by id in the others.
REGEX_OF_GOOGLE = frozenset(("keyword", "keywords", "forbidden_words", "section_spliter", "postscript_marker"))
REGEX_OF_OTHERS = {
    "keywords:word_once": ("keyword",),
    "keywords:word_count_different_numbers": ("keyword",),
    "count:count_increment_word": ("keyword1", "keyword2"),
}
STRIPPED = frozenset(str.split("keyword section_spliter phrase keyword1 keyword2 keyword3 keyword4 keyword5"))
# The least that a number may be: 0, or 1 for these, where no response could be right.
COUNTS_FROM_1 = frozenset(
    [("copy:copying_multiple", "N"), ("copy:repeat_phrase", "small_n"), ("count:words_japanese", "N")]
    + [("count:counting_composition", key) for key in ("n_sent", "n_words")]
    + [("keywords:keyword_specific_position", key) for key in ("n", "m")]
    + [("words:keywords_specific_position", key) for key in ("n", "m")]
    + [("sentence:keyword", "N")]
)
# 0 is drawn anew at random by the references here.
DRAWN = frozenset(
    [("count:lowercase_counting", "N"), ("letters:letter_counting", "N")]
    + [("new:copy_span_idx", key) for key in ("n_start", "n_end")]
)


def rule(name: str, mode: str) -> Callable[..., Followed]:
    """The rule of an instruction: what it says, or in mode 'reference' what its own code rewards."""
    return REFERENCE.get(name, INSTRUCTIONS[name]) if mode == "reference" else INSTRUCTIONS[name]


@cache
def parameters(name: str, mode: str) -> dict[str, inspect.Parameter]:
    """The parameters of the rule of an instruction."""
    return dict(inspect.signature(rule(name, mode)).parameters)


def arguments(name: str, given: dict, mode: str) -> dict:
    """The arguments of the instruction `name`, checked, without nulls; in mode 'reference' keywords as regular
    expressions. Raises GroundTruthError."""
    if not isinstance(name, str) or name not in INSTRUCTIONS:
        raise GroundTruthError(f"ground_truth: unknown instruction {shown(name)}{nearest(name, INSTRUCTIONS)}")
    if not isinstance(given, dict):
        raise GroundTruthError(f"{name}: expected an object of arguments, found {shown(given)}")
    given = {key: value for key, value in given.items() if value is not None}
    typed = typed_arguments(name, parameters(name, mode), given)
    for key in ("relation", "let_relation", "capital_relation"):
        if key in typed and typed[key] not in RELATIONS:
            raise GroundTruthError(f"{name}: {key} must be 'at least' or 'less than', found {shown(typed[key])}")
    for key in STRIPPED & set(typed):
        typed[key] = typed[key].strip() if isinstance(typed[key], str) else typed[key]
    needs(name)
    if name not in GOOGLE:
        check_values(name, typed, mode)
    if mode == "reference":
        for key in (REGEX_OF_GOOGLE if name in GOOGLE else frozenset(REGEX_OF_OTHERS.get(name, ()))) & set(typed):
            words = typed[key]
            typed[key] = Regex(words) if isinstance(words, str) else [Regex(word) for word in words]
    return typed


def needs(name: str) -> None:
    """Raises GroundTruthError, saying what to install, for an instruction that this machine cannot judge."""
    if name.startswith(("language:", "change_case:english")) and not language.is_available():
        raise GroundTruthError(f"{name} needs langdetect: pip install 'triptych[ifeval]'")
    if name == "words:start_verb" and not parts_of_speech.is_available():
        tagger = parts_of_speech.TAGGER.rpartition("/")[2]
        raise GroundTruthError(f"{name} needs nltk and its tagger: python -m nltk.downloader {tagger}")


def check_values(name: str, typed: dict, mode: str) -> None:
    """Raises GroundTruthError for arguments of the newer sets by which no response could be right, or which the
    references replace by others at random."""
    for key, value in typed.items():
        if key in ("relation", "instruction"):
            continue
        if isinstance(value, (str, list)):
            check_text(name, key, value)
        else:
            drawn = mode == "reference" and (name, key) in DRAWN
            least = int(drawn or (name, key) in COUNTS_FROM_1)
            if value < least:
                why = " (open-instruct draws another number at random)" if drawn else ""
                raise GroundTruthError(f"{name}: {key} must be at least {least}, found {value}{why}")
    if {"n_start", "n_end", "prompt_to_repeat"} <= set(typed):
        span = typed["prompt_to_repeat"][typed["n_start"] : typed["n_end"] + (mode == "default")]
        if not span.strip():
            raise GroundTruthError(f"{name}: no text from n_start {typed['n_start']} to n_end {typed['n_end']}")
    if name == "copy:repeat_phrase":
        words = typed["phrase"].split()
        if len(words) < 3:
            raise GroundTruthError(f"{name}: phrase must have a word between two, found {shown(typed['phrase'])}")
        if mode == "reference":
            Regex(words[0]), Regex(words[-1])


def check_text(name: str, key: str, value: str | list) -> None:
    """Raises GroundTruthError for a text that is blank. Of a list the first is used, the one that the prompt shows."""
    words = [value] if isinstance(value, str) else value
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise GroundTruthError(f"{name}: {key} is blank: {shown(value)}")
