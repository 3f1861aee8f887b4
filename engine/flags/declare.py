"""How a flag is declared, the parts of --help, and the checks and defaults that groups and stages share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine.errors import UserError

T = TypeVar("T")
MODEL, DATA, ADAPTERS, OPTIMIZATION = "model", "data", "adapters", "optimization"
SAMPLING, MEMORY, RUN, STAGE = "sampling", "memory and speed", "the run", "this stage"
HEADINGS = (
    STAGE,
    "the plan",
    "what is shown",
    MODEL,
    DATA,
    ADAPTERS,
    OPTIMIZATION,
    SAMPLING,
    MEMORY,
    RUN,
)  # the parts of --help


def flag(
    default: Any,
    help: str,
    heading: str = STAGE,
    *,
    choices: Sequence[str] = (),
    aliases: Sequence[str] = (),
    excludes: Sequence[str] = (),
    many: bool = False,
    texts: bool = False,
    positional: bool = False,
) -> Any:
    """A dataclass field that is a command-line flag, under a `heading` of --help.

    `aliases` are other names that people know it by; `excludes` names flags that say the same in another way, of which
    only one may be given; `many` takes several words, `texts` several texts, which may hold spaces; `positional` is
    given without its name.
    """
    metadata = {"help": help, "heading": heading, "choices": tuple(choices), "aliases": tuple(aliases)}
    return field(
        default=default,
        metadata=metadata
        | {"excludes": tuple(excludes), "many": many or texts, "texts": texts, "positional": positional},
    )


def override(default: Any, help: str = "", choices: Sequence[str] = ()) -> Any:
    """A flag of a group with a stage's own default and meaning; the rest stays as the group declares it."""
    return field(default=default, metadata={"override": True, "help": help, "choices": tuple(choices)})


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """The seed of all draws, which several groups read."""

    seed: int = flag(1, "every draw (data order, sampled tokens) is a function of it and of its own name", OPTIMIZATION)


def require_positive(flags: object, *names: str) -> None:
    """Raises UserError unless each of these is greater than 0, or was not given."""
    for name in names:
        value = vars(flags)[name]
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be greater than 0, got {value}")


def require_not_negative(flags: object, *names: str) -> None:
    """Raises UserError for one that is less than 0."""
    for name in names:
        if vars(flags)[name] < 0:
            raise UserError(f"--{name} must not be negative, got {vars(flags)[name]}")


def require_between(flags: object, **bounds: tuple[float, float]) -> None:
    """Raises UserError for one that is outside of its bounds."""
    for name, (low, high) in bounds.items():
        if not low <= vars(flags)[name] <= high:
            raise UserError(f"--{name} must be between {low:g} and {high:g}, got {vars(flags)[name]}")


def fill(flags: T, **values: Any) -> T:
    """The flags with these values where none was given (None)."""
    missing = {name: value for name, value in values.items() if vars(flags)[name] is None}
    return dataclasses.replace(flags, **missing)  # type: ignore[type-var]
