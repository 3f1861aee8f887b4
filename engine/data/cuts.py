"""Where a text may be cut without changing a token, so that no more of a huge one is tokenised than is used.

A tokenizer's pre-tokenizer cuts the text into words, and its model reads each word alone. If a word ends at a place
whatever follows it, and the next one is found whatever precedes it, the tokens before that place and behind it are
those of the two parts. For the patterns below that place is behind a letter and before one of `BREAKS`:

- no alternative of them goes on from a letter to such a character: a word that holds the letter ends there, in the
  whole text and in the part alone (what follows a text's end is no letter either);
- none looks behind itself, and they look ahead only behind white space, by a character: what is found from there on
  depends on what stands from there on, and what was found before on what stands before;
- NFC joins no such letter with such a character, and no added token has one inside.

A tokenizer with another pattern, another normalizer, or a space of its own at the beginning of a text is read whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.data.rows import BadRow
from engine.data.tokenizer import tokenised

UNCUT = 2**31 - 1  # as a number of tokens: more than any text has
LONG = 2**15  # characters; what is shorter is read whole
PART = 2**14
MAX_WHOLE = 2**20  # characters that are tokenised in one piece: some seconds, some hundreds of MB
BREAKS = re.compile(r"(?<=[A-Za-z\u4e00-\u9fa5])(?=[ \n\t,.;:!?，。；：！？、])")

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = rf"[{_UPPER}]*[{_LOWER}]+", rf"[{_UPPER}]+[{_LOWER}]*"
PATTERNS = {
    # Llama 3 and cl100k, Qwen 2 and 3: a number is cut into threes, or into digits
    *(
        rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
        for numbers in (r"\p{N}{1,3}", r"\p{N}")
    ),
    # GPT-2's, where it is written out
    rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",
    rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",
    # o200k (gpt-oss), Mistral's tekken
    "|".join([rf"[^\r\n\p{{L}}\p{{N}}]?{cased}{_ENGLISH}?" for cased in _CASED])
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}",
    "|".join([rf"[^\r\n\p{{L}}\p{{N}}]?{cased}" for cased in _CASED])
    + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}",
    # DeepSeek V3
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|\s*[\r\n]+|{_SPACES}",
}
BESIDE = {r"\p{N}{1,3}", r"\p{N}", "[一-龥\u3040-ゟ゠-ヿ]+"}  # cut a text further, and no letter from its end


@dataclass(frozen=True, eq=False)
class Cutter:
    """A tokenizer that reads long texts in parts; `exact`: where it can be proved that their tokens are the whole's."""

    tokenizer: Any
    exact: bool

    @classmethod
    def of(cls, tokenizer: Any) -> Cutter:
        return cls(tokenizer, _is_exact(json.loads(tokenizer.backend_tokenizer.to_str())))

    def ids(self, texts: Sequence[str], enough: int) -> list[list[int]]:
        """The ids of texts that follow each other, without special tokens around them. Of long ones, what follows the
        first `enough` tokens of all of them together may be left out. Raises BadRow for one that is too long to be
        read whole, and has to be.
        """
        if sum(map(len, texts)) <= LONG:
            return tokenised(self.tokenizer, list(texts), add_special_tokens=False)["input_ids"]
        found: list[list[int]] = []
        missing = enough
        for text in texts:
            found.append([])
            for part in self._parts(text) if missing > 0 else ():
                ids = tokenised(self.tokenizer, part, add_special_tokens=False)["input_ids"]
                found[-1] += ids
                missing -= len(ids)
                if missing <= 0:
                    break
        return found

    def plain(self, text: str, enough: int) -> list[int]:
        """The ids of one text with the special tokens that the tokenizer puts around it, cut as by `ids`."""
        if len(text) <= LONG:
            return tokenised(self.tokenizer, text)["input_ids"]
        around, bare = (
            self.tokenizer("a", add_special_tokens=more, verbose=False)["input_ids"] for more in (True, False)
        )
        first = next(i for i in range(len(around)) if around[i : i + len(bare)] == bare)
        [ids] = self.ids([text], enough)
        return around[:first] + ids + around[first + len(bare) :]

    def _parts(self, text: str) -> Iterator[str]:
        start = 0
        while start < len(text):
            cut = BREAKS.search(text, start + PART) if self.exact else None
            end = cut.start() if cut else len(text)
            check_length(text[start:end])
            yield text[start:end]
            start = end


def check_length(text: str) -> None:
    """Raises BadRow for a text that is too long to be tokenised in one piece."""
    if len(text) > MAX_WHOLE:
        raise BadRow(
            f"a text that can be cut nowhere (of words and sentences): expected at most {MAX_WHOLE:,} characters, got"
            f" {len(text):,}: {text[:20]!r}..."
        )


def _is_exact(state: dict[str, Any]) -> bool:
    """Whether a tokenizer, as its tokenizer.json, is one that the proof above is about."""
    normalizer, before, model = state.get("normalizer"), state.get("pre_tokenizer"), state.get("model") or {}
    if model.get("type", "BPE") != "BPE" or model.get("dropout"):
        return False
    steps = [step["type"] for step in _steps(normalizer, "normalizers")]
    if set(steps) - {"NFC"} or not all(map(_is_plain, state.get("added_tokens") or [])):
        return False
    cutting = [_cuts(step) for step in _steps(before, "pretokenizers")]
    return None not in cutting and True in cutting


def _steps(state: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if state is None:
        return []
    return [inner for step in state[name] for inner in _steps(step, name)] if state["type"] == "Sequence" else [state]


def _cuts(step: dict[str, Any]) -> bool | None:
    """Whether a step of a pre-tokenizer cuts at BREAKS; None for one that is not known."""
    if step["type"] == "ByteLevel":
        return None if step.get("add_prefix_space", True) else bool(step.get("use_regex", True))
    if step["type"] == "Digits":
        return False
    if step["type"] != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    pattern = step["pattern"].get("Regex", "")
    return True if pattern in PATTERNS else False if pattern in BESIDE else None


def _is_plain(token: dict[str, Any]) -> bool:
    """Whether no cut goes through an added token, or between it and a neighbour that decides whether it is one."""
    content = token["content"]
    reaches = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    closed = re.fullmatch(r"[<\[].*[>\]]", content, re.DOTALL)
    return not BREAKS.search(content) and bool(closed or not reaches)
