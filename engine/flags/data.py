"""The flags of the data."""

from __future__ import annotations

from dataclasses import dataclass

from engine.flags.declare import DATA, RUN, Seeded, flag


@dataclass(frozen=True, kw_only=True)
class DataFlags(Seeded):
    """Which rows, and how much of each."""

    dataset_name: str = flag(
        None, "hub id, directory, .jsonl, .json or .parquet; without it, embedded data", DATA, excludes=("mixer_list",)
    )
    dataset_revision: str | None = flag(None, "branch, tag or commit of the dataset on the hub", DATA)
    dataset_split: str = flag(
        "train", "split of a hub dataset, or of a directory whose files are named after splits", DATA
    )
    max_seq_length: int = flag(2048, "prompt + response, in tokens", DATA, aliases=("max_length",))
    on_bad_row: str = flag(
        "skip", "a malformed row stops the run or is skipped, counted and listed", DATA, choices=("error", "skip")
    )
    cache_dir: str = flag(
        "~/.cache/triptych", "tokenised data and reference log-probs, shared by all runs of a user", RUN
    )


@dataclass(frozen=True, kw_only=True)
class MixtureFlags(DataFlags):
    """Which rows to train on, and which to hold out."""

    mixer_list: tuple[str, ...] | None = flag(
        None,
        "a mixture instead of --dataset_name: NAME AMOUNT NAME AMOUNT ..., AMOUNT a fraction (1.0) or a number of rows"
        " (2000)",
        DATA,
        many=True,
    )
    eval_dataset_name: str | None = flag(None, "held-out data, like --dataset_name", DATA, aliases=("eval_dataset",))
    eval_split: str = flag("test", "--dataset_split of --eval_dataset_name", DATA)
    dataset_num_proc: int | None = flag(None, "processes that tokenise a large dataset; without it, one per core", DATA)

    @property
    def names_data(self) -> bool:
        return self.dataset_name is not None or self.mixer_list is not None
