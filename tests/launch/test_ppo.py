"""launch.ppo through its real entry point: it learns, it does not depend on the layout, it survives kills, it names bad
input.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.families import save_family
from tests.launch.test_equivalence import Runs, digest, rows, trajectory, weights_of


@pytest.fixture(scope="module")
def runs(tuned, tmp_path_factory) -> Runs:
    flags = {
        "cache_dir": tuned,
        "max_steps": 6,
        "batch_size": 8,
        "num_samples_per_prompt": 2,
        "eval_samples": 1,
        "micro_batch_tokens": 500,
    }
    return Runs("ppo", tmp_path_factory.mktemp("ppo"), flags)


@pytest.fixture(scope="module")
def baseline(runs):
    return runs.run("baseline")


def iterations(output_dir: Path) -> list[dict]:
    return [row for row in rows(output_dir) if "loss" in row]


def timeless(output_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in trajectory(output_dir)]


# --- it learns --------------------------------------------------------------------------------------------------------


SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def learnt(tuned, tmp_path_factory):
    """A function of the seed: the rows of the embedded default, in fewer iterations than its 30, to save time."""
    root = tmp_path_factory.mktemp("learnt")
    run = lambda seed: rows(Runs("ppo", root, {"cache_dir": tuned, "seed": seed, "max_steps": 16}).run(str(seed), 2))
    return functools.cache(run)


@pytest.mark.parametrize("seed", [SEEDS[0], *(pytest.param(seed, marks=pytest.mark.drill) for seed in SEEDS[1:])])
def test_held_out_accuracy_rises_by_more_than_its_interval(seed, learnt):
    before, *_, after = (row for row in learnt(seed) if "eval/accuracy" in row)
    assert after["eval/low"] > before["eval/high"]
    found = [row for row in learnt(seed) if "loss" in row]
    assert max(row["objective/kl"] for row in found) < 6 and found[0]["objective/kl"] == 0


@pytest.mark.drill
def test_the_value_model_learns(learnt):
    """Explained variance, of one iteration +- 0.03 by chance, over the second halves of all runs against the first."""
    found = torch.tensor([[row["val/explained_variance"] for row in learnt(seed) if "loss" in row] for seed in SEEDS])
    assert found[:, 8:].mean() > found[:, :8].mean() + 0.015 and (found[:, 0] == 0).all()


# --- layouts ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "two_ranks": (2, {}),
    "one_sampler_on_two_ranks": (2, {"rollout_tensor_parallel": 2}),
    "tiny_micro_batches": (1, {"micro_batch_tokens": 60}),
    "three_slots": (1, {"rollout_slots": 3}),
    "weights_gathered_for_a_rollout": (2, {"rollout_weights": "gather"}),
    "naive_and_eager": (1, {"head": "naive", "attention": "eager"}),
}


@pytest.mark.parametrize("name", [*list(CHANGES)[:-1], pytest.param(list(CHANGES)[-1], marks=pytest.mark.drill)])
def test_nothing_but_rounding_depends_on_the_layout(name, runs, baseline):
    ranks, changes = CHANGES[name]
    changed = runs.run(name, ranks, **changes)
    samples = [
        [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()] for out in (baseline, changed)
    ]
    assert [s["response"] for s in samples[0] if s["step"] == 0] == [
        s["response"] for s in samples[1] if s["step"] == 0
    ]
    for a, b in zip(iterations(baseline)[:3], iterations(changed)[:3], strict=True):
        assert b["objective/scores"] == a["objective/scores"] and b["rollout/length"] == a["rollout/length"]
        assert b["loss/value"] == pytest.approx(a["loss/value"], rel=1e-3) and b["objective/kl"] == pytest.approx(
            a["objective/kl"], abs=1e-3
        )
    if name != "naive_and_eager":  # as long as no draw flips, so do the weights
        w, w0, w1 = (
            weights_of(baseline / "final"),
            weights_of(Path(runs.flags["cache_dir"]) / tuned_model(runs)),
            weights_of(changed / "final"),
        )
        assert (w1 - w).norm() <= 2e-2 * (w - w0).norm()


def tuned_model(runs: Runs) -> Path:
    return next(Path(runs.flags["cache_dir"]).glob("embedded-v*/tuned_on_sums/final")).relative_to(
        runs.flags["cache_dir"]
    )


def test_the_first_iteration_is_on_policy(baseline):
    first = iterations(baseline)[0]
    assert first["objective/kl"] == 0 and abs(first["val/ratio"] - 1) < 0.2 and 0 < first["objective/entropy"] < 2
    assert first["rollout/stop_rate"] > 0.9 and first["verified/gsm8k"] == first["objective/scores"]


def test_a_response_without_a_verdict_is_masked_and_more_than_one_percent_stop_the_run():
    """An error is never a zero: it is neither trained on nor averaged."""
    import numpy as np

    from engine.errors import UserError
    from launch.ppo import Config
    from rollout import Drawn, Rollout, experience_of
    from verifiers import Verdict

    ids = np.array([5, 6])
    rollouts = [Rollout(i, 0, ids, ids, np.zeros(2, np.float32), np.zeros(2, np.float32), "stop") for i in range(200)]
    ok, error = Verdict(1.0, "right", "ok"), Verdict(0.0, "the worker process was killed", "error")
    config = Config(response_length=8, verification_reward=10.0)
    batch = experience_of(Drawn(rollouts, [error, error, *[ok] * 198]), config, str)
    assert len(batch) == 198 and batch.scores_S.tolist() == [10.0] * 198 and batch.rollouts[0].example == 2
    with pytest.raises(
        UserError, match="3 of 200 responses could not be verified, the first: the worker process was killed"
    ):
        experience_of(Drawn(rollouts, [error] * 3 + [ok] * 197), config, str)


def test_rows_of_two_verifiers_count_as_one_each_in_the_accuracy(runs, tuned, tmp_path):
    rows_of = [json.loads(line) for line in next(tuned.glob("embedded*/held_out_problems.jsonl")).open()]
    accuracies = []
    for number in (1, 2):
        path = tmp_path / f"{number}.jsonl"
        twice = [
            row | {"ground_truth": [row["ground_truth"]] * number, "dataset": [row["dataset"]] * number}
            for row in rows_of
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in (rows_of if number == 1 else twice)))
        done = runs.run(f"verifiers-{number}", max_steps=1, num_ppo_epochs=1, eval_dataset_name=path)
        accuracies.append(next(row["eval/accuracy"] for row in rows(done) if "eval/accuracy" in row))
    assert 0.2 < accuracies[0] == accuracies[1] < 0.9


# --- resume -----------------------------------------------------------------------------------------------------------


def test_a_killed_run_ends_in_the_same_bits(runs):
    whole = runs.run("whole", 2, save_steps=2)
    killed = runs.launch("killed", 2, "kill_before_publishing_step_4", save_steps=2)
    assert not killed.ok
    again = runs.launch("killed", 2, log="killed.2", save_steps=2)
    assert again.ok and "resuming after step 2" in again.output, again.output
    assert digest(runs.root / "killed") == digest(whole) and timeless(runs.root / "killed") == timeless(whole)
    assert (runs.root / "killed" / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    value = lambda out: (out / "final" / "value" / "model.safetensors").read_bytes()
    assert value(runs.root / "killed") == value(whole)


def test_what_is_exported_loads(baseline):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy = AutoModelForCausalLM.from_pretrained(baseline / "final")
    value = AutoModelForSequenceClassification.from_pretrained(baseline / "final" / "value")
    assert value.config.num_labels == 1 and value.score.weight.abs().sum() > 0
    assert policy.generation_config.eos_token_id


# --- variants and real input ------------------------------------------------------------------------------------------


def test_the_originals_settings(runs):
    """Score after the end, clipped values, reward 10, penalty -10, k3, two mini-batches, value warm-up, an own value
    model.
    """
    value_model = Path(runs.flags["cache_dir"]) / tuned_model(runs)
    out = runs.run(
        "original",
        score_slot="after_eos",
        cliprange_value=0.2,
        verification_reward=10,
        missing_eos_penalty=-10,
        kl_estimator="k3",
        num_mini_batches=2,
        value_warmup_steps=2,
        value_model_name_or_path=value_model,
        response_length=17,
        max_steps=3,
    )
    found = iterations(out)
    assert found[0]["policy/clipfrac"] == 0 and found[0]["loss/policy"] == 0 and found[2]["loss/policy"] != 0
    assert all(-10 <= row["objective/scores"] <= 10 for row in found)


def test_no_penalty_means_no_reference(runs):
    out = runs.run("free", kl_coef=0, max_steps=2, top_p=0.9)
    assert all(row["objective/kl"] == 0 for row in iterations(out))


def test_real_prompts(shared_data, tmp_path, embedded_dir):
    """GSM8K prompts through rollout, verifier and one update, 2 ranks (a 30M model is `make slow-tests`)."""
    real_prompts(
        shared_data,
        tmp_path,
        save_family("qwen3", tmp_path / "model", embedded_dir.model, max_position_embeddings=1024),
    )


@pytest.mark.drill
def test_real_prompts_on_a_30m_llama(shared_data, tmp_path, embedded_dir):
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "head_dim": 64,
        "vocab_size": 4096,
    }
    real_prompts(
        shared_data,
        tmp_path,
        save_family("llama", tmp_path / "model", embedded_dir.model, max_position_embeddings=2048, **sizes),
    )


def real_prompts(shared_data: Path, tmp_path: Path, source: Path) -> None:
    flags = {
        "model_name_or_path": source,
        "dataset_name": shared_data / "rlvr" / "gsm8k_train.jsonl",
        "cache_dir": tmp_path / "cache",
        "batch_size": 6,
        "num_samples_per_prompt": 2,
        "response_length": 24,
        "max_seq_length": 800,
        "max_steps": 1,
    }
    result = Runs("ppo", tmp_path, flags).launch("out", 2)
    assert result.ok and "7472 rows" in result.output and "7472 gsm8k" in result.output.replace(",", ""), result.output
    (row,) = iterations(tmp_path / "out")
    assert (
        torch.isfinite(torch.tensor([row["loss"], row["loss/value"], row["grad_norm"]])).all()
        and row["rollout/errors"] == 0
    )


# --- bad input --------------------------------------------------------------------------------------------------------


def problem(**changes) -> str:
    row = {"messages": [{"role": "user", "content": "2?"}], "ground_truth": "2", "dataset": "gsm8k"} | changes
    return json.dumps({k: v for k, v in row.items() if v is not None}) + "\n"


BAD = {
    "verifier": (problem(dataset="gsm9k"), {}, "gsm8k"),
    "ground_truth": (problem(ground_truth=None), {}, "ground_truth: missing"),
    "messages": (problem(messages=[{"role": "assistant", "content": "x"}]), {}, "messages: expected a turn to answer"),
    "long_prompt": (
        problem(messages=[{"role": "user", "content": "word " * 300}]),
        {"max_seq_length": 60},
        "none has at most 36 tokens",
    ),
    "response_length": (
        problem(),
        {"response_length": 512, "max_seq_length": 512},
        "--response_length 512 leaves no room",
    ),
    "temperature": (problem(), {"temperature": -1}, "--temperature must be between"),
    "lam": (problem(), {"lam": 1.5}, "--lam must be between"),
    "ranks": (problem(), {"ranks": 2}, "2 ranks for 1 prompts"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(name, runs, tmp_path):
    content, changes, said = BAD[name]
    (tmp_path / "rows.jsonl").write_text(content)
    changes = {"response_length": 24, "model_name_or_path": Path(runs.flags["cache_dir"]) / tuned_model(runs)} | changes
    ranks = changes.pop("ranks", 1)
    result = runs.launch(f"bad_{name}", ranks, dataset_name=tmp_path / "rows.jsonl", **changes)
    assert set(result.codes) == {2} and said in result.output and "Traceback" not in result.output, result.output
    assert result.output.count("error: ") == 1


def test_a_value_model_of_another_vocabulary(runs, tmp_path, embedded_dir):
    other = save_family("llama", tmp_path / "other", embedded_dir.model, vocab_size=700)
    result = runs.launch("vocabulary", value_model_name_or_path=other)
    assert result.codes == [2] and "the value model has a vocabulary of 700, the policy one of 512" in result.output
    shutil.rmtree(other)
