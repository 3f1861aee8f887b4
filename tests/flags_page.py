"""python -m tests.flags_page: writes the tables of docs/flags.md, from the table that the command line reads."""

from __future__ import annotations

from pathlib import Path

from engine.flags.foreign import ANY, No, Row
from engine.flags.table import PARTS
from engine.flags.words import DOTTED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
BEGINS = "<!-- from here on by `python -m tests.flags_page` -->\n"
WHOSE = {
    "HF": "transformers",
    "TRL": "TRL",
    "GRPO": "TRL's GRPO",
    "PEFT": "PEFT",
    "OI": "open-instruct",
    "AX": "axolotl",
    "TT": "torchtune",
    "RLHF": "OpenRLHF",
    "verl": "verl",
    "EVAL": "lm-evaluation-harness",
    "vLLM": "vLLM",
}


def code(word: str) -> str:
    return f"`{word}`"


def here(row: Row) -> str:
    """What becomes of it, in one cell."""
    if row.takes == ANY:
        return f"not used: {row.why}"
    if row.takes is not None:
        where = f" (commands with `--{row.near}`)" if row.near else ""
        words = row.takes[:1] if row.takes[0] in ("false", "none") else row.takes  # the others mean the same
        return f"{', '.join(map(code, words))} alone: {row.why}{where}"
    if row.read is not None:
        name = row.read.__name__.replace("_", " ")
        return {
            "adam betas": "`--adam_beta1`, `--adam_beta2`",
            "clip both": "`--clip_low`, and `--clip_high` unless it is said",
            "clip pair": "`--clip_low`, `--clip_high`",
            "clip above": "`--clip_high`; above 1 refused: of CISPO it is the weight's bound, 1 more",
            "kl in reward": "`--kl_coef`, and `--kl_in reward` unless it is said",
            "scheduler arguments": "`--min_lr_ratio` (`min_lr_rate`), `--decay_steps` (`num_decay_steps`)",
        }[name]
    where = f" (commands with `--{row.near}`)" if row.near else ""
    if row.words is None:
        return code(f"--{row.ours}") + where
    by_ours: dict[str, list[str]] = {}
    for theirs, ours in row.words.items():
        if isinstance(ours, No):
            meaning = f"refused: {ours}"
        elif not ours:
            meaning = row.why
        else:
            assigned = row.assigned(ours).items()
            meaning = code(" ".join(f"--{name} {word}" for name, word in assigned))
        by_ours.setdefault(meaning, []).append(code(theirs))
    return "; ".join(f"{', '.join(theirs)} → {ours}" for ours, theirs in by_ours.items()) + where


def names_of(ours: str) -> str:
    """Of a name with dots; of several, the first that a command has."""
    return " or ".join(code(f"--{name}") for name in ours.split())


def tables() -> list[str]:
    """The lines of all tables."""
    lines = []
    for title, rows in PARTS.items():
        lines += [f"## {title}", "", "| name | of | here |", "| --- | --- | --- |"]
        for row in rows:
            names = ", ".join(map(code, row.names))
            whose = ", ".join(WHOSE[w] for w in row.whose.split())
            lines.append(f"| {names} | {whose} | {here(row).replace('|', ', ')} |")
        lines.append("")
    lines += ["## Names with dots", "", "| name | here |", "| --- | --- |"]
    lines += [f"| {code(name)} | {names_of(ours)} |" for name, ours in DOTTED.items()]
    return lines


def page() -> str:
    """docs/flags.md as it should be: what stands by hand, and the tables."""
    by_hand = PAGE.read_text(encoding="utf-8").split(BEGINS)[0]
    return by_hand + BEGINS + "\n" + "\n".join(tables()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
