"""Flags of other trainers in our words: what a name and a value mean here. The table of names is table.py.

A name of theirs is one of ours under another name, or another grammar of one of ours (`--bf16 true` is `--dtype
bfloat16`), or has no counterpart: then the words that ask for what is done anyway are taken, and all others are refused
with the reason. What is translated or not used is said on the first screen; nothing is dropped in silence.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import UserError

ANY = ("*",)  # words of a name that is not used, whatever it says
Choices = Mapping[str, tuple[str, ...]]  # our flags that a command has → what they may be, () for anything


class No(str):
    """Why a word of theirs is refused, in place of ours."""


@dataclass(frozen=True)
class Row:
    """One line of the table; it holds for commands that have the flags of ours that it names.

    `words`: their word → ours, as `word` of --ours, or as `flag=word flag=word`. `read` does the same for values with a
    grammar of their own. `takes`: it has no counterpart, and these words ask for what is done anyway. `near` is the
    flag of ours that a row without a counterpart speaks of.
    """

    names: tuple[str, ...]
    whose: str
    ours: str = ""
    words: Mapping[str, str] | None = None
    read: Callable[[Any], dict[str, Any]] | None = None
    takes: tuple[str, ...] | None = None
    why: str = ""
    near: str = ""
    also: tuple[str, ...] = ()  # flags of ours that `read` may answer with besides `ours`
    secret: bool = False  # its value is not repeated on a screen

    @property
    def needs(self) -> set[str]:
        """Our flags without which it says nothing."""
        targets = {name for word in (self.words or {}).values() for name in self.assigned(word)}
        return {name for name in (self.near, self.ours, *self.also, *targets) if name}

    def assigned(self, word: str) -> dict[str, str]:
        """Our flag → our word, of a word of the row's right side."""
        if isinstance(word, No) or not word:
            return {}
        return dict(pair.split("=") for pair in word.split()) if "=" in word else {self.ours: word}


@dataclass(frozen=True)
class Meaning:
    """Our flag → value, and the line for the first screen; without flags, what was said is not used. `otherwise`: what
    it says as well, where nothing else says it.
    """

    values: dict[str, Any]
    line: str
    otherwise: Mapping[str, Any] = field(default_factory=dict)


def alias(names: str, whose: str, ours: str, *, near: str = "") -> Row:
    """Another name of a flag of ours, in the commands that also have `near`."""
    return Row(tuple(names.split()), whose, ours, near=near)


def means(
    names: str, whose: str, ours: str, words: Mapping[str, str], why: str = "", *, near: str = "", secret: bool = False
) -> Row:
    """A flag of ours in other words; what is neither theirs nor ours is refused, and `why` says it."""
    return Row(tuple(names.split()), whose, ours, words, why=why, near=near, secret=secret)


def reads(names: str, whose: str, ours: str, read: Callable[[Any], dict[str, Any]], *, also: str = "") -> Row:
    """A value with a grammar of its own; `also` are the other flags that it may mean, `flag?` in what `read` gives
    where it is only meant if nothing else says it.
    """
    return Row(tuple(names.split()), whose, ours, read=read, also=tuple(also.split()))


def takes(names: str, whose: str, words: str, why: str, near: str = "") -> Row:
    """No counterpart: `words` ask for what is done anyway, others are refused."""
    return Row(tuple(names.split()), whose, takes=tuple(words.split()), why=why, near=near)


def unused(names: str, whose: str, why: str) -> Row:
    """No counterpart, and no effect on what is computed: named as not used, whatever it says."""
    return Row(tuple(names.split()), whose, takes=ANY, why=why)


def translate(row: Row, value: Any, name: str, where: str, choices: Choices) -> Meaning | None:
    """What `name: value` means; None for a flag of ours in our own words. `where` is how the message begins
    (`--bf16`, `recipe.yaml: bf16`). Raises UserError.
    """
    if name == row.ours and value in choices[name]:
        return None
    if row.takes == ANY:
        return Meaning({}, f"{where} is not used: {row.why}")
    mark = "--" if where.startswith("--") else ""
    try:
        if row.read:
            return _meaning(row.read(value), value, where, mark)
        word = word_of(value)
    except (ValueError, RecursionError) as error:
        why = error if isinstance(error, _Unread) else row.why or f"it is {mark}{row.ours} here"
        raise UserError(f"{where} {shown(value)} is refused: {why}") from None
    if row.takes is not None:
        if not any(_same(word, taken) for taken in row.takes):
            raise UserError(f"{where} {shown(word)} is refused: {row.why}")
        return Meaning({}, f"{where} {shown(word)}: {row.why}")
    if row.words is None:
        return _meaning({row.ours: value}, value, where, mark)
    known = next((ours for theirs, ours in row.words.items() if _same(word, theirs)), None)
    if isinstance(known, No):
        raise UserError(f"{where} {shown(word)} is refused: {known}")
    if known is not None:
        assigned = row.assigned(known)
        return _meaning(assigned, word, where, mark) if assigned else Meaning({}, f"{where} {shown(word)}: {row.why}")
    if name == row.ours:
        return None
    if row.ours and (not choices[row.ours] or word in choices[row.ours]):
        return _meaning({row.ours: word}, word, where, mark)
    expected = ", ".join(word for word, ours in row.words.items() if not isinstance(ours, No))
    said = "..." if row.secret else shown(word)
    raise UserError(f"{where} {said} is refused: {row.why or f'expected one of {expected}'}")


def _meaning(values: dict[str, Any], theirs: Any, where: str, mark: str) -> Meaning:
    said = {name: value for name, value in values.items() if not name.endswith("?")}
    otherwise = {name[:-1]: value for name, value in values.items() if name.endswith("?")}
    ours, more = (" ".join(f"{mark}{name} {shown(value)}" for name, value in of.items()) for of in (said, otherwise))
    line = f"{where} {shown(theirs)} is {ours}" + (f", and {more} unless it is said" if more else "")
    return Meaning(said, line if said else f"{where} {shown(theirs)} says nothing", otherwise)


def word_of(value: Any) -> str:
    """A value of a command line or of a YAML file as words with a space between; ValueError for an object."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(word, (str, int, float)) for word in value):
        return " ".join(map(word_of, value))
    raise ValueError(value)


def _same(word: str, theirs: str) -> bool:
    """As words, whatever the case, or as numbers."""
    if word.lower() == theirs.lower():
        return True
    try:
        return float(word) == float(theirs)
    except ValueError:
        return False


def shown(value: Any) -> str:
    """A value in a message: on one line, and short whatever the value is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and len(value) < 20 and all(isinstance(word, (str, int, float)) for word in value):
        value = " ".join(map(str, value))
    return value if isinstance(value, str) and value.isprintable() and len(value) < 80 else reprlib.repr(value)


class _Unread(ValueError):
    """Why a value of their own grammar is refused, for people."""


def number(value: Any) -> float:
    """Raises _Unread for what is none."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise _Unread(f"expected a finite number, got {shown(value)}")
    return found


def clip_both(value: Any) -> dict[str, Any]:
    """One clip range: that of the upper side too, where it is not given."""
    return {"clip_low": number(value), "clip_high?": number(value)}


def clip_pair(value: Any) -> dict[str, Any]:
    """OpenRLHF's pair: `--eps_clip_low_high 0.2 0.28`."""
    both = word_of(value).split()
    if len(both) != 2:
        raise _Unread("expected two numbers")
    return {"clip_low": number(both[0]), "clip_high": number(both[1])}


def clip_above(value: Any) -> dict[str, Any]:
    """TRL's epsilon_high: of a clipped ratio what is added to 1, of CISPO's weight the bound itself, above 1."""
    bound = number(value)
    if bound > 1:
        raise _Unread(f"above 1 it is CISPO's bound on the weight itself: give clip_high {bound - 1:g}")
    return {"clip_high": bound}


def kl_in_reward(value: Any) -> dict[str, Any]:
    """OpenRLHF's init_kl_coef: its penalty is in the reward, unless use_kl_loss."""
    weight = number(value)
    return {"kl_coef": weight} | ({"kl_in?": "reward"} if weight else {})


def adam_betas(value: Any) -> dict[str, Any]:
    """OpenRLHF's pair: `--adam_betas 0.9 0.95`."""
    both = word_of(value).split()
    if len(both) != 2:
        raise _Unread("expected two numbers")
    return {"adam_beta1": number(both[0]), "adam_beta2": number(both[1])}


def scheduler_arguments(value: Any) -> dict[str, Any]:
    """transformers' lr_scheduler_kwargs: a JSON object, or one of YAML."""
    if not isinstance(value, dict):
        try:
            value = json.loads(word_of(value))
        except ValueError:
            raise _Unread("expected a JSON object") from None
    if not isinstance(value, dict):
        raise _Unread("expected an object")
    found: dict[str, Any] = {}
    names = {"min_lr_rate": "min_lr_ratio", "min_lr_ratio": "min_lr_ratio", "num_decay_steps": "decay_steps"}
    usual = {"decay_type": "cosine", "warmup_type": "linear", "num_cycles": 0.5}
    for key, of_key in value.items():
        if key == "min_lr":
            raise _Unread("min_lr: the floor is a share of the peak here, min_lr_ratio")
        if key in usual and of_key == usual[key]:
            continue
        if key not in names:
            raise _Unread(f"{shown(key)}: read are {', '.join(names)}")
        found[names[key]] = number(of_key)
    if (steps := found.get("decay_steps")) is not None and steps == int(steps):
        found["decay_steps"] = int(steps)
    return found
