"""One baseline for each stage, one change at a time, through the real `train`; then kills and resumptions, to the
bit.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.families import save_family
from tests.ranks import Result, launch, start

STEPS = 10
STAGES = {"dpo": ("train_pairs", "train_conversations"), "sft": ("train_conversations", "train_pairs")}


@dataclass
class Runs:
    """Runs of one stage that share a model, data and caches."""

    stage: str
    root: Path
    flags: dict

    def command(self, name: str, **changes) -> list:
        return [
            word
            for key, value in (self.flags | {"output_dir": self.root / name} | changes).items()
            for word in (f"--{key}", value)
        ]

    def launch(self, name: str, ranks: int = 1, hook: str = "", log: str = "", **changes) -> Result:
        hook = hook and f"tests.faults:{hook}"
        return launch(
            self.command(name, **changes),
            ranks,
            f"launch.{self.stage}",
            self.root / f"{log or name}.log",
            hook,
            timeout=300,
        )

    def run(self, name: str, ranks: int = 1, **changes) -> Path:
        result = self.launch(name, ranks, **changes)
        assert result.ok, result.output
        return self.root / name


def rows(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(directory: Path) -> torch.Tensor:
    return torch.cat([t.double().flatten() for _, t in sorted(load_file(directory / "model.safetensors").items())])


def trajectory(output_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(output_dir)]


def digest(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "final" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module", params=STAGES)
def runs(request, tmp_path_factory, embedded_dir) -> Runs:
    root = tmp_path_factory.mktemp(request.param)
    flags = {
        "model_name_or_path": save_family("llama", root / "model", embedded_dir.model, initializer_range=0.05),
        "cache_dir": root / "cache",
        "dataset_name": getattr(embedded_dir, STAGES[request.param][0]),
        "batch_size": 12,
        "max_steps": STEPS,
        "learning_rate": 2e-3,
        "micro_batch_tokens": 500,
        "warmup_ratio": 0.1,
    }
    return Runs(request.param, root, flags | ({"sample_tokens": 0} if request.param == "sft" else {}))


@pytest.fixture(scope="module")
def baseline(runs):
    return runs.run("baseline")


def assert_same_to_rounding(runs: Runs, a: Path, b: Path) -> None:
    for x, y in zip(rows(a), rows(b), strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-4)
        assert (y["num_tokens"], y["learning_rate"]) == (x["num_tokens"], x["learning_rate"])
    w, w0, w1 = weights_of(a / "final"), weights_of(runs.root / "model"), weights_of(b / "final")
    assert (w1 - w).norm() <= 1e-3 * (w - w0).norm()


CHANGES = {
    "two_ranks": (2, {}),
    "three_ranks": (3, {}),
    "tiny_micro_batches": (1, {"micro_batch_tokens": 60}),
    "one_micro_batch": (1, {"micro_batch_tokens": 100_000}),
    "naive_head": (1, {"head": "naive"}),
    "eager_attention": (1, {"attention": "eager"}),
    "recompute": (2, {"gradient_checkpointing": "full"}),
    "selective": (2, {"gradient_checkpointing": "selective"}),
    "offloaded": (1, {"activation_offload": "true", "micro_batch_tokens": 100_000}),  # tensors large enough to be moved
    "gradients_reduced_once": (2, {"gradient_sync": "last", "micro_batch_tokens": 200}),
    "weights_kept": (2, {"gradient_sync": "keep", "micro_batch_tokens": 200}),
    "kept_recomputed_offloaded": (
        2,
        {
            "gradient_sync": "keep",
            "micro_batch_tokens": 1000,
            "gradient_checkpointing": "full",
            "activation_offload": "true",
        },
    ),
    "all_at_once": (
        3,
        {
            "micro_batch_tokens": 130,
            "head": "naive",
            "attention": "eager",
            "gradient_sync": "last",
            "gradient_checkpointing": "full",
        },
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_but_rounding_depends_on_the_layout(name, runs, baseline):
    ranks, changes = CHANGES[name]
    assert_same_to_rounding(runs, baseline, runs.run(name, ranks, **changes))


@pytest.mark.drill
@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_compiled_layers_are_the_same_to_rounding(recomputed, runs, baseline):
    changes = {"gradient_checkpointing": recomputed, "micro_batch_tokens": 150}
    assert_same_to_rounding(runs, baseline, runs.run(f"compiled_{recomputed}", 2, compile="true", **changes))


@pytest.mark.drill
@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": "selective", "activation_offload": "true", "gradient_sync": "keep"}],
    ids=["plain", "all"],
)
def test_compiled_layers_are_traced_once_for_all_lengths(changes, runs, baseline):
    """With gradients and, for the reference or the evaluation, without; no breaks; on two ranks whose micro-batches
    differ, some empty.
    """
    name = f"traced_{len(changes)}"
    result = runs.launch(
        name, 2, "trace_without_generating_code", compile="true", **({"micro_batch_tokens": 60} | changes)
    )
    assert result.ok, result.output
    counted = re.findall(r"graphs (\d+), breaks (\d+)", result.output)
    assert len(counted) == 2 * STEPS and len(set(counted)) == 1 and counted[0][1] == "0" and int(counted[0][0]) <= 2
    assert_same_to_rounding(runs, baseline, runs.root / name)


def test_it_learns(baseline):
    first, last = rows(baseline)[0], rows(baseline)[-1]
    assert len(rows(baseline)) == STEPS and last["loss"] < 0.95 * first["loss"] and first["learning_rate"] == 0.0


def test_gradients_are_those_of_a_float64_loop_over_single_sequences(runs):
    """The reduced gradient of the first step, for every layout, to 1e-6 of its norm of each other, and of float64
    truth.
    """
    found = {}
    for name, ranks, budget in (("alone", 1, 1), ("packed", 1, 10_000), ("two", 2, 300), ("three", 3, 1)):
        runs.run(
            f"gradients_{name}", ranks, hook="dump_gradients", batch_size=8, max_steps=1, micro_batch_tokens=budget
        )
        found[name] = torch.load(runs.root / f"gradients_{name}" / "gradients.pt", weights_only=True)
    truth = _float64_gradients(runs)
    norm = sum(g.square().sum() for g in truth.values()).sqrt()
    for name, gradients in found.items():
        apart = sum((gradients[k].double() - found["alone"][k].double()).square().sum() for k in truth).sqrt()
        error = sum((gradients[k].double() - truth[k]).square().sum() for k in truth).sqrt()
        assert apart <= 1e-6 * norm, name
        assert error <= 3e-6 * norm, name


def _float64_gradients(runs: Runs) -> dict[str, torch.Tensor]:
    """By transformers in float64, one sequence at a time, the loss written out."""
    from transformers import AutoModelForCausalLM

    from engine.data.mixture import Steps
    from engine.data.store import TokenStore

    lm = AutoModelForCausalLM.from_pretrained(runs.root / "model", attn_implementation="eager", dtype=torch.float64)
    stores = (TokenStore(p) for p in (runs.root / "cache" / "tokens").iterdir() if p.is_dir())
    store = next(s for s in stores if s.per_example == (2 if runs.stage == "dpo" else 1))
    chosen = Steps(len(store), 8, 1, 1, 1).examples(0)

    def logprobs(ids, mask):
        ids, mask = torch.as_tensor(ids.astype("int64")), torch.as_tensor(mask[1:].copy())
        return lm(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0][mask]

    loss = torch.zeros((), dtype=torch.float64)
    tokens = sum(int(mask[1:].sum()) for e in chosen for _, mask in store.sequences(int(e)))
    for example in chosen:
        sides = [logprobs(*sequence) for sequence in store.sequences(int(example))]
        if runs.stage == "sft":
            loss = loss - sides[0].sum() / tokens
        else:  # the policy is its own reference, of which no gradient is taken
            ratio_w, ratio_l = ((side - side.detach()).sum() / len(side) for side in sides)
            loss = loss - torch.nn.functional.logsigmoid(5.0 * (ratio_w - ratio_l)) / len(chosen)
    loss.backward()
    return {name: p.grad for name, p in lm.named_parameters()}


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(runs):
    return runs.run("uninterrupted", 2, save_steps=2)


KILLS = {
    "kill_before_publishing_step_4": 2,
    "kill_rank_1_while_writing_step_4": 2,
    "kill_between_steps_7_and_8": 6,
    "kill_while_exporting": 8,
    "stage_in_memory_that_is_kept_and_kill": 6,
}


@pytest.mark.parametrize("hook", KILLS)
def test_a_killed_run_ends_in_the_same_bits(hook, runs, uninterrupted):
    killed = runs.launch(hook, 2, hook, save_steps=2)
    assert not killed.ok and not (runs.root / hook / "final").exists()
    assert "Traceback" not in killed.output, killed.output  # of the rank that is left, in whichever of its threads
    again = runs.launch(hook, 2, log=f"{hook}.2", save_steps=2)
    assert again.ok, again.output
    assert digest(runs.root / hook) == digest(uninterrupted)
    assert trajectory(runs.root / hook) == trajectory(uninterrupted)
    assert f"resuming after step {KILLS[hook]}" in again.output


def test_killed_twice_at_any_moment(runs, uninterrupted):
    for attempt, step in enumerate((2, 6)):
        log = runs.root / f"twice.{attempt}.log"
        processes = start(f"launch.{runs.stage}", runs.command("twice", save_steps=2), 2, log)
        deadline = time.monotonic() + 60
        while not (runs.root / "twice" / "checkpoints" / f"step-{step:06d}").is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    runs.run("twice", 2, save_steps=2)
    assert digest(runs.root / "twice") == digest(uninterrupted)
    assert trajectory(runs.root / "twice") == trajectory(uninterrupted)


def test_resume_on_another_world_size_is_the_same_to_rounding(runs, uninterrupted):
    runs.launch("reshard", 2, "kill_between_steps_7_and_8", save_steps=4)
    result = runs.launch("reshard", 3, log="reshard.2", save_steps=4)
    assert result.ok and "resuming a run of 2 ranks on 3" in result.output
    assert_same_to_rounding(runs, uninterrupted, runs.root / "reshard")
