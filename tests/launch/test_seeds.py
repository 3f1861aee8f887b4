"""--seeds: which runs there are, what is not run again, what is refused, and what the figures say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import UserError
from launch import dpo, sft
from launch.seeds import each_seed
from tests import ranks


class Stage:
    """A stage whose figures are given: what it writes is all that is compared."""

    def __init__(self, figures: dict[int, dict], dies_at: int | None = None) -> None:
        self.figures, self.dies_at = figures, dies_at
        self.trained: list[int] = []

    def train(self, config) -> None:
        assert config.seeds is None and config.output_dir.endswith(f"seed-{config.seed}")
        directory = Path(config.output_dir)
        if config.dry_run or (directory / "final").is_dir():
            return
        if config.seed == self.dies_at:
            raise KeyboardInterrupt
        self.trained.append(config.seed)
        (directory / "final").mkdir(parents=True)
        rows = [{"step": 0, "eval/loss": 9.0}, {"step": 1, "loss": 1.0}, {"step": 1, **self.figures[config.seed]}]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "ev')


LOSSES = {n: {"eval/loss": 2.0 + n / 10, "eval/low": 1.9 + n / 10, "eval/high": 2.1 + n / 10} for n in range(1, 6)}
REWARDS = {n: {"eval/rewards/accuracies": x} | LOSSES[n] for n, x in ((1, 0.9), (2, 0.92), (3, 0.97))}


def config(tmp_path: Path, *seeds: int, **flags) -> sft.Config:
    return sft.Config(output_dir=str(tmp_path / "out"), seed=None, seeds=tuple(map(str, seeds)), **flags)


def test_what_the_figures_say(tmp_path, capsys):
    each_seed(Stage(LOSSES).train, config(tmp_path, 1, 2, 3))
    found = json.loads((tmp_path / "out" / "seeds.json").read_text())
    of = found["figures"]["eval/loss"]
    assert found["seeds"] == [1, 2, 3] and of["values"] == [2.1, 2.2, 2.3]
    assert (of["mean"], of["sd"], of["range"]) == pytest.approx((2.2, 0.1, 0.2))
    assert of["difference_of_two_runs"] == pytest.approx(0.2 * 2**0.5)
    assert of["mean_interval"] == pytest.approx([2.2 - 0.2484, 2.2 + 0.2484], abs=1e-4)
    assert of["evaluation_intervals"] == [[LOSSES[n]["eval/low"], LOSSES[n]["eval/high"]] for n in (1, 2, 3)]
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (
        "seeds: a difference in held-out loss below 0.2828 between two such runs is within what the seed alone does"
        " (2 sd x root 2, from 3 seeds)"
    )
    assert "  seed 2                              2.2000   2.1000 to 2.3000 (of its evaluation)" in said
    assert (
        "uncertain by +- 0.1000 for the rows that were held out and by +- 0.1960 for its seed: more seeds" in said[-3]
    )


def test_the_headline_is_the_stages_own_and_a_share_is_in_points(tmp_path, capsys):
    each_seed(Stage(REWARDS).train, config(tmp_path, 1, 2, 3))
    said = capsys.readouterr().out
    assert list(json.loads((tmp_path / "out" / "seeds.json").read_text())["figures"]) == [
        "eval/rewards/accuracies",
        "eval/loss",
    ]
    assert "in held-out reward accuracy below 10.2 points between" in said and "to 102" not in said


def test_seeds_that_make_no_difference(tmp_path, capsys):
    each_seed(Stage({n: {"eval/accuracy": 1.0} for n in (1, 2)}).train, config(tmp_path, 1, 2))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "seeds: held-out verified accuracy is 100.0% under all 2: no difference is seen"
    )


def test_without_held_out_rows_the_trainings_last_figures_are_compared(tmp_path, capsys, monkeypatch):
    stage = Stage({n: {"loss": n / 10} for n in (1, 2)})
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, text, **how: write(self, text.replace("eval/", "x/"), **how))
    each_seed(stage.train, config(tmp_path, 1, 2))
    assert "in training loss, last step below 0.2000 between" in capsys.readouterr().out


def test_what_is_finished_is_not_run_again_and_what_was_interrupted_goes_on(tmp_path):
    stage = Stage(LOSSES, dies_at=2)
    with pytest.raises(KeyboardInterrupt):
        each_seed(stage.train, config(tmp_path, 1, 2, 3))
    assert stage.trained == [1]
    stage.dies_at = None
    each_seed(stage.train, config(tmp_path, 1, 2, 3))
    each_seed(stage.train, config(tmp_path, 1, 2, 3, 5))
    assert stage.trained == [1, 2, 3, 5]
    assert json.loads((tmp_path / "out" / "seeds.json").read_text())["seeds"] == [1, 2, 3, 5]


def test_a_dry_run_is_of_one_and_writes_nothing(tmp_path, capsys):
    each_seed(Stage(LOSSES).train, config(tmp_path, 4, 5, dry_run=True))
    assert "this is seed 4; each of the 2 takes as much" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


REFUSED = [
    ((1, 2, 1), {}, "--seeds: 1 stands twice"),
    ((7,), {}, "--seeds compares at least two; one alone is --seed 7"),
    (("1", "x"), {}, "--seeds: expected whole numbers, got 'x'"),
    ((1, 2), {"resume": "out/checkpoints/step-1"}, "is one run's checkpoint; with --seeds it is auto or never"),
]


@pytest.mark.parametrize("seeds, flags, said", REFUSED, ids=str)
def test_seeds_that_cannot_be(seeds, flags, said, tmp_path):
    stage = Stage(LOSSES)
    with pytest.raises(UserError, match=said):
        each_seed(stage.train, config(tmp_path, *seeds, **flags))
    assert not stage.trained and not (tmp_path / "out").exists()


def test_a_directory_belongs_to_one_run_or_to_several(tmp_path):
    stage, out = Stage(LOSSES), tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="holds a run of one seed: --seeds needs a directory of its own"):
        each_seed(stage.train, config(tmp_path, 1, 2))
    (out / "config.yaml").unlink()
    each_seed(stage.train, config(tmp_path, 1, 2))
    with pytest.raises(UserError, match=r"holds runs of several seeds \(--seeds\): give another"):
        each_seed(stage.train, sft.Config(output_dir=str(out)))
    with pytest.raises(UserError, match=r"--resume never: .*seed-1 is not empty"):
        each_seed(stage.train, config(tmp_path, 3, 1, resume="never"))
    assert stage.trained == [1, 2]


def test_the_cache_is_no_matter_of_seeds():
    with pytest.raises(UserError, match="--cache_logprobs_only: the cache is the same under every one of --seeds"):
        dpo.Config(seeds=("1", "2"), cache_logprobs_only=True).check()


def test_two_ranks_run_a_stage_for_every_seed(tmp_path):
    """Through the real entry point: the orders of the data differ, a second command runs only what is missing, and one
    seed's run is the run of that seed alone.
    """
    out, words = tmp_path / "out", ["--cache_dir", tmp_path / "cache", "--max_steps", "2", "--sample_tokens", "0"]
    first = ranks.launch([*words, "--output_dir", out, "--seeds", "1", "2"], 2, "launch.sft", tmp_path / "log")
    assert first.ok, first.output
    assert first.output.count("two packed sequences") == 1  # the second run shows its bar alone
    assert first.output.rstrip().splitlines()[-1].startswith("seeds: a difference in held-out loss below ")
    rows = {seed: (out / f"seed-{seed}" / "metrics.jsonl").read_text() for seed in (1, 2)}
    losses = {seed: [json.loads(line).get("loss") for line in text.splitlines()] for seed, text in rows.items()}
    assert losses[1] != losses[2]
    again = ranks.launch(
        [*words, "--output_dir", out, "--quiet", "--seeds", "2", "3"], 2, "launch.sft", tmp_path / "again"
    )
    assert again.ok and len(again.output.splitlines()) == 1, again.output
    assert (out / "seed-2" / "metrics.jsonl").read_text() == rows[2] and (out / "seed-3" / "final").is_dir()
    alone = ranks.launch(
        [*words, "--output_dir", tmp_path / "alone", "--seed", "3"], 2, "launch.sft", tmp_path / "alone.log"
    )
    assert alone.ok, alone.output
    ours, theirs = (directory / "final" / "model.safetensors" for directory in (out / "seed-3", tmp_path / "alone"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_seed_and_seeds_are_two_ways(tmp_path):
    words = ["--seed", "1", "--seeds", "1", "2", "--output_dir", tmp_path / "out"]
    refused = ranks.launch(words, 1, "launch.sft", tmp_path / "log")
    assert refused.codes == [2]
    assert refused.output == "error: --seeds and --seed are two ways to say one thing: give one of them\n"
