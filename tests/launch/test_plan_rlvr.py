"""Plans of PPO and GRPO: which models there are, what a loss costs, and what the recipes' heads quote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import config as configuration
from engine.config import parse
from launch import grpo
from launch.plan import plan
from launch.planner import plans
from launch.planner.stages import Rehearsed
from rollout.sampler import BLOCK
from tests.launch.test_plan import TINY, planned


@pytest.fixture(scope="module", autouse=True)
def no_group():
    """A rehearsal makes a process group of its own; other modules start theirs anew."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("architecture") / "config.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return path


def test_ppo_counts_every_model_and_the_cache(tiny):
    p = planned("ppo", tiny, batch_size=8, max_seq_length=256, response_length=128, rollout_slots=4)
    kinds = p.seen.peaks["decode"].kinds
    # (slots x tokens, in pages of 32, a page more for each of them, the one that is nobody's) x (keys, values) x layers
    # x heads x size x bf16
    pages = 4 * (256 // BLOCK + 1) + 4 + 1
    assert kinds["KV cache"] == p.seen.pool == pages * BLOCK * 2 * 3 * 2 * 16 * 2 and p.seen.slots == 4
    token = p.seen.rollout["decode"]
    read = 4 * 192 * 2 * 3 * 2 * 16 * 2  # half grown
    assert 0 < token.moved - read < 3 * p.seen.parameters * 2 and token.operations < 400
    numbers = p.seen.parameters
    assert kinds["sampler's weights"] == pytest.approx(2 * numbers, rel=0.02) and kinds[
        "reference copy"
    ] == pytest.approx(4 * numbers, rel=0.02)
    assert kinds["value model"] > 2 * kinds["weights"]  # with its moments, without a head of V rows
    assert "KV cache" not in p.seen.steady
    assert {"hand-over", "prefill", "decode", "evaluate", "update", "optimizer"} == p.parts.keys() and all(
        p.parts.values()
    )


def test_a_team_splits_the_sampler_and_its_cache(tiny):
    """What the layers and the head take is halved; the embedding is whole on both ranks."""
    flags = {"batch_size": 8, "max_seq_length": 256, "response_length": 128, "rollout_slots": 4, "gpus": 2}
    alone, team = (planned("ppo", tiny, **flags, rollout_tensor_parallel=n).seen for n in (1, 2))
    one, two = (seen.peaks["decode"].kinds for seen in (alone, team))
    assert two["KV cache"] == one["KV cache"] / 2
    embedding = 2 * TINY["vocab_size"] * TINY["hidden_size"]
    split = (one["sampler's weights"] - embedding) / 2
    assert two["sampler's weights"] - embedding == pytest.approx(split, rel=0.03)
    assert team.rollout["decode"].communicating > 0 == alone.rollout["decode"].communicating
    assert team.rollout["hand-over"].communicating == pytest.approx(alone.rollout["hand-over"].communicating)
    assert (alone.slots, team.slots) == (4, 2)


SAMPLED = {"batch_size": 4, "num_samples_per_prompt": 4, "max_seq_length": 256, "response_length": 128}


@pytest.fixture(scope="module")
def sampled(tiny) -> dict[str, Rehearsed]:
    """One machine's work by PPO, and by GRPO without more, against a reference, and with an entropy bonus."""
    changes = {"value": {"kl_coef": 0.1}, "plain": {}, "against": {"kl_coef": 0.1}, "bonus": {"entropy_coef": 0.1}}
    return {
        name: planned("ppo" if name == "value" else "grpo", tiny, **SAMPLED, **change).seen
        for name, change in changes.items()
    }


def test_grpo_has_no_value_model_and_a_reference_only_for_a_kl(sampled):
    value, plain, against = (sampled[name] for name in ("value", "plain", "against"))
    numbers = plain.parameters
    assert plain.trained == against.trained == numbers < value.trained
    for seen, kinds in ((plain, set()), (against, {"reference copy"}), (value, {"reference copy", "value model"})):
        assert {"reference copy", "value model"} & seen.steady.keys() == kinds
    assert against.peak.total - plain.peak.total == pytest.approx(4 * numbers, rel=0.05)
    assert plain.rollout["evaluate"].flops < against.rollout["evaluate"].flops < value.rollout["evaluate"].flops
    assert plain.micro_batch.flops == against.micro_batch.flops < value.micro_batch.flops
    assert plain.optimizer.moved < 0.6 * value.optimizer.moved


def test_an_entropy_bonus_costs_another_product_with_the_head(sampled):
    rows = SAMPLED["response_length"] * SAMPLED["batch_size"] * SAMPLED["num_samples_per_prompt"]
    more = sampled["bonus"].micro_batch.flops - sampled["plain"].micro_batch.flops
    assert more == 2 * rows * TINY["hidden_size"] * TINY["vocab_size"]


def test_adapters_are_the_reference_of_grpo(tmp_path):
    """No copy is planned; a start of their own is kept where it is what a KL divergence is taken to."""
    config, lora = tmp_path / "config.json", SAMPLED | {"use_lora": True}
    config.write_text(json.dumps(TINY | {"num_hidden_layers": 1}), encoding="utf-8")
    assert "reference copy" not in planned("grpo", config, **lora, kl_coef=0.1).seen.steady
    start = lora | {"adapter_name_or_path": "nowhere"}
    kept = planned("grpo", config, **start, kl_coef=0.1, reference="adapter").seen
    left = planned("grpo", config, **start).seen
    assert kept.trained == left.trained < left.parameters / 4
    assert kept.steady["weights"] > left.steady["weights"] + left.trained


@pytest.mark.drill
@pytest.mark.parametrize("advantage", ["grpo", "reinforce_pp"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "gspo"])
@pytest.mark.parametrize("kl_in", ["none", "loss", "reward"])
def test_every_loss_of_grpo_is_planned(advantage, surrogate, kl_in, tmp_path):
    """With a head of several chunks, over which a response's tokens are spread."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"vocab_size": 2**19}), encoding="utf-8")
    flags = SAMPLED | {"advantage": advantage, "surrogate": surrogate, "micro_batch_tokens": 4096}
    flags |= {} if kl_in == "none" else {"kl_in": kl_in, "kl_coef": 0.1}
    seen = planned("grpo", tmp_path / "config.json", **flags).seen
    assert ("reference copy" in seen.steady) == (kl_in != "none") and seen.micro_batch.flops > 0


@pytest.mark.parametrize(
    "argv",
    [[], ["--kl_coef", "0.1"], ["--kl_coef", "0.1", "--kl_in", "reward"], ["--surrogate", "gspo"], ["--use_lora"]],
)
def test_a_plan_of_grpo_is_of_what_the_run_takes(argv, tiny, tmp_path):
    """What launch.grpo fills in is what is planned, and so is the config.yaml of it, which --dry_run plans."""
    given = ["--model_name_or_path", "meta-llama/Llama-3.2-1B", "--dataset_name", "rows", *argv]
    world = SimpleNamespace(agree=lambda *_: None, say=lambda *_: None, size=8, device=torch.device("cpu"))
    run = grpo.resolve_grpo(parse(grpo.Config, given), world)
    configuration.save(configuration.as_dict(run), tmp_path / "config.yaml", {})
    for words_ in (given, ["--config", str(tmp_path / "config.yaml")]):
        config, _, value_config = plans.resolve("grpo", parse(plans.GrpoPlan, words_))
        assert value_config is None
        for name in ("clip_low", "clip_high", "kl_in", "kl_estimator", "reference", "batch_size", "response_length"):
            assert getattr(config, name) == getattr(run, name), name


RECIPES = sorted((Path(plans.__file__).parents[1] / "recipes").glob("*.yaml"))
QUOTED = {p.name: p.read_text(encoding="utf-8") for p in RECIPES if " says:\n" in p.read_text(encoding="utf-8")}


@pytest.mark.parametrize("name", QUOTED)
def test_a_recipes_head_quotes_a_plan_of_itself(name):
    """Of its own stage and file, on a machine where it fits."""
    (command,) = re.findall(r"^# python -m launch\.plan (\w+ .*) says:$", QUOTED[name], re.M)
    stage, *argv = command.split()
    assert name.endswith(f"_{stage}.yaml") and argv[:2] == ["--config", f"launch/recipes/{name}"]
    config = parse(plans.STAGES[stage][1], [*argv[:1], str(plans.ARCHITECTURES.parent / "recipes" / name), *argv[2:]])
    assert (
        f"#   plan: {stage} of " in QUOTED[name] and f"on {config.gpus * config.nodes} x {config.gpu}" in QUOTED[name]
    )
    assert len(re.findall(r"^#     needed, of .* it fits, ", QUOTED[name], re.M)) == 1


@pytest.mark.drill
@pytest.mark.parametrize("name", QUOTED)
def test_what_a_recipes_head_quotes_is_said(name, monkeypatch, capsys):
    """Word for word; numbers up to 2 %, since times move with every operation that a step saves."""
    monkeypatch.chdir(Path(plans.__file__).parents[2])
    (command,) = re.findall(r"^# python -m launch\.plan (\w+ .*) says:$", QUOTED[name], re.M)
    plan(command.split())
    said = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("planned in")]
    quoted = re.findall(r"^#   (?!(?:torchrun|python) )(.*)$", QUOTED[name], re.M)
    number = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")
    (words, values), (other_words, others) = (
        (number.sub("#", text).split(), [float(n.replace(",", "")) for n in number.findall(text)])
        for text in ("\n".join(quoted), "\n".join(said))
    )
    assert words == other_words and values == pytest.approx(others, rel=0.02, abs=0.1)


def test_a_gathered_sampler_is_not_there_in_the_update(tiny):
    """Kept, its weights are part of every phase; gathered, of those of a rollout."""
    flags = {"batch_size": 8, "max_seq_length": 256, "response_length": 128, "rollout_slots": 4}
    kept, gathered = (planned("ppo", tiny, rollout_weights=how, **flags) for how in ("keep", "gather"))
    of = lambda p, phase: p.seen.peaks[phase].kinds.get("sampler's weights", 0)
    assert of(kept, "update") == of(kept, "decode") == of(gathered, "decode") > 100 * of(gathered, "update")
    assert planned("ppo", tiny, **flags).seen.peaks == kept.seen.peaks  # auto, and there is room
    ahead = planned("ppo", tiny, rollout_ahead=1, **flags)
    assert of(ahead, "update") == of(kept, "update") and ahead.seen.peaks["update"].kinds["KV cache"] > 0
