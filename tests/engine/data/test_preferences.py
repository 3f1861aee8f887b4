"""Preference rows in every published form, every reason to refuse one, and what becomes of a pair when it is cut."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.chat import load_tokenizer
from engine.data.preferences import PairEncoder
from engine.data.preferences import conversations as read_conversations
from engine.data.rows import BadRow
from tests.engine.data.test_rows import json_values


def conversations(row: dict) -> tuple[list[dict], list[dict]]:
    chosen, rejected = read_conversations(row)
    return chosen.messages, rejected.messages


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, ASK, MORE = turn("system", "Be kind."), turn("user", "Who is it?"), turn("user", "And now?")
GREET, YES, NO = turn("assistant", "Hello!"), turn("assistant", "A friend."), turn("assistant", "Nobody.")
TALK = [SYSTEM, ASK, GREET, MORE]
HH = "\n\nHuman: Who is it?\n\nAssistant: Hello!\n\nHuman: And now?\n\nAssistant:"

# row, and the conversation before the answers that it must mean (the answers are YES and NO)
FORMS = {
    "Tülu: prompt text beside whole conversations": (
        {"id": "1", "source": "x", "prompt": "Who is it?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        [ASK],
    ),
    "prompt text is another turn than the first": (
        {"prompt": "And now?", "chosen": [*TALK, YES], "rejected": [*TALK, NO]},
        TALK,
    ),
    "whole conversations": ({"chosen": [*TALK, YES], "rejected": [*TALK, NO]}, TALK),
    "whole conversations beside a prompt list": (
        {"prompt": TALK, "chosen": [*TALK, YES], "rejected": [*TALK, NO]},
        TALK,
    ),
    "whole conversations beside a null prompt": ({"prompt": None, "chosen": [ASK, YES], "rejected": [ASK, NO]}, [ASK]),
    "prompt and completion texts": ({"prompt": "Who is it?", "chosen": "A friend.", "rejected": "Nobody."}, [ASK]),
    "prompt list and completion lists": ({"prompt": TALK, "chosen": [YES], "rejected": [NO]}, TALK),
    "prompt list and completion texts": ({"prompt": TALK, "chosen": "A friend.", "rejected": "Nobody."}, TALK),
    "prompt text and completion lists": ({"prompt": "Who is it?", "chosen": [YES], "rejected": [NO]}, [ASK]),
    "the assistant begins": ({"chosen": [GREET, ASK, YES], "rejected": [GREET, ASK, NO]}, [GREET, ASK]),
    "the assistant begins, prompt list": (
        {"prompt": [GREET, ASK], "chosen": [GREET, ASK, YES], "rejected": [GREET, ASK, NO]},
        [GREET, ASK],
    ),
    "hh-rlhf": ({"chosen": f"{HH} A friend.", "rejected": f"{HH} Nobody."}, [ASK, GREET, MORE]),
    "hh-rlhf, one turn": (
        {
            "chosen": "\n\nHuman: Who is it?\n\nAssistant: A friend.",
            "rejected": "\n\nHuman: Who is it?\n\nAssistant: Nobody.\n",
        },
        [ASK],
    ),
    "other keys in messages": ({"chosen": [ASK | {"name": "x"}, YES | {"score": 1}], "rejected": [ASK, NO]}, [ASK]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_accepted(form):
    row, before = FORMS[form]
    labelled = lambda side: [{key: message[key] for key in ("role", "content")} for message in side]
    assert tuple(map(labelled, conversations(json.loads(json.dumps(row))))) == ([*before, YES], [*before, NO])


def test_answers_that_are_conversations():
    """The two may part at any turn of the assistant's, and go on differently."""
    chosen, rejected = [ASK, YES, MORE, YES], [ASK, NO, turn("user", "Sure?"), turn("tool", "ring"), NO]
    assert conversations({"chosen": chosen, "rejected": rejected}) == (chosen, rejected)
    assert conversations({"prompt": [ASK], "chosen": chosen[1:], "rejected": rejected[1:]}) == (chosen, rejected)


def test_transcripts_keep_what_was_said():
    said = "Line one.\n\nLine two: Human: nature.\nAssistant: not a turn"
    row = {"chosen": f"\n\nHuman: {said}\n\nAssistant: ok", "rejected": f"\n\nHuman: {said}\n\nAssistant:"}
    assert conversations(row) == (
        [turn("user", said), turn("assistant", "ok")],
        [turn("user", said), turn("assistant", "")],
    )


REFUSED = {
    "nothing": ({}, "chosen: expected text or a list of messages, got nothing"),
    "no rejected": ({"chosen": [ASK, YES]}, "rejected: expected text or a list of messages, got nothing"),
    "misspelt": (
        {"chosen": [ASK, YES], "reject": [ASK, NO]},
        "rejected: expected text or a list of messages, got nothing (did you mean reject?)",
    ),
    "null": ({"chosen": None, "rejected": [ASK, NO]}, "chosen: expected text or a list of messages, got null"),
    "number": ({"chosen": [ASK, YES], "rejected": 1.5}, "rejected: expected text or a list of messages, got a number"),
    "prompt is a number": (
        {"prompt": 3, "chosen": [YES], "rejected": [NO]},
        "prompt: expected text or a list of messages, got a number",
    ),
    "prompt is an object": (
        {"prompt": {}, "chosen": [YES], "rejected": [NO]},
        "prompt: expected text or a list of messages, got an object",
    ),
    "prompt is empty": (
        {"prompt": [], "chosen": [YES], "rejected": [NO]},
        "prompt: expected a list of messages, got an empty one",
    ),
    "prompt with a bad role": (
        {"prompt": [turn("human", "x")], "chosen": [YES], "rejected": [NO]},
        "prompt[0].role: expected one of system",
    ),
    "text and list": (
        {"prompt": "x", "chosen": [YES], "rejected": "Nobody."},
        "rejected: expected a list like chosen, got text",
    ),
    "list and text": (
        {"prompt": "x", "chosen": "A friend.", "rejected": [NO]},
        "rejected: expected text like chosen, got a list",
    ),
    "bad message": (
        {"chosen": [ASK, YES], "rejected": [ASK, turn("assistant", None)]},
        "rejected[1].content: expected text, got null",
    ),
    "the user at the end": (
        {"chosen": [ASK, YES], "rejected": [ASK, NO, MORE]},
        "rejected: expected the assistant's turn at the end, got the user's",
    ),
    "only the prompt": (
        {"prompt": [ASK], "chosen": [ASK], "rejected": [ASK, NO]},
        "chosen: expected the assistant's turn at the end, got the user's",
    ),
    "hh, the human at the end": (
        {"chosen": HH + " A friend.\n\nHuman: Thanks", "rejected": HH},
        "chosen: expected the assistant's turn at the end",
    ),
    "the same": (
        {"chosen": [ASK, YES], "rejected": [ASK, YES]},
        "rejected: expected another answer than chosen, got the same",
    ),
    "hh, the same": (
        {"chosen": HH + " x", "rejected": HH + " x "},
        "rejected: expected another answer than chosen, got the same",
    ),
    "other prompts": (
        {"chosen": [ASK, YES], "rejected": [MORE, NO]},
        "rejected: expected the prompt of chosen, got another (they part at message 0",
    ),
    "other prompts behind one system": (
        {"chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, MORE, NO]},
        "got another (they part at message 1",
    ),
    "one is the other's beginning": (
        {"chosen": [ASK, YES], "rejected": [ASK, YES, MORE, NO]},
        "got another (they part at message 2",
    ),
    "an answer against a question": (
        {"chosen": [ASK, YES], "rejected": [ASK, MORE, NO]},
        "got another (they part at message 1",
    ),
    "no prompt": ({"chosen": [YES], "rejected": [NO]}, "prompt: expected text or a list of messages, got nothing"),
    "no prompt, texts": (
        {"chosen": "A friend.", "rejected": "Nobody."},
        r"chosen: expected a transcript '\n\nHuman: ...\n\nAssistant: ...'",
    ),
    "hh, the assistant begins": (
        {"chosen": "\n\nAssistant: Hello!\n\nHuman: x\n\nAssistant: y", "rejected": HH},
        "chosen: expected a transcript",
    ),
    "hh, words in front": ({"chosen": HH + " x", "rejected": "Well." + HH}, "rejected: expected a transcript"),
    "hh, no answer": ({"chosen": HH, "rejected": "\n\nHuman: Who is it?"}, "rejected: expected a transcript"),
    "not how the prompt goes": (
        {"prompt": [MORE], "chosen": [ASK, YES], "rejected": [MORE, NO]},
        "chosen: expected it to begin like prompt",
    ),
    "rejected is not how the prompt goes": (
        {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [MORE, NO]},
        "rejected: expected it to begin like prompt",
    ),
    "surrogate": ({"prompt": "\ud800", "chosen": "a", "rejected": "b"}, "prompt: expected text, got a lone surrogate"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_rows_that_are_refused(reason):
    row, expected = REFUSED[reason]
    with pytest.raises(BadRow) as error:
        conversations(row)
    assert expected in str(error.value)


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "chosen", "rejected"]),
        json_values
        | st.lists(st.sampled_from([SYSTEM, ASK, GREET, YES, NO]), max_size=3)
        | st.sampled_from([HH, HH + "x"]),
    )
)
def test_any_row_is_a_pair_or_a_bad_row(row):
    try:
        chosen, rejected = conversations(row)
    except BadRow as bad:
        assert str(bad).split(":")[0].split("[")[0] in ("prompt", "chosen", "rejected"), str(bad)
        return
    assert chosen != rejected
    assert chosen[-1]["role"] == rejected[-1]["role"] == "assistant"
    assert all(message.keys() == {"role", "content"} for message in chosen + rejected)
    assert chosen[0] == rejected[0] or row["prompt"] is not None


# --- pairs of tokens --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(embedded_dir):
    return load_tokenizer(embedded_dir.model, 512)


def spell(chat, ids):
    return chat.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("last_turn_only", "trained"),
    [
        (True, ["A friend.<|end|>", "Nobody.<|end|>"]),
        (False, ["Hello!<|end|>A friend.<|end|>", "Hello!<|end|>Nobody.<|end|>"]),
    ],
)
@pytest.mark.parametrize("form", ["whole conversations", "prompt list and completion texts"])
def test_which_turns_count(form, last_turn_only, trained, chat):
    sequences = PairEncoder(chat, 1000, last_turn_only)(FORMS[form][0])
    assert [spell(chat, ids[mask]) for ids, mask in sequences] == trained
    assert spell(chat, sequences[0][0]).startswith(
        "<|system|>\nBe kind.\n<|user|>\nWho is it?\n<|assistant|>\nHello!<|end|>\n<|user|>"
    )


@pytest.mark.parametrize("last_turn_only", [True, False])
def test_every_cut_of_a_pair(last_turn_only, chat):
    """At every length: the whole pair's beginning, or dropped where either side has nothing left that counts. A cut
    promotes no turn.
    """
    row = {
        "chosen": [ASK, GREET, MORE, YES],
        "rejected": [ASK, GREET, MORE, turn("assistant", "Nobody at all, as far as I can see.")],
    }
    whole = PairEncoder(chat, 10_000, last_turn_only)(row)
    dropped = 0
    for length in range(1, max(len(ids) for ids, _ in whole) + 2):
        cut = PairEncoder(chat, length, last_turn_only)(row)
        kept = [mask[1:length].any() for _, mask in whole]
        if not all(kept):
            assert cut == f"no counted token within {length} tokens"
            dropped += 1
            continue
        for (ids, mask), (whole_ids, whole_mask) in zip(cut, whole, strict=True):
            assert ids.tolist() == whole_ids[:length].tolist()
            assert mask.tolist() == whole_mask[:length].tolist()
    assert dropped > 3


@pytest.mark.parametrize(
    ("chosen", "rejected", "kept"),
    [("011", "010", True), ("100", "011", False), ("011", "100", False), ("000", "111", False), ("1", "11", False)],
)
def test_a_pair_of_which_a_side_has_nothing_to_count(chosen, rejected, kept):
    """The first token of a sequence is never predicted, so it does not count even where it is trained."""

    class Chat:
        sides = iter([chosen, rejected])

        def spans(self, messages, tools):
            return "", [(0, 0)] * sum(message["role"] == "assistant" for message in messages)

        def note_unshown(self, *_):
            pass

        def lost_thoughts(self, *_):
            return 0

        def tokens(self, *_):
            mask = np.array([c == "1" for c in next(self.sides)])
            return np.arange(len(mask)), mask

    assert isinstance(PairEncoder(Chat(), 9, True)(FORMS["whole conversations"][0]), list) == kept


def test_real_rows_are_all_accepted(shared_data, chat):
    """gsm8k_model_solutions.jsonl: every row a pair, its counted tokens the last message and the end token of each
    side.
    """
    encode = PairEncoder(chat, 100_000, True)
    with open(shared_data / "preferences" / "gsm8k_model_solutions.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
        assert len(rows) > 900
        for row in rows:
            for (ids, mask), side in zip(encode(row), (row["chosen"], row["rejected"]), strict=True):
                assert spell(chat, ids[mask]) == side[-1]["content"] + "<|end|>"
                assert (
                    spell(chat, ids[~mask])
                    == "".join(f"<|{m['role']}|>\n{m['content']}\n" for m in side[:-1]) + "<|assistant|>\n"
                )


def test_the_embedded_rows_are_all_accepted(embedded_dir, chat):
    encode = PairEncoder(chat, 512, True)
    for path in (embedded_dir.train_pairs, embedded_dir.held_out_pairs):
        pairs = [encode(json.loads(line)) for line in path.read_text().splitlines()]
        assert len(pairs) > 100
        assert all(isinstance(pair, list) for pair in pairs)


def test_other_turns_are_another_store(tmp_path, embedded_dir, chat):
    """Both ways to count the same rows, one after the other: neither finds the other's masks."""
    from engine import world
    from engine.data.sources import read_pairs
    from engine.flags import MixtureFlags, PairFlags

    user, answer = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}
    row = {"chosen": [user, answer, user, answer], "rejected": [user, answer, user, answer | {"content": "c."}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    flags = MixtureFlags(dataset_name=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"))
    counts = {}
    for turns in ("last", "all"):
        pairs, _ = read_pairs(flags, turns, chat, world.start(), rows=PairFlags())
        counts[turns] = pairs.counts(np.arange(1)).tolist()
    assert all(2 * last == both for last, both in zip(counts["last"][0], counts["all"][0], strict=True))
