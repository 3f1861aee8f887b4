"""Where a long text may be cut: the parts' tokens are the whole's, whatever stands around the cut, for every pattern
that is said to be known; and what is not known is read whole, within a bound.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.data import cuts
from engine.data.cuts import BESIDE, BREAKS, PATTERNS, Cutter
from engine.data.rows import BadRow

# letters, digits, marks, all that the patterns treat apart, and what they stop at
LETTERS = "abSſ'sté\u0301ñ语言模型のアжß"
OTHERS = " \n\r\t\u00a0\u2028\u3000,.;:!?，。；：！？、/-'\"<>|_\x00\x1f12٣½😀\u200d\u0338"
SPECIALS = ("<|end|>", "<|sep|>")
tricky = st.text(st.sampled_from(LETTERS + OTHERS), max_size=60)
texts = st.lists(tricky | st.sampled_from([*SPECIALS, "don't, we'll. ", "the end ", "a  b\n\nc", "3.14, 2,718"])).map(
    "".join
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(**options) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False, "use_regex": False} | options))


def trained(*steps, normalizer=None, added=(), **model) -> PreTrainedTokenizerFast:
    """A vocabulary with many merges over words, spaces and punctuation, so that a wrong cut shows."""
    bpe = Tokenizer(models.BPE(**model))
    bpe.pre_tokenizer, bpe.normalizer = pre_tokenizers.Sequence(list(steps)), normalizer
    draw = random.Random(0)
    corpus = ["".join(draw.choice(LETTERS + OTHERS + "    abab,,\n\n") for _ in range(40)) for _ in range(400)]
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=sorted(byte_level().alphabet()),
        special_tokens=[*SPECIALS],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIALS[0])


DIGITS = pre_tokenizers.Digits(individual_digits=True)
KNOWN = {
    "gpt2": (byte_level(use_regex=True),),
    "smollm": (DIGITS, byte_level(use_regex=True)),
    **{f"pattern {i}": (split(pattern), byte_level()) for i, pattern in enumerate(sorted(PATTERNS))},
    "deepseek": (*map(split, sorted(BESIDE)), split(max(PATTERNS, key=lambda p: "A-Za-z" in p)), byte_level()),
}


@cache
def known(name: str) -> PreTrainedTokenizerFast:
    return trained(*KNOWN[name], normalizer=normalizers.NFC())


@pytest.fixture
def small(monkeypatch):
    """Texts of a dozen characters are long, and are cut wherever they may be."""
    monkeypatch.setattr(cuts, "LONG", 0)
    monkeypatch.setattr(cuts, "PART", 1)


@pytest.mark.parametrize("name", KNOWN)
def test_the_parts_tokens_are_the_whole_s(name, small):
    tokenizer = known(name)
    cutter = Cutter.of(tokenizer)
    assert cutter.exact

    @settings(deadline=None, max_examples=60)
    @given(st.lists(texts, min_size=1, max_size=3), st.integers(0, 60))
    def check(several, enough):
        whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in several]
        assert cutter.ids(several, cuts.UNCUT) == whole
        found, flat = list(chain(*cutter.ids(several, enough))), list(chain(*whole))
        assert flat[: len(found)] == found and len(found) >= min(enough, len(flat))

    check()


def test_a_cut_elsewhere_shows():
    """The texts above tell a wrong place from a right one: in the middle."""
    tokenizer, differs = known("gpt2"), []

    @settings(deadline=None, max_examples=100)
    @given(texts)
    def check(text):
        at = len(text) // 2
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, text[:at], text[at:])]
        differs.append(at > 0 and ids[0] != ids[1] + ids[2])

    check()
    assert any(differs)


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        ((byte_level(),), {}),
        ((byte_level(use_regex=True, add_prefix_space=True),), {}),
        ((split(r"\w+ \w+"), byte_level()), {}),
        ((split(min(PATTERNS)), pre_tokenizers.Metaspace(), byte_level()), {}),
        ((byte_level(use_regex=True),), {"normalizer": normalizers.Replace("a ", "b")}),
        ((byte_level(use_regex=True),), {"added": [AddedToken("so, then")]}),
        ((byte_level(use_regex=True),), {"added": [AddedToken("word", rstrip=True)]}),
        ((byte_level(use_regex=True),), {"dropout": 0.1}),
    ],
    ids=["no words", "a space before", "another pattern", "metaspace", "a normalizer", "inside", "rstrip", "dropout"],
)
def test_what_is_not_proved_is_read_whole(steps, options, small, monkeypatch):
    cutter = Cutter.of(trained(*steps, **options))
    assert not cutter.exact
    text = "so, then a word and another, " * 3
    assert len(cutter.ids([text], 1)[0]) > text.count(" ")
    monkeypatch.setattr(cuts, "MAX_WHOLE", len(text) - 1)
    with pytest.raises(BadRow, match=f"expected at most {len(text) - 1} characters, got {len(text)}: 'so, then a word"):
        cutter.ids([text], 1)


def test_other_added_tokens_are_no_obstacle():
    assert Cutter.of(
        trained(byte_level(use_regex=True), added=[AddedToken("<mask>", lstrip=True), "\n\n", "   "])
    ).exact


def test_one_word_is_bounded(small, monkeypatch):
    """Where there is no place to cut, also by a tokenizer that is cut elsewhere."""
    monkeypatch.setattr(cuts, "MAX_WHOLE", 99)
    cutter = Cutter.of(known("gpt2"))
    assert len(cutter.ids(["x" * 99], 9)[0]) >= 9
    for text in ("x" * 100, "one, " + "x" * 100 + ", two"):
        with pytest.raises(BadRow, match="expected at most 99 characters, got 10"):
            cutter.ids([text], 99)
    assert cutter.ids(["one, two, three " + "x" * 100], 2)[0]  # what comes behind enough is not looked at


def test_plain_text_keeps_the_tokens_around_it(small):
    from tokenizers.processors import TemplateProcessing

    bpe = Tokenizer.from_str(known("gpt2").backend_tokenizer.to_str())
    ids = [(token, bpe.token_to_id(token)) for token in SPECIALS]
    bpe.post_processor = TemplateProcessing(single=f"{SPECIALS[1]} $A {SPECIALS[0]}", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIALS[0])
    cutter, text = Cutter.of(tokenizer), "so, then a word and another, " * 3
    whole = tokenizer(text)["input_ids"]
    assert cutter.plain(text, cuts.UNCUT) == whole and whole[0] == ids[1][1] and whole[-1] == ids[0][1]
    assert np.array_equal(cutter.plain(text, 5)[:5], whole[:5])


def test_every_place_is_behind_a_letter():
    text = "a b, c.d  e\n语言，x 3, é."
    assert [text[m.start() - 1 : m.start() + 1] for m in BREAKS.finditer(text)] == [
        *("a ", "b,", "c.", "d ", "e\n", "言，", "x ")
    ]
