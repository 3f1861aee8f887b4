"""What a dataset holds, before one trains on it.

    python -m launch.data sft --dataset_name rows.jsonl --model_name_or_path MODEL
    python -m launch.data --dataset_name rows.jsonl --model_name_or_path MODEL --against test.jsonl --page rows.html

Give the stage (sft, dpo, ppo or grpo) that will read the rows and its flags, or its --config; without a stage it is
guessed from the first row. Shown are rows and columns, which are used and which are not, bad rows with their reasons,
lengths in tokens and what --max_seq_length cuts, duplicates, and what an evaluation set shares with the rows.
--examples N prints some with the trained tokens in [[ ]], --page FILE.html writes a page of them. Nothing is trained;
without a model, the embedded tokenizer counts.
"""

import contextlib
import io
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from engine.config import parse
from engine.errors import UserError, nearest, on_one_line
from engine.world import available_cores, main, start
from launch import commands, dpo, grpo, ppo, sft
from launch.inspection import opened, page, report, tally
from launch.inspection.look import Lens
from launch.inspection.opened import KINDS, InspectionFlags

DRAWN = 12  # examples drawn for the page
SHOWN_TEXT = 4000  # characters of an example on the terminal


@dataclass(frozen=True, kw_only=True)
class SftData(InspectionFlags, sft.Config):
    __doc__ = __doc__


@dataclass(frozen=True, kw_only=True)
class DpoData(InspectionFlags, dpo.Config):
    __doc__ = __doc__


@dataclass(frozen=True, kw_only=True)
class PpoData(InspectionFlags, ppo.Config):
    __doc__ = __doc__


@dataclass(frozen=True, kw_only=True)
class GrpoData(InspectionFlags, grpo.Config):
    __doc__ = __doc__


CONFIGS: dict[str, type] = {"sft": SftData, "dpo": DpoData, "ppo": PpoData, "grpo": GrpoData}


def inspect(argv: list[str]) -> None:
    """The command. Raises UserError."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nflags: python -m launch.data {{{','.join(CONFIGS)}}} --help")
        return
    stage, why, config = command(argv)
    check(config)
    world = start()
    if world.size > 1:
        raise UserError("launch.data runs as one process: python -m launch.data, without torchrun")
    with opened.opened(stage, config, world) as found:
        origin = f"{found.config.model_name_or_path}, chat template: {found.chat.template_origin}"
        say([f"stage       {stage}, {why}", f"tokenizer   {origin}", *not_read(config)])
        datasets = look(found)
        table = tally.Table.of(datasets, found.config.seed, [name for name, _ in found.names])
        overlaps = tally.overlaps(datasets, found.evaluations)
        findings = report.Findings.of(stage, table, found.limit, found.limit_flag, overlaps)
        examples = (
            {}
            if not (config.page or config.examples)
            else tally.picks(table, found.limit, found.config.seed, max(config.examples, DRAWN if config.page else 0))
        )
        wanted = findings.refs() | {table.ref(example) for example in examples}
        rows = {(d, number): rest for d, dataset in enumerate(datasets) for number, *rest in again(d, dataset, wanted)}
        screen = report.lines(findings, lambda ref: rows[ref][0])
        say(screen)
        shown = [(example, why, *rows[table.ref(example)]) for example, why in examples.items()]
        for example, why, place, row in shown[: config.examples]:
            say(["", f"{place} ({why}):"])
            print("\n".join(text[:SHOWN_TEXT] for text in bracketed(found, table, example, row)))
        if config.page:
            of_page = [of_example(found, table, *one) for one in shown]
            bad = [(f"{d.shown}{place}", why) for d in datasets for _, place, why in d.found.bad]
            title = " + ".join(dataset.shown for dataset in datasets)
            write(config.page, page.render(title, screen, of_page, bad))
            say([f"page        {config.page}: {len(of_page)} examples, {len(bad)} bad rows"])
        if config.drop_overlap:
            say(drop(config.drop_overlap, datasets))
        of_bad_rows = found.config.on_bad_row, found.config.max_bad_rows
        say([report.advice(findings, words(found), config.drop_overlap, *of_bad_rows)])


# --- what is asked ----------------------------------------------------------------------------------------------------


def command(argv: list[str]) -> tuple[str, str, Any]:
    """(stage, why it is that one, its configuration) of a command line. Raises UserError."""
    if argv and not argv[0].startswith("--"):
        stage, *argv = argv
        if stage not in CONFIGS:
            raise UserError(f"{stage!r} is not a stage: {', '.join(CONFIGS)}{nearest(stage, CONFIGS)}")
        return stage, "as given", parse(CONFIGS[stage], argv, elsewhere=commands)
    fitting: dict[str, Any] = {}
    refused: dict[str, UserError] = {}
    for stage, of in CONFIGS.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what is translated is said once, below
                fitting[stage] = parse(of, argv, elsewhere=commands)
        except UserError as error:
            refused[stage] = error
    if not fitting:
        raise refused["sft"]
    stage, why = next(iter(fitting)), "the only one that has these flags"
    if len({KINDS[fits] for fits in fitting}) > 1:
        stage, why = opened.guessed(fitting[stage])
    elif len(fitting) > 1:
        why = f"whose flags and rows are {', '.join([*fitting][1:])}'s too"
    stage = next((fits for fits in fitting if KINDS[fits] == KINDS[stage]), stage)
    why += f"; `launch.data {stage}` says it" if len(fitting) > 1 else ""
    if stage in refused:
        raise refused[stage]
    return stage, why, parse(CONFIGS[stage], argv, elsewhere=commands)


def check(config: Any) -> None:
    """Raises UserError for flags that cannot be followed, before anything is read."""
    config.check_rows()
    if config.examples < 0:
        raise UserError(f"--examples must not be negative, got {config.examples}")
    if config.drop_overlap and not (config.against or config.eval_dataset_name):
        raise UserError("--drop_overlap is not read without --against, the evaluation sets to compare with")
    for name in ("page", "drop_overlap"):
        path = vars(config)[name]
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{name} {path}: no such directory as {Path(path).absolute().parent}")
        if path and Path(path).is_dir():
            raise UserError(f"--{name} {path}: is a directory, a file is expected")
    named = [config.dataset_name, *(config.mixer_list or ())[::2]]
    if config.drop_overlap and Path(config.drop_overlap).absolute() in {Path(n).absolute() for n in named if n}:
        raise UserError(f"--drop_overlap {config.drop_overlap}: is the dataset itself, give another file")


def not_read(config: Any) -> list[str]:
    """A line on the flags that were given and are the training's, or none."""
    ours = {f.name for f in fields(opened.InspectionFlags)} | set(opened.READ)
    given = [f.name for f in fields(config) if f.name not in ours and vars(config)[f.name] != f.default]
    return [f"not read    {', '.join(sorted(given))}: the training's"] if given else []


def words(found: opened.Opened) -> list[str]:
    """The words of a command line that name the model and the data."""
    config = found.config
    data = ["--mixer_list", *config.mixer_list] if config.mixer_list else ["--dataset_name", config.dataset_name]
    return ["--model_name_or_path", config.model_name_or_path, *data]


# --- reading, and reading again ---------------------------------------------------------------------------------------


def look(found: opened.Opened) -> list[tally.Dataset]:
    """All datasets, read in one pass each. A verifier of one's own judges in a process already."""
    workers = 1 if found.kind == "problems" else found.config.dataset_num_proc or available_cores()
    against = tuple(evaluation for evaluation, _ in found.evaluations)
    last = [Path(name).name for name, _ in found.names]
    datasets = []
    for (name, amount), source, read in zip(found.names, found.sources, found.readers, strict=True):
        shown = Path(name).name if last.count(Path(name).name) == 1 else name
        datasets.append(tally.Dataset(shown, amount, source, tally.look_at(source, Lens(read, against), workers)))
    return datasets


def again(d: int, dataset: tally.Dataset, wanted: Iterable[tally.Ref]) -> Iterable[tuple]:
    """The wanted rows of the dataset of this number."""
    return dataset.again(row for of, row in wanted if of == d)


def drop(path: str, datasets: list[tally.Dataset]) -> list[str]:
    """Writes the rows that overlap with no evaluation set; says how many."""
    kept = dropped = unread = 0
    with open(path, "w", encoding="utf-8") as out:
        for dataset in datasets:
            overlapping = set().union(*dataset.found.overlapping.values())
            for number, (_, row) in enumerate(dataset.source.rows()):
                if number in overlapping:
                    dropped += 1
                elif not isinstance(row, dict):
                    unread += 1
                else:
                    out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                    kept += 1
    left = f", {unread:,} that are no rows left out" if unread else ""
    return [f"written     {path}: {kept:,} rows, {dropped:,} that overlap left out{left}"]


# --- examples ---------------------------------------------------------------------------------------------------------


def sequences_of(found: opened.Opened, table: tally.Table, example: int, row: dict) -> list[tuple]:
    """(name, ids, mask) of the sequences of an example."""
    d, number = table.ref(example)
    same = (table.columns["dataset"][:example] == d) & (table.columns["row"][:example] == number)
    sequences = found.readers[d].shown(row)[int(same.sum())]
    names = ("chosen", "rejected") if len(sequences) == 2 else ("",)
    return [(name, *sequence) for name, sequence in zip(names, sequences, strict=True)]


def bracketed(found: opened.Opened, table: tally.Table, example: int, row: dict) -> list[str]:
    """The texts of an example for the terminal."""
    texts = [
        (f"{name}: " if name else "") + page.bracketed(found.chat, ids, mask)
        for name, ids, mask in sequences_of(found, table, example, row)
    ]
    return texts + [on_one_line(f"{name}: {value}") for name, value in found.readers[table.ref(example)[0]].facts(row)]


def of_example(found: opened.Opened, table: tally.Table, example: int, why: str, place: str, row: dict) -> page.Example:
    """An example as the page shows it."""
    sequences = [
        page.sequence(found.chat, name, ids, mask, found.limit)
        for name, ids, mask in sequences_of(found, table, example, row)
    ]
    facts = found.readers[table.ref(example)[0]].facts(row)
    return page.Example(place, why, table.label(example), sequences, facts)


def write(path: str, text: str) -> None:
    """Raises UserError where it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def say(lines: Iterable[str]) -> None:
    """On the screen, each on one line."""
    for line in lines:
        print(line if line.isprintable() else on_one_line(line), flush=True)


if __name__ == "__main__":
    main(lambda: inspect(sys.argv[1:]))
