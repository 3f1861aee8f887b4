"""What only a CUDA device can show: attention backends, bf16 numerics, the Triton kernels as compiled, one rank under
nccl.

R rows that count · D hidden · V vocabulary · P pairs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from benchmarks import attention as packed
from benchmarks import loss as heads
from benchmarks.measure import Unavailable, relative_error
from engine.errors import UserError
from engine.model.attention import BACKENDS
from losses.kernels import eager, fused
from losses.logprobs import linear_logprobs, linear_loss, naive_logprobs
from rollout.kernels import paged, paged_attention
from tests.losses.test_kernels import CASES, difference
from tests.rollout.test_paged_attention import Case, a_result_is_of_its_response_alone, check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
LENGTHS = (5, 1, 130, 64, 257)


@pytest.mark.parametrize("window", (None, 8, 100))
@pytest.mark.parametrize("shape", ((4, 4, 64), (8, 2, 64), (8, 2, 128)), ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_backend_equals_attention_per_sequence(backend, shape, window):
    """Output and gradients in bf16: off float64 by no more than twice what the written-out formula is in bf16."""
    stream = packed.make_stream(LENGTHS, window, DEVICE)
    inputs = packed.make_inputs(stream, *shape, torch.bfloat16, DEVICE)
    try:
        errors = packed.errors(packed.CANDIDATES[backend], inputs, stream)
    except (Unavailable, UserError) as error:
        pytest.skip(str(error))
    allowed = packed.errors(packed.CANDIDATES["eager"], inputs, stream)
    assert all(errors[key] <= 2 * allowed[key] + 1e-3 for key in allowed), (errors, allowed)


@pytest.fixture(scope="module")
def problem():
    return heads.make_problem(1003, 512, 32003, torch.bfloat16, 0.3, 200, DEVICE)


def naive(kind: str):
    """The loss by autograd through all logits, upcast: the numerics of `transformers`."""

    def loss(p: heads.Problem) -> torch.Tensor:
        logp_RV = (p.hidden_RD @ p.weight_VD.T).float().log_softmax(-1)
        logprobs_R = logp_RV.gather(1, p.targets_R[:, None]).squeeze(1)
        if kind == "entropy":
            return heads.with_entropy(logprobs_R, -(logp_RV.exp() * logp_RV).sum(-1), p)
        return (
            heads.pairs(logprobs_R, p, slice(0, len(p.counts) // 2))
            if kind == "pairs"
            else heads.token_sum(logprobs_R, p)
        )

    return heads.Variant(loss, kind)


def test_logprobs_in_bf16_are_closer_to_float64_than_naive(problem):
    p = problem
    exact_R = naive_logprobs(p.hidden_RD.detach().double(), p.weight_VD.detach().double(), p.targets_R)
    with torch.no_grad():
        ours_R = linear_logprobs(p.hidden_RD, p.weight_VD, p.targets_R, chunk_rows=200)
        naive_R = naive_logprobs(p.hidden_RD, p.weight_VD, p.targets_R)
    assert relative_error(ours_R, exact_R) <= relative_error(naive_R, exact_R)


@pytest.mark.parametrize(
    "name", [name for name in heads.VARIANTS if name.startswith("linear_") and heads.VARIANTS[name].backward]
)
def test_gradients_in_bf16_are_as_close_to_float64_as_naive(name, problem):
    variant = heads.VARIANTS[name]
    ours, allowed = heads.errors(variant, problem), heads.errors(naive(variant.kind), problem)
    assert ours["loss"] <= max(allowed["loss"], 1e-4), (ours, allowed)
    assert all(ours[key] <= 1.25 * allowed[key] for key in ("hidden_grad", "weight_grad")), (ours, allowed)


def test_float64_stays_float64_on_the_device():
    p = heads.make_problem(37, 16, 501, torch.float64, 0.0, 10, DEVICE)
    errors = heads.errors(heads.VARIANTS["linear_logprobs entropy"], p) | heads.errors(heads.VARIANTS["linear_loss"], p)
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_kernels_equal_float64(case):
    if not fused.AVAILABLE:
        pytest.skip("triton is not installed")
    assert difference(fused, *case, device="cuda") < 1e-5


def test_triton_kernels_equal_eager_on_a_whole_vocabulary():
    if not fused.AVAILABLE:
        pytest.skip("triton is not installed")
    logits_CV = 4 * torch.randn(300, 128256, device=DEVICE)
    targets_C, (coef_C, entropy_coef_C) = (
        torch.randint(0, 128256, (300,), device=DEVICE),
        torch.randn(2, 300, device=DEVICE),
    )
    outputs = []
    for module in (fused, eager):
        work_CV = logits_CV.clone()
        lse_C, logprobs_C, entropy_C = module.logits_statistics(work_CV, targets_C, True)
        module.logits_gradient_(work_CV, lse_C, targets_C, coef_C, entropy_C, entropy_coef_C, None)
        outputs.append((lse_C, logprobs_C, entropy_C, work_CV))
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(*outputs, strict=True))


PAGED = [
    Case((4999, 0, 700), 2, 4, 128, B=16, dtype=torch.bfloat16, device="cuda"),
    Case((4999, 2000, 31), 2, 4, 128, B=256, window=900, softcap=5.0, sinks=True, dtype=torch.bfloat16, device="cuda"),
    Case((9000, 63), 4, 1, 64, B=64, dtype=torch.float16, shared=True, device="cuda"),
    Case((600, 63), 1, 23, 80, B=16, dtype=torch.bfloat16, turned=True, room=9, device="cuda"),
    Case((300, 3), 2, 16, 256, B=32, sinks=True, device="cuda"),
    Case((300, 3), 2, 3, 96, B=128, softcap=50.0, device="cuda"),
]


@pytest.mark.parametrize("case", PAGED, ids=str)
def test_attention_over_pages_equals_float64(case):
    if not paged.AVAILABLE:
        pytest.skip("triton is not installed")
    check(case)


def test_attention_over_pages_is_of_its_response_alone():
    if not paged.AVAILABLE:
        pytest.skip("triton is not installed")
    for case in PAGED[:3]:
        a_result_is_of_its_response_alone.hypothesis.inner_test(case, 7)


def test_attention_over_pages_in_a_graph():
    """Captured once, replayed for other places and pages."""
    first, second = (Case((p, 3), 2, 4, 128, B=16, dtype=torch.bfloat16, seed=p, device="cuda") for p in (790, 799))
    (tensors, how), (others, _) = first.make(), second.make()
    paged_attention(*tensors, **how)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_ANH = paged_attention(*tensors, **how)
    for there, here in zip(tensors, others, strict=True):
        there.copy_(here)
    graph.replay()
    assert torch.equal(out_ANH, paged_attention(*others, **how))


def test_loss_holds_one_chunk_of_logits():
    """T x V in fp32 would be 4 GiB here; the loss needs the chunk (fp32, and its gradient in bf16), gradients and
    copies of hidden.
    """
    p = heads.make_problem(8192, 256, 128256, torch.bfloat16, 0.0, 512, DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_loss(
        p.hidden_RD, p.weight_VD, p.targets_R, lambda logprobs_C, _: heads.token_sum(logprobs_C, p), chunk_rows=512
    )
    loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    chunk, weight, hidden = 512 * 128256 * 6, 128256 * 256, 8192 * 256
    assert extra <= 1.2 * (chunk + 10 * weight + 6 * hidden), f"{extra / 2**20:.0f} MiB"


def test_one_rank_under_nccl_trains_the_embedded_model(tmp_path, capsys):
    """launch.dpo in bf16 through the real entry point; it raises by itself where step 0 is not its own reference."""
    from engine.config import parse
    from launch.dpo import Config, train

    flags = {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache", "max_steps": 4}
    try:
        train(parse(Config, [word for name, value in flags.items() for word in (f"--{name}", str(value))]))
        assert dist.get_backend(dist.group.WORLD) == "nccl" or "nccl" in str(dist.get_backend_config())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert "step 0: margins" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and abs(losses[0] - math.log(2)) < 0.1
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("double", [False, True])
def test_four_bits_are_bitsandbytes_own(double):
    """On the device: codes, weights, the product and its gradient, in bf16."""
    bnb = pytest.importorskip("bitsandbytes").functional
    from tests.engine.model.test_nf4 import bits, layer_of

    torch.manual_seed(0)
    weight = torch.randn(192, 256, device=DEVICE, dtype=torch.bfloat16) * 0.1
    packed_, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    layer = layer_of(weight, double, DEVICE)
    dense = bnb.dequantize_4bit(packed_, state)
    assert torch.equal(bits(layer.codes).flatten(), packed_.flatten())
    x = torch.randn(64, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert relative_error(y, x.double() @ dense.double().T) < 2**-7
    assert relative_error(x.grad, torch.ones_like(y).double() @ dense.double()) < 2**-7


@pytest.mark.parametrize(
    "flags",
    [
        {"use_lora": "true"},
        {"use_lora": "true", "load_in_4bit": "true", "double_quant": "true", "gradient_checkpointing": "full"},
        {"optimizer": "adamw_8bit", "gradient_checkpointing": "selective"},
        {"gradient_checkpointing": "full", "activation_offload": "true"},
        {"use_lora": "true", "load_in_4bit": "true", "compile": "true"},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_a_small_model_learns_in_little_memory(flags, tmp_path):
    """launch.sft in bf16 on one GPU: the loss falls, also with adapters, 4 bits, 8-bit moments, recomputation,
    offloading.
    """
    if {"load_in_4bit", "optimizer"} & flags.keys():
        pytest.importorskip("bitsandbytes")
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    command = [
        sys.executable,
        "-m",
        "launch.sft",
        "--output_dir",
        tmp_path / "out",
        "--cache_dir",
        tmp_path / "cache",
        "--max_steps",
        "20",
        *words,
    ]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    losses = [
        row["loss"]
        for row in map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    ]
    enough = 0.97 if "use_lora" in flags else 0.8  # adapters on a random model, whose head is frozen, do not get far
    assert len(losses) == 20 and losses[-1] < enough * losses[0]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_step_waits_for_the_device_twice(stage, tmp_path):
    """By CUDA's own count of synchronising calls, between two rows of metrics: the step's metrics, then its gradient
    norm.
    """
    found = subprocess.run(
        [sys.executable, "-m", "tests.gpu_waits", stage, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-2000:]
    places = json.loads(found.stdout.splitlines()[-1])
    assert {place.partition(":")[0] for place in places} <= {"engine/log.py", "engine/train/optim.py"} and len(
        places
    ) == 2, places
