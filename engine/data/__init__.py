"""Rows to micro-batches: forms, chat templates, tokenising, stores, steps, packing. Start reading at sources.py."""

from engine.data.batch import MicroBatch, sum_by_sequence
from engine.data.chat import ChatTokenizer
from engine.data.embedded import embedded
from engine.data.mixture import Steps, permutation
from engine.data.prompts import Prompt, PromptReader, fingerprint_of
from engine.data.questions import Question, QuestionReader
from engine.data.sources import prompts_of, read_conversations, read_pairs, read_prompts
from engine.data.store import Examples

__all__ = [
    "ChatTokenizer",
    "Examples",
    "MicroBatch",
    "Prompt",
    "PromptReader",
    "Question",
    "QuestionReader",
    "Steps",
    "embedded",
    "fingerprint_of",
    "permutation",
    "prompts_of",
    "read_conversations",
    "read_pairs",
    "read_prompts",
    "sum_by_sequence",
]
