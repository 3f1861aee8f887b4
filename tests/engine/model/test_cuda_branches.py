"""The branches that only CUDA tensors take, on tensors that have a device and no numbers: shapes, dtypes, and that
every call has the arguments which this torch's operators have. Needs a CUDA build of torch, and no GPU (`make
test-oldest` has one).

R rows · C rows of a chunk · D hidden · V vocabulary · T tokens · N query heads · K key/value heads · H head size · A
slots.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import losses.kernels
from engine import log
from engine.model import attention_backends, attention_operator
from losses import logprobs
from losses.kernels import eager
from rollout import cache as caching
from rollout.choice import SamplingParams, choose
from rollout.sampler import Sampler

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch is a CPU build: it has no CUDA tensors, not even fake ones"
)
CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """Every tensor is fake; the Triton passes, which launch, are the eager ones, and torch 2.11's fake of an adding
    product is broken.
    """
    monkeypatch.setattr(losses.kernels, "_module", lambda logits_CV: eager)
    monkeypatch.setattr(torch, "addmm", add_as_the_operator_does)
    with FakeTensorMode() as mode:
        yield mode


def add_as_the_operator_does(total, a, b, *, out_dtype, out):
    """Bound to the operator's own schema, as it would be called."""
    schema = torch.ops.aten.addmm.dtype_out._schema
    assert [x.name for x in schema.arguments[:4]] == ["self", "mat1", "mat2", "out_dtype"] and schema.arguments[
        -1
    ].name == "out"
    assert out_dtype == out.dtype == total.dtype == torch.float32 and a.dtype == b.dtype != out_dtype
    return torch.mm(a, b, out_dtype=out_dtype, out=out)


def cuda(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=CUDA)


def is_like(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return x.device == CUDA and tuple(x.shape) == shape and x.dtype == dtype


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.5, 30.0)])
def test_the_heads_products_accumulate_in_fp32(dtype, scale, softcap):
    """logits, and their gradient into both accumulators: the calls with out_dtype exist, and no result is rounded on
    its way.
    """
    R, D, V = 11, 16, 96
    hidden_RD, weight_VD, targets_R = cuda(R, D, dtype=dtype), cuda(V, D, dtype=dtype), cuda(R, dtype=torch.int64)
    head = logprobs._Head(
        hidden_RD, weight_VD, targets_R, logprobs.LogitTransform(scale, softcap), 4, grads=(True, True)
    )
    for rows in logprobs._pieces(slice(0, R), 4):
        logits_CV = head.logits(rows)
        C = rows.stop - rows.start
        assert is_like(logits_CV, (C, V), torch.float32)
        lse_C, logprobs_C, entropy_C = losses.kernels.logits_statistics(logits_CV, targets_R[rows], True)
        head.accumulate(rows, logits_CV, lse_C, logprobs_C, entropy_C, logprobs_C)
    assert is_like(head.hidden_grad_RD, (R, D), dtype) and is_like(head.weight_grad_VD, (V, D), torch.float32)


def test_linear_logprobs_forward_and_its_backward_function():
    R, D, V = 11, 16, 96
    inputs = cuda(R, D), cuda(V, D), cuda(R, dtype=torch.int64)
    logprobs_R, entropy_R = logprobs.linear_logprobs(*inputs, entropy=True, chunk_rows=4)
    assert is_like(logprobs_R, (R,), torch.float32) and is_like(entropy_R, (R,), torch.float32)
    saved = (*inputs, logprobs_R, entropy_R)
    context = SimpleNamespace(saved_tensors=saved, options=(logprobs.IDENTITY, 4), needs_input_grad=(True, True))
    hidden_grad_RD, weight_grad_VD, *others = logprobs._LinearLogprobs.backward(context, logprobs_R, entropy_R)
    assert (
        is_like(hidden_grad_RD, (R, D), BF16)
        and is_like(weight_grad_VD, (V, D), BF16)
        and not any(x is not None for x in others)
    )


def test_the_head_of_a_whole_vocabulary_takes_its_gpu_chunk():
    assert logprobs.default_chunk_rows(cuda(128256, 8)) == 2**31 // (4 * 128256)
    assert is_like(logprobs.linear_argmax(cuda(5, 16), cuda(96, 16)), (5,), torch.int64)


# --- attention --------------------------------------------------------------------------------------------------------

STREAM = SimpleNamespace(lengths=(5, 9, 1), max_seqlen=9)


def stream(T: int = 15, N: int = 8, K: int = 2, H: int = 64) -> tuple[torch.Tensor, ...]:
    STREAM.cu_seqlens = torch.empty(4, dtype=torch.int32, device=CUDA)
    return cuda(T, N, H), cuda(T, K, H), cuda(T, K, H)


@pytest.mark.parametrize("window", [None, 8])
def test_varlen_takes_grouped_heads_as_they_are_forward_and_backward(window):
    """On this torch's own operator: keys are handed over once, and their gradient has their shape."""
    seen = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "varlen" in function.name():
                seen.append([tuple(x.shape) for x in args[:3]])
            return function(*args, **(kwargs or {}))

    q_TNH, k_TKH, v_TKH = stream()
    with Watching():
        out_TNH = attention_backends.varlen(
            q_TNH, k_TKH, v_TKH, STREAM, scale=0.1, window=window, softcap=None, sinks_N=None
        )
    assert seen == [[(15, 8, 64), (15, 2, 64), (15, 2, 64)]] and is_like(out_TNH, (15, 8, 64), BF16)
    operator = torch.ops.torch_attn._varlen_attn
    edges, lse_NT = [-1 if window is None else window - 1, 0], cuda(8, 15, dtype=torch.float32)
    cu_seqlens, seed = STREAM.cu_seqlens, torch.empty(2, dtype=torch.uint64, device=CUDA)
    assert {"scale", "window_size"} <= {argument.name for argument in operator.default._schema.arguments}
    grads = torch.ops.torch_attn._varlen_attn_backward(
        out_TNH, q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, cu_seqlens, cu_seqlens, 9, 9, window is None, seed, 0.1, edges
    )
    assert [tuple(x.shape) for x in grads] == [(15, 8, 64), (15, 2, 64), (15, 2, 64)]


@pytest.mark.parametrize("backend", ["flash4", "sdpa"])
def test_the_operator_and_its_backward_have_the_shapes_of_their_inputs(backend):
    q_TNH, k_TKH, v_TKH = stream()
    bounds = torch.empty(4, dtype=torch.int32)
    for sinks_N in (None, cuda(8)):
        out_TNH, lse = attention_operator.packed_attention(
            q_TNH, k_TKH, v_TKH, sinks_N, STREAM.cu_seqlens, bounds, backend, 0.1, 8, None
        )
        assert is_like(out_TNH, (15, 8, 64), BF16) and is_like(
            lse, (8, 15) if backend == "flash4" else (0,), torch.float32
        )
        grads = attention_operator.packed_attention_backward(
            out_TNH, q_TNH, k_TKH, v_TKH, out_TNH, lse, sinks_N, STREAM.cu_seqlens, bounds, backend, 0.1, 8, None
        )
        assert [tuple(x.shape) for x in grads] == [
            (15, 8, 64),
            (15, 2, 64),
            (15, 2, 64),
            (0,) if sinks_N is None else (8,),
        ]


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0), SamplingParams(temperature=0.7, top_k=20)], ids=str
)
def test_a_token_is_chosen_on_the_device(params):
    """Nothing is copied: the three results stay there, for the one wait of a token."""
    keys_A, positions_A = (torch.empty(6, dtype=torch.int64, device=CUDA) for _ in range(2))
    tokens_A, *logprobs_ = choose(cuda(6, 5003, dtype=torch.float32), params, keys_A, positions_A)
    assert is_like(tokens_A, (6,), torch.int64) and all(is_like(x, (6,), torch.float32) for x in logprobs_)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_samplers_logits_are_fp32(dtype):
    lm = SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=cuda(96, 16, dtype=dtype)))
    sampler = SimpleNamespace(lm=lm, transform=logprobs.IDENTITY)
    assert is_like(Sampler.logits(sampler, cuda(6, 16, dtype=dtype)), (6, 96), torch.float32)


def test_decoding_writes_and_reads_pages_on_the_device():
    layer = caching.Layer(8, 2, 64, 64, BF16)
    cache = caching.PagedCache({0: layer}, {8: 20}, 4, 64, 16)
    cache.allocate(CUDA)
    positions_A, tables_AJ = (torch.empty(3, *more, dtype=kind, device=CUDA) for more, kind in POSITIONS_AND_TABLES)
    one = caching.Decode.by_tables(cache, positions_A, {8: tables_AJ})
    one.write(0, cuda(3, 2, 64), cuda(3, 2, 64), 8)
    for softcap, sinks_N in ((None, None), (30.0, None), (None, cuda(8))):
        out = one.read(0, cuda(3, 8, 64), scale=0.1, window=8, softcap=softcap, sinks_N=sinks_N)
        assert is_like(out, (3, 8, 64), BF16)


POSITIONS_AND_TABLES = ((), torch.int64), ((4,), torch.int32)


# --- what a step sums -------------------------------------------------------------------------------------------------


def test_totals_hold_pythons_numbers_on_the_host():
    """A number that went to the device on its own would be a copy from pageable memory, which waits."""
    totals = log.Totals(SimpleNamespace(device=CUDA, sum=lambda x: x))
    totals.add({"loss": cuda(5, dtype=torch.float32), "tokens": 7})
    totals.add({"loss": cuda(5, dtype=torch.float32), "tokens": 7})
    assert totals.sums["tokens"] == 14.0 and isinstance(totals.sums["tokens"], float)
    assert is_like(totals.sums["loss"], (), torch.float64)
