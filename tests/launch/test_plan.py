"""The ledger on allocations made by hand, plans beside a run's own allocator, what must scale, what must be refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from benchmarks.plan import COMMON, made, measured, words
from engine.config import parse
from engine.errors import UserError
from engine.hardware import DEVICES, device
from launch.plan import plan
from launch.planner import foreign, plans, search
from launch.planner.fakes import flash_attention, visible_pairs
from launch.planner.ledger import HOST, Ledger
from tests.ranks import launch

H100 = DEVICES["h100-80gb"]
FOREIGN = [(FakeTensor, "is_cuda"), (torch.UntypedStorage, "resize_"), (FSDPParamGroup, "unshard")]


@pytest.fixture
def ledger():
    ledger = Ledger(H100, block=1)
    with foreign.followed(ledger, cuda=False), FakeTensorMode(), ledger:
        yield ledger


def test_a_storage_counts_once_until_its_last_view_dies(ledger):
    a = torch.empty(1000)
    view = a[10:].view(-1, 2)
    assert ledger.total == 4000
    b = a + 1
    assert ledger.total == 8000
    del a
    assert ledger.total == 8000
    del view
    assert ledger.total == 4000
    del b
    assert ledger.total == 0 and ledger.peak.total == 8000


def test_resizing_is_followed(ledger):
    a = torch.empty(1000)
    a.untyped_storage().resize_(0)
    assert ledger.total == 0
    a.untyped_storage().resize_(8000)
    assert ledger.total == 8000
    del a
    assert ledger.total == 0


def test_kinds_phases_and_the_peak_of_each(ledger):
    with ledger.phase("one", "weights"):
        a = torch.empty(100)
        with ledger.allocating("activations"):
            b = torch.empty(50)
    with ledger.phase("two", "weights"):
        del b
        with ledger.allocating(HOST):
            c = torch.empty(10_000)  # not the device's
        ledger.mark([a], "gradients")
        ledger.workspace(100)
    assert ledger.peaks["one"].kinds == {"weights": 400, "activations": 200}
    assert ledger.peaks["two"].total == 600 and ledger.live["gradients"] == 400 and ledger.live["weights"] == 0
    assert ledger.peak.total == 600 and c.numel() and ledger.kind_of(a) == "gradients"


def test_blocks_of_512_bytes():
    with FakeTensorMode(), Ledger(H100) as ledger:
        a = torch.empty(129)  # 516 bytes
        assert ledger.total == 1024 and a.numel()


def test_what_the_backward_pass_needs_is_live_until_it_ran(ledger):
    w = torch.empty(10, 10, requires_grad=True)
    y = (torch.empty(100, 10) @ w).exp()
    held = ledger.total
    assert held == 4 * (100 + 1000 + 1000)  # w, x, exp(x w); the product is not kept
    y.sum().backward()
    del y
    assert ledger.total == 4 * 200  # w and its gradient


def test_costs_are_those_of_the_formulas(ledger):
    a, b = torch.empty(64, 32, dtype=torch.bfloat16), torch.empty(32, 16, dtype=torch.bfloat16)
    with ledger.phase("product", ""):
        a @ b
    cost = ledger.costs["product"]
    assert cost.flops == 2 * 64 * 32 * 16 and cost.moved == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert cost.computing == H100.launch  # too small for anything else
    big = torch.empty(8192, 8192, dtype=torch.bfloat16)
    with ledger.phase("big", ""):
        big @ big
    assert ledger.costs["big"].seconds == pytest.approx(2 * 8192**3 / (0.8 * 989e12))
    with ledger.phase("sum", ""):
        big + big
    assert ledger.costs["sum"].seconds == pytest.approx(3 * 2 * 8192**2 / (0.9 * 3.35e12))


def test_attention_keeps_what_a_flash_kernel_keeps(ledger):
    q = torch.empty(100, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.empty(100, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    before = ledger.total
    out, _ = flash_attention(q, k, v, 1e6, 0)
    assert ledger.total - before == 2 * 100 * 8 * 16 + 4 * 8 * 100
    out.sum().backward()
    assert ledger.costs["start"].flops == pytest.approx(3.5e6)
    assert visible_pairs((3, 2)) == 6 + 3
    assert visible_pairs((5,), 2) == sum(min(i + 1, 2) for i in range(5))


def test_collectives_by_the_slower_link():
    assert H100.collective(1e9, 1, 8) == 0
    assert H100.collective(1e9, 8, 8) == pytest.approx(1e9 * 7 / 8 / (0.75 * 450e9), rel=1e-2)
    assert H100.collective(1e9, 16, 8) == pytest.approx(
        max(1e9 * 7 / 8 / (0.75 * 450e9), 1e9 / 2 / (0.75 * 400e9)), rel=1e-2
    )


# --- plans ------------------------------------------------------------------------------------------------------------

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
}


def planned(stage: str, config: Path, *flags, **named) -> plans.Plan:
    """A plan in this process, which must not have a process group yet."""
    argv = [*map(str, flags), *words({"architecture": config, "gpus": 1} | named)]
    resolved, lm_config, value_config = plans.resolve(stage, parse(plans.STAGES[stage][1], argv))
    return plans.make(stage, resolved, lm_config, value_config, device(resolved.gpu, resolved.gpus))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("architecture") / "config.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def no_group():
    """A rehearsal makes a process group of its own; other modules start theirs anew."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_weights_and_optimizer_halve_from_one_rank_to_two(tiny):
    one, two = (planned("sft", tiny, gpus=n, batch_size=8, max_seq_length=128, gradient_sync="every") for n in (1, 2))
    numbers = one.seen.parameters
    assert one.seen.steady["weights"] == pytest.approx(4 * numbers, rel=0.01)
    assert one.seen.steady["optimizer"] == pytest.approx(8 * numbers, rel=0.02)
    for kind in ("weights", "optimizer"):
        assert two.seen.steady[kind] == pytest.approx(one.seen.steady[kind] / 2, rel=0.02)
    assert two.seen.micro_batch.communicating > one.seen.micro_batch.communicating


def test_the_optimizers_state_is_there_from_the_start(tiny):
    """So the peak of one step is that of all: the backward pass has both moments beside it."""
    seen = planned("sft", tiny, batch_size=8, max_seq_length=128, gradient_sync="every").seen
    assert seen.peaks["backward"].kinds["optimizer"] == pytest.approx(8 * seen.parameters, rel=0.02)


def test_gathered_weights_are_beside_those_that_a_rank_holds(tiny):
    """In bfloat16, of a layer and the root at most; the masters stay what they are between two steps."""
    seen = planned("sft", tiny, gpus=2, batch_size=8, max_seq_length=128, gradient_sync="every").seen
    for phase in ("forward", "backward"):
        kinds = seen.peaks[phase].kinds
        assert kinds["weights"] == seen.steady["weights"] and 0 < kinds["gathered weights"] < 2 * seen.parameters


def test_what_dtensors_ask_of_their_shapes_is_not_allocated(tmp_path):
    """Of a shape that no other test has, since torch asks once: an update makes nothing whole."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"hidden_size": 96}), encoding="utf-8")
    config = tmp_path / "config.json"
    seen = planned("sft", config, gpus=2, batch_size=8, max_seq_length=128, gradient_sync="every").seen
    held = seen.steady["weights"] + seen.steady["optimizer"] + 4 * seen.parameters / 2
    assert seen.peaks["optimizer"].total == pytest.approx(held, rel=0.05)


@pytest.mark.drill
def test_every_knob_does_to_memory_what_it_says(tiny):
    flags = {"batch_size": 64, "max_seq_length": 256, "micro_batch_tokens": 4096}
    changes = (
        {},
        {"micro_batch_tokens": 2048},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": "full"},
        {"activation_offload": True},
    )
    base, *others = (planned("sft", tiny, **(flags | changed)).seen for changed in changes)
    for changed, other in zip(changes[1:], others, strict=True):
        assert other.peak.kinds["activations"] < 0.7 * base.peak.kinds["activations"], changed
    assert 1.1 < others[2].micro_batch.flops / base.micro_batch.flops < 1.35
    adapted = planned("sft", tiny, **flags, use_lora=True, lora_rank=2).seen
    assert adapted.trained < adapted.parameters / 10 and adapted.steady["weights"] < 0.7 * base.steady["weights"]


def test_a_known_model_of_the_table():
    lm_config = plans.load_architecture(None, "allenai/Llama-3.1-Tulu-3-8B-SFT", "")
    assert (lm_config.vocab_size, lm_config.num_hidden_layers) == (128264, 32)
    known = json.loads((plans.ARCHITECTURES / "names.json").read_text())
    assert all(plans.load_architecture(None, name, "").num_hidden_layers for name in known)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["sfft"], "did you mean sft"),
        (["sft", "--gpu", "h100-90gb"], "did you mean h100-80gb"),
        (["sft", "--model_name_or_path", "meta-llama/Llama-3.1-9B"], "did you mean meta-llama/Llama-3.1-8B"),
        (["sft", "--architecture", "nowhere.json"], "nowhere.json: no such file"),
        (["dpo", "--gpuss", "2"], "did you mean gpus"),
        (["sft", "--nodes", "0"], "--nodes must be greater than 0"),
        (["sft", "--trained_share", "2"], "--trained_share"),
        (["ppo", "--response_length", "4096"], "leaves no room"),
        (["grpo", "--response_length", "4096"], "leaves no room"),
        (["grpo", "--num_samples_per_prompt", "1"], "needs at least 2"),
        (["grpo", "--kl_coef", "0.1", "--kl_estimator", "k1"], "no gradient"),
    ],
)
def test_what_cannot_be_planned_is_one_line(argv, message, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        plan([*argv, "--cache_dir", str(tmp_path)] if len(argv) > 1 else argv)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup", "unshard"),
        ("torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup", "post_backward"),
        ("torch.distributed.fsdp._fully_shard._fsdp_param_group", "FSDPParamGroup"),
        ("torch.distributed.tensor._sharding_prop.ShardingPropagator", "_propagate_tensor_meta_non_cached"),
        ("torch.distributed.tensor._sharding_prop", "ShardingPropagator"),
    ],
)
def test_a_torch_that_is_not_known_is_named_and_nothing_is_planned(owner, name, tiny, monkeypatch, capsys):
    """A plan without what hangs on a foreign name would be wrong by gigabytes, in silence."""
    monkeypatch.delattr(f"{owner}.{name}")
    with pytest.raises(UserError, match=rf"^launch\.plan does not know torch {re.escape(version('torch'))}: .*{name}$"):
        plan(["sft", *words({"architecture": tiny, "gpus": 1, "batch_size": 8, "max_seq_length": 128})])
    assert not capsys.readouterr().out


def test_foreign_names_are_as_they_were_afterwards(tiny):
    """Also one that a class inherits: what was planned leaves no trace in this process."""
    before = {name: vars(owner).get(name) for owner, name in FOREIGN}
    planned("sft", tiny, batch_size=8, max_seq_length=128)
    assert {name: vars(owner).get(name) for owner, name in FOREIGN} == before


def test_a_misfit_gets_a_change_that_fits(tiny, monkeypatch, tmp_path, capsys):
    flags = {"batch_size": 16, "max_seq_length": 256, "micro_batch_tokens": 1024, "gradient_checkpointing": "selective"}
    peak = planned("sft", tiny, **flags).seen.peak.total
    monkeypatch.setitem(DEVICES, "h100-80gb", dataclasses.replace(H100, memory=round(0.9 * peak), reserved=0))
    plan(["sft", *words({"architecture": tiny, "json": tmp_path / "plan.json", "gpus": 1} | flags)])
    found = json.loads((tmp_path / "plan.json").read_text())
    assert not found["fits"] and found["then"]["fits"] and found["then"]["needed"] <= 0.9 * peak
    assert f"it fits with --{next(iter(found['fits_with']))}" in capsys.readouterr().out


# of the whole, each
SIZES = {"micro_batch_tokens": 0.7, "gradient_checkpointing": 0.5, "optimizer": 0.6, "use_lora": 0.3, "nodes": 0.5}


@pytest.mark.parametrize(
    "memory, expected",
    [
        (0.75, {"micro_batch_tokens": 4096}),  # faster than recomputation
        (0.55, {"gradient_checkpointing": "selective"}),
        (
            0.4,
            {"micro_batch_tokens": 4096, "gradient_checkpointing": "selective"},
        ),  # both before what changes the result
        (0.29, {"micro_batch_tokens": 4096, "gradient_checkpointing": "selective", "optimizer": "adamw_8bit"}),
        (0.1, {"gradient_checkpointing": "selective", "optimizer": "adamw_8bit", "use_lora": True}),
        (
            0.04,
            {
                "nodes": 128,
                "micro_batch_tokens": 4096,
                "gradient_checkpointing": "selective",
                "optimizer": "adamw_8bit",
                "use_lora": True,
            },
        ),
        (0.01, None),
    ],
)
def test_the_search_takes_the_cheapest(memory, expected, monkeypatch):
    """Over sizes that are made up: what each flag leaves of the memory, times one another."""
    base = parse(plans.SftPlan, words({"batch_size": 64, "gpus": 8, "nodes": 64}))

    def invented(stage, config, lm_config, value_config, device):
        changed = [name for name in SIZES if getattr(config, name) != getattr(base, name)]
        size = math.prod(SIZES[name] for name in changed)
        slower = 2 if "gradient_checkpointing" in changed else 1.1 if changed else 1
        return SimpleNamespace(
            stage=stage,
            config=config,
            device=device,
            ranks=8,
            fits=size <= device.memory,
            needed=size,
            seconds=slower,
            tokens=1,
            seen=SimpleNamespace(gradient_sync=("every", ""), peaks={"all": SimpleNamespace(total=size)}),
        )

    monkeypatch.setattr(search, "make", invented)
    small = dataclasses.replace(H100, memory=memory, reserved=0)
    lm_config = SimpleNamespace(num_hidden_layers=4)
    change, other = search.suggest(invented("sft", base, None, None, small), lm_config, None)
    if expected is None:
        assert change is None and other is None
    else:
        assert change == expected and other.fits


def test_the_plan_is_what_the_allocator_sees(tmp_path):
    """Two steps through the real stage, measured from before the loading to after the export (two ranks:
    benchmarks/plan.py).
    """
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    }
    source, data = made(tmp_path, sizes)
    flags = COMMON | {
        "max_seq_length": 128,
        "micro_batch_tokens": 512,
        "gradient_sync": "every",
        "model_name_or_path": source,
        "dataset_name": data["sft"],
        "cache_dir": tmp_path / "cache",
        "sample_tokens": 0,
        "output_dir": tmp_path / "run",
    }
    p = planned("sft", source / "config.json", **flags, gpu="cpu")
    assert p.seen.peak.total == pytest.approx(measured("sft", 1, flags, tmp_path), rel=0.1)


def test_dry_run_prints_the_plan_of_this_world(tmp_path):
    result = launch(
        ["--dry_run", "--cache_dir", tmp_path, "--output_dir", tmp_path / "run"], 2, "launch.dpo", tmp_path / "log"
    )
    assert result.ok, result.output
    assert "plan: dpo of LlamaForCausalLM, 158,016 parameters" in result.output and "on 2 x cpu" in result.output
    assert "it fits" in result.output and "[[" in result.output and not (tmp_path / "run").exists()
