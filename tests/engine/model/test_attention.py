"""Packed attention against scalar loops, one sequence at a time: windows, soft-caps, sinks, grouped queries."""

from __future__ import annotations

import sys

import pytest
import torch

from engine.data.packing import Packing
from engine.model import attention, attention_backends, attention_operator
from tests import oracles

LENGTHS = (1, 13, 4, 9)


def stream(heads=4, kv_heads=2, size=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return [
        torch.randn(1, n, total, size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def packed(backend, q, k, v, **options):
    function = attention._packed({"sdpa": attention_backends.sdpa, "eager": attention_backends.eager}[backend])
    out, _ = function(None, q, k, v, None, packing=Packing.of(LENGTHS, q.device), **options)
    return out[0]


def truth(q, k, v, scaling, sliding_window=None, softcap=None, s_aux=None):
    """(T, N, H) in float64."""
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[2], q.shape[1], q.shape[3], dtype=torch.float64)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        for n in range(q.shape[1]):
            one = (x[0, h, rows].double().tolist() for x, h in ((q, n), (k, n // groups), (v, n // groups)))
            sink = None if s_aux is None else float(s_aux[n])
            out[rows, n] = torch.tensor(
                oracles.attention(*one, scaling, sliding_window, softcap, sink), dtype=torch.float64
            )
        start += length
    return out


OPTIONS = [
    {"scaling": 0.3},
    {"scaling": 0.3, "sliding_window": 3},
    {"scaling": 0.3, "sliding_window": 8},
    {"scaling": 0.3, "sliding_window": 100},
    {"scaling": 2.0, "softcap": 1.5},
    {"scaling": 2.0, "softcap": 1.5, "sliding_window": 3},
    {"scaling": 0.3, "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_against_scalar_loop(backend, options, kv_heads):
    q, k, v = stream(kv_heads=kv_heads)
    torch.testing.assert_close(
        packed(backend, q, k, v, **options).double(), truth(q, k, v, **options), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_backends_have_the_same_gradients(options):
    gradients = []
    for backend in ("sdpa", "eager"):
        q, k, v = stream(dtype=torch.float64)
        gradients.append(torch.autograd.grad(packed(backend, q, k, v, **options).sin().sum(), (q, k, v)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_no_gradient_crosses_a_sequence(backend):
    q, k, v = stream()
    packed(backend, q, k, v, scaling=0.3)[1:14].sum().backward()  # the second sequence's outputs
    for x in (q, k, v):
        assert x.grad[0, :, 1:14].abs().sum() > 0
        assert x.grad[0, :, :1].abs().sum() == 0 and x.grad[0, :, 14:].abs().sum() == 0


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_operator_of_compiled_layers_is_the_same_function_with_the_same_gradients(backend, options, kv_heads):
    """Its backward pass is the derivative written out; the truth is autograd through the loop. Boundaries with empty
    sequences.
    """
    scaling, window, softcap, sinks = (options.get(name) for name in ("scaling", "sliding_window", "softcap", "s_aux"))
    found = []
    for operator in (False, True):
        q, k, v = (x.detach()[0].transpose(0, 1).requires_grad_() for x in stream(kv_heads=kv_heads))
        sinks_N = None if sinks is None else sinks.clone().requires_grad_()
        packing = Packing.of(LENGTHS, q.device)
        if operator:
            bounds = torch.cat([packing.bounds, packing.bounds[-1:].expand(3)])
            out, _ = attention_operator.packed_attention(
                q, k, v, sinks_N, bounds, bounds.clone(), backend, scaling, window, softcap
            )
        else:
            out = attention_backends.eager(
                q, k, v, packing, scale=scaling, window=window, softcap=softcap, sinks_N=sinks_N
            )
        found.append([out, *torch.autograd.grad(out.sin().sum(), [x for x in (q, k, v, sinks_N) if x is not None])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_operator_keeps_the_contract_of_operators():
    """Fake shapes, strides and dtypes, aliasing, where its derivative is registered, in bfloat16 as well."""
    for dtype, sinks in ((torch.float32, True), (torch.bfloat16, False)):
        q, k, v = (x.detach()[0].transpose(0, 1).requires_grad_() for x in stream(dtype=dtype))
        sinks_N = torch.zeros(4, dtype=dtype, requires_grad=True) if sinks else None
        packing = Packing.of(LENGTHS, q.device)
        arguments = (q, k, v, sinks_N, packing.cu_seqlens, packing.bounds, "sdpa", 0.3, 8, None)
        torch.library.opcheck(
            attention_operator.packed_attention,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_a_mask_or_dropout_is_refused():
    q, k, v = stream()
    with pytest.raises(ValueError, match="no mask and no dropout"):
        packed("sdpa", q, k, v, scaling=0.3, dropout=0.1)
    with pytest.raises(ValueError, match="a packing"):
        attention._packed(attention_backends.sdpa)(None, q, k, v, None)


def test_choice_of_backend():
    from transformers import Gemma2Config, LlamaConfig

    cpu, fp32 = torch.device("cpu"), torch.float32
    assert attention.choose_backend("auto", cpu, LlamaConfig(), fp32)[0] == "sdpa"
    backend, why = attention.choose_backend("auto", cpu, Gemma2Config(), fp32)
    assert backend == "eager" and "softcapping" in why
    assert attention.choose_backend("eager", cpu, LlamaConfig(), fp32) == ("eager", "as asked")
    with pytest.raises(attention.UserError, match="needs a CUDA device"):
        attention.choose_backend("flash2", cpu, LlamaConfig(), fp32)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A machine that says it has a Hopper GPU, and a directory for packages of flash-attention."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    attention._cannot_import.cache_clear()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]
    attention._cannot_import.cache_clear()
    attention_backends.flash4_kernels.cache_clear()


def install(directory, interface: str) -> None:
    package = directory / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (directory / "flash_attn" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .interface import *\n")
    (package / "interface.py").write_text(interface)


SIGNATURES = "".join(
    f"def {name}({', '.join(sorted(parameters))}): ...\n" for name, parameters in attention_backends.FLASH4.items()
)


@pytest.mark.parametrize(
    ("interface", "chosen", "said"),
    [
        (SIGNATURES, "flash4", ""),
        (
            "raise ImportError('libcute.so: cannot open shared object file')",
            "varlen",
            "flash4: the package flash_attn.cute is installed and cannot be used (ImportError: libcute.so",
        ),
        (
            SIGNATURES.replace("return_lse", "return_logsumexp"),
            "varlen",
            "another release: no return_lse in its interface",
        ),
        (
            SIGNATURES.replace("_flash_attn_bwd", "_backward"),
            "varlen",
            "another release: no _flash_attn_bwd in its interface",
        ),
    ],
    ids=["whole", "half installed", "other arguments", "other names"],
)
def test_a_package_that_is_there_and_does_not_work_is_named_and_passed_over(hopper, interface, chosen, said):
    """Seen on a GPU: a flash-attn-4 without one of its libraries was chosen, and every run ended in its traceback."""
    from transformers import LlamaConfig

    install(hopper, interface)
    backend, why = attention.choose_backend("auto", torch.device("cuda"), LlamaConfig(), torch.bfloat16)
    assert backend == chosen and said in why
    if chosen != "flash4":
        with pytest.raises(attention.UserError, match="installed and cannot be used"):
            attention.choose_backend("flash4", torch.device("cuda"), LlamaConfig(), torch.bfloat16)


def test_varlen_is_told_of_grouped_heads_and_gets_them_unrepeated(monkeypatch):
    """Keys and values go to torch's kernel as they are, views of the projection's output: repeating them costs four
    times their memory.
    """
    from torch.nn.attention import varlen

    seen = []

    def recorded(q, k, v, *_, scale, window_size, **options):
        seen.append((k, v, window_size, options))
        return q

    for with_argument in (False, True):
        attention_backends._varlen_options.cache_clear()
        stand_in = (
            recorded
            if not with_argument
            else lambda q, k, v, *_, scale, window_size, enable_gqa=False: recorded(
                q, k, v, scale=scale, window_size=window_size, enable_gqa=enable_gqa
            )
        )
        monkeypatch.setattr(varlen, "varlen_attn", stand_in)
        q, k, v = stream(kv_heads=2)
        attention.packed("varlen")(
            None, q, k, v, None, packing=Packing.of(LENGTHS, q.device), scaling=0.3, sliding_window=8
        )
        kept_k, kept_v, window, options = seen.pop()
        assert (
            kept_k.shape[1] == kept_v.shape[1] == 2
            and kept_k.data_ptr() == k.data_ptr()
            and kept_v.data_ptr() == v.data_ptr()
        )
        assert window == (7, 0) and options == ({"enable_gqa": True} if with_argument else {})
    attention_backends._varlen_options.cache_clear()
