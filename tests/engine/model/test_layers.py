"""Recomputation, offloading and compiled layers: what is kept, what runs again, what moves, what is traced, and the
same numbers.
"""

from __future__ import annotations

import collections
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from engine import world
from engine.data.batch import micro_batch
from engine.flags import MemoryFlags
from engine.model import build, layers, offload, sync
from engine.model.adapters.lora import Adapters
from tests import families, needs
from tests.families import save_family
from tests.ranks import launch

CPU, MODES = torch.device("cpu"), ("none", "selective", "full")
# products of more terms than layers.CHEAP
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def here():
    return world.start()


@pytest.fixture(scope="module")
def wide(tmp_path_factory, embedded_dir):
    return save_family(
        "llama", tmp_path_factory.mktemp("wide") / "model", embedded_dir.model, initializer_range=0.05, **WIDE
    )


def load(directory, here, adapters=None, **flags):
    """The policy with its layers as the flags have them."""
    policy = families.load(directory, here, adapters=adapters)
    layers.transform_layers(policy, MemoryFlags(**flags))
    return policy


def batch_of(*lengths, seed=0):
    g = np.random.Generator(np.random.Philox(key=seed))
    return micro_batch([(g.integers(0, 500, n + 1), np.ones(n + 1, bool)) for n in lengths], range(len(lengths)), CPU)


def loss_and_gradients(policy, batch):
    policy.zero_grad()
    loss = policy.loss(batch, lambda logprobs, _: -logprobs.sum())
    loss.backward()
    return loss.detach(), {name: p.grad.full_tensor() for name, p in policy.named_parameters() if p.grad is not None}


def assert_equal_bits(a, b):
    assert torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


class Watch(TorchDispatchMode):
    """Counts operators by name, and remembers every storage made."""

    def __init__(self):
        super().__init__()
        self.calls, self.made = collections.Counter(), {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.calls[op.name().split(".")[0]] += 1
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.made[x.untyped_storage()._cdata] = (
                    StorageWeakRef(x.untyped_storage()),
                    x.untyped_storage().nbytes(),
                )
        return out

    def alive(self):
        """Bytes of what was made and is still held, also where only autograd holds it."""
        return sum(size for ref, size in self.made.values() if not ref.expired())


def adapters_of(directory, **options):
    config = build.load_config(directory)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        from engine.model.adapters.lora import linears

        names = tuple(linears(AutoModelForCausalLM.from_config(config)))
    return Adapters(rank=4, alpha=8.0, rslora=False, modules=names, seed=1, **options)


# --- recomputation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["trained", "lora", pytest.param("nf4", marks=needs.bitsandbytes)])
def test_recomputation_changes_no_bit_and_holds_less(frozen, wide, here):
    """Also under adapters, whose frozen layers need no gradient, and in NF4, whose product is an autograd Function of
    its own.
    """
    batch, found, held = batch_of(90, 7, 31), {}, {}
    for mode in MODES:
        policy = load(
            wide,
            here,
            None if frozen == "trained" else adapters_of(wide, four_bit=frozen == "nf4"),
            gradient_checkpointing=mode,
        )
        found[mode] = loss_and_gradients(policy, batch)
        alive = []
        for lengths in ((90, 7, 31), (180, 14, 62)):
            with Watch() as watch:
                loss = policy.loss(batch_of(*lengths), lambda logprobs, _: -logprobs.sum())
                alive.append(watch.alive())
            loss.backward()
        held[mode] = alive[1] - alive[0]  # what grows with the tokens, not gathered weights
    for mode in MODES[1:]:
        assert_equal_bits(found["none"], found[mode])
    assert held["none"] > 1.3 * held["selective"] and held["selective"] > 1.3 * held["full"]


def test_selective_recomputation_repeats_neither_products_nor_attention(wide, here):
    calls = {}
    for mode in MODES:
        policy = load(wide, here, gradient_checkpointing=mode)
        loss = policy.loss(batch_of(90, 7, 31), lambda logprobs, _: -logprobs.sum())
        with Watch() as watch:
            loss.backward()
        calls[mode] = watch.calls
    layers_, sequences = WIDE["num_hidden_layers"], 3
    # all of a layer's 7 but the last
    assert calls["selective"]["aten::mm"] == calls["none"]["aten::mm"] == calls["full"]["aten::mm"] - 6 * layers_
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [calls[mode][attention] for mode in MODES] == [0, 0, layers_ * sequences]
    assert [calls[mode]["aten::rsqrt"] for mode in MODES] == [0, 2 * layers_, 2 * layers_]
    assert [calls[mode]["aten::silu"] for mode in MODES] == [0, layers_, layers_]


@needs.bitsandbytes
def test_products_of_few_terms_and_dequantisation_run_again(wide, here):
    """An adapter's product, whose result is as large as the layer's, is not kept beside it."""
    calls = {}
    for mode in MODES:
        policy = load(wide, here, adapters_of(wide, four_bit=True), gradient_checkpointing=mode)
        loss = policy.loss(batch_of(90), lambda logprobs, _: -logprobs.sum())
        with Watch() as watch:
            loss.backward()
        calls[mode] = watch.calls
    again = {
        name: calls["selective"][name] - calls["none"][name] for name in ("aten::addmm", "triptych::nf4_dequantise")
    }
    assert (
        again["triptych::nf4_dequantise"] >= 6 * WIDE["num_hidden_layers"]
        and again["aten::addmm"] >= 6 * WIDE["num_hidden_layers"]
    )
    assert calls["selective"]["aten::mm"] < calls["full"]["aten::mm"]


# --- offloading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """Every load that sets out, and all tensors count as large."""
    made, original = [], offload.SavedTensors.__init__
    monkeypatch.setattr(offload, "SMALL", 1)
    monkeypatch.setattr(
        offload.SavedTensors, "__init__", lambda self, *args: (original(self, *args), made.append(weakref.ref(self)))[0]
    )
    return made


@pytest.mark.parametrize("mode", MODES)
def test_offloading_changes_no_bit_and_leaves_nothing_behind(mode, wide, here, loads):
    batches = [batch_of(90, 7, 31), batch_of(20, 64, seed=1)]
    plain, offloaded = (
        load(wide, here, gradient_checkpointing=mode, activation_offload=offload) for offload in (False, True)
    )
    gc.collect()
    gc.disable()  # pinned memory must not wait for the collector
    try:
        for batch in batches:
            assert_equal_bits(loss_and_gradients(plain, batch), loss_and_gradients(offloaded, batch))
        assert len(loads) == len(batches) * (WIDE["num_hidden_layers"] - 1) and not any(ref() for ref in loads)
    finally:
        gc.enable()
    with torch.no_grad():
        offloaded.logprobs(batches[0])
    assert len(loads) == len(batches) * (WIDE["num_hidden_layers"] - 1)


def test_with_full_recomputation_the_inputs_of_layers_are_all_that_moves(wide, here, loads):
    batch = batch_of(90, 7, 31)
    policy = load(wide, here, gradient_checkpointing="full", activation_offload=True)
    loss = policy.loss(batch, lambda logprobs, _: -logprobs.sum())
    assert [[tuple(x.shape) for x in ref().host] for ref in loads] == [[(1, 128, WIDE["hidden_size"])]] * 2
    loss.backward()


def test_neither_weights_nor_shared_tables_move_and_nothing_moves_twice(wide, here, loads):
    policy = load(wide, here, activation_offload=True)
    # 130 tokens, which is no width of the model
    loss = policy.loss(batch_of(90, 7, 33), lambda logprobs, _: -logprobs.sum())
    weights = {tuple(p.shape) for p in policy.parameters()} | {tuple(p.shape)[::-1] for p in policy.parameters()}
    for load_ in (ref() for ref in loads):
        assert not [x.shape for x in load_.host if tuple(x.shape) in weights]
        # cos and sin
        assert not [
            x.shape for x in load_.host if x.shape[-1] == WIDE["head_dim"] and x.numel() == 130 * WIDE["head_dim"]
        ]
        assert max(load_.uses) > 1  # the normalised input, of which q, k and v are made, travels once
        contents = [(x.shape, x.sum().item(), x.square().sum().item()) for x in load_.host if x.numel() > 1000]
        assert len(contents) == len(set(contents))
    loss.backward()


def test_a_graph_that_is_kept_comes_back_twice(loads):
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(3))
    root = SimpleNamespace(lm=SimpleNamespace(base_model=SimpleNamespace(layers=blocks)))
    offload.offload_layers(root, offload.CopyStream(CPU))
    x = torch.randn(5, 8, requires_grad=True)
    y = blocks[2](blocks[1](blocks[0](x)))
    assert [len(ref().host) for ref in loads] == [2, 2]
    once = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], once) and once.abs().sum() > 0


# --- compile ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch):
    """torch.compile up to the traced graphs of both passes, without the minute of code generation; counts from zero."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, **options, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def test_compiled_layers_have_no_breaks_and_are_compiled_once(wide, here, traced):
    """For whatever lengths come: first near a width of the model, then one token, many sequences, none; with and
    without gradients.
    """
    plain = load(wide, here)
    policy = load(wide, here, gradient_checkpointing="selective", activation_offload=True, compile=True)
    graphs = []
    for lengths in [(200, 40), (1,), (200, 3, 1, 1), (256,), (9,) * 70, (), (31, 77, 90)]:
        batch = batch_of(*lengths)
        (a, expected), (b, found) = (loss_and_gradients(p, batch) for p in (plain, policy))
        assert b.item() == pytest.approx(a.item(), rel=1e-5, abs=1e-6)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(policy.logprobs(batch), plain.logprobs(batch), rtol=1e-5, atol=1e-5)
        graphs.append(traced["stats"]["unique_graphs"])
    assert graphs == [2] * len(graphs) and not traced["graph_break"]


def test_the_lack_of_a_compiler_is_one_line(monkeypatch):
    from torch._inductor import cpp_builder, exc

    assert layers.why_not_compile(CPU) == ""

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "no C++ compiler" in layers.why_not_compile(CPU)
    cuda = SimpleNamespace(type="cuda")
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in layers.why_not_compile(cuda)
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(layers, "compiler", lambda *names: None)
    assert "no C compiler" in layers.why_not_compile(cuda)


def test_without_a_compiler_nothing_is_loaded(embedded_dir, tmp_path):
    result = launch(
        ["--compile", "true", "--output_dir", tmp_path / "run", "--cache_dir", tmp_path],
        1,
        "launch.sft",
        tmp_path / "log",
        "tests.faults:without_a_compiler",
    )
    assert not result.ok and "--compile: there is no C++ compiler" in result.output
    assert "Traceback" not in result.output and "policy:" not in result.output and not (tmp_path / "run").exists()


# --- which synchronisation fits ---------------------------------------------------------------------------------------


RANKS = SimpleNamespace(size=4, device=CPU, gather=lambda x: [x, 2 * x])


def chosen_on(policy, memory, models=1, ranks=RANKS):
    """By `auto`, where every rank has this memory."""
    world = SimpleNamespace(**vars(ranks), memory=memory)
    return sync.choose_gradient_sync("auto", policy, world, models)[0]


def test_the_synchronisation_that_fits_is_counted_from_what_is_gathered_and_trained(wide, here, monkeypatch):
    dense, chosen = load(wide, here), chosen_on
    numbers = dense.num_parameters
    # weights 4 bytes, gradients 4; shards of both and two moments, 16 / 4
    boundaries = {"keep": 2 * 4 * numbers + 4 * numbers, "last": 2 * 8 * numbers + 4 * numbers}
    for mode, smaller in (("keep", "every"), ("last", "keep")):
        assert chosen(dense, boundaries[mode] + 8) == mode and chosen(dense, boundaries[mode] - 8) == smaller
        assert (
            chosen(dense, 2 * boundaries[mode] + 16, models=2) == mode
            and chosen(dense, 2 * boundaries[mode] - 16, models=2) == smaller
        )
    dense.gathered_dtype = torch.bfloat16
    assert (
        chosen(dense, boundaries["keep"] - 4 * numbers + 8) == "keep"
        and chosen(dense, boundaries["keep"] - 4 * numbers - 8) == "every"
    )
    assert sync.choose_gradient_sync("auto", dense, here)[0] == "every" and sync.choose_gradient_sync(
        "keep", dense, RANKS
    ) == ("keep", "as asked")


@needs.bitsandbytes
def test_the_synchronisation_of_four_bits_is_counted_in_their_bytes(wide, here, monkeypatch):
    nf4, chosen = load(wide, here, adapters_of(wide, four_bit=True)), chosen_on
    held = sum(p.nbytes for p in nf4.parameters())
    needed = 2 * (held + 4 * nf4.num_trained) + (held + 12 * nf4.num_trained) // 4
    assert held < 3 * nf4.num_parameters and chosen(nf4, needed + 8) == "last" and chosen(nf4, needed - 8) == "keep"


def test_one_rank_keeps_its_cast_weights_on_a_gpu_where_they_fit(wide, here, monkeypatch):
    """FSDP would cast and copy all of them for every pass; on a CPU memory counts for more."""
    dense = load(wide, here)
    alone, fits = SimpleNamespace(size=1, device=CPU, gather=lambda x: [x]), (16 + 2 * 2) * dense.num_parameters
    dense.gathered_dtype = torch.bfloat16
    assert chosen_on(dense, 2 * fits, ranks=alone) == "every"
    monkeypatch.setattr(sync, "local", lambda p: SimpleNamespace(is_cuda=True))
    assert chosen_on(dense, fits + 8, ranks=alone) == "keep" and chosen_on(dense, fits - 8, ranks=alone) == "every"
