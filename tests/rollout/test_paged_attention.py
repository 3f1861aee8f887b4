"""Attention over pages: the definition against scalar loops, the Triton kernels and flash-attention's call against the
definition.

The kernels run on a CPU under Triton's interpreter, which must be chosen before triton is imported, and triton may be
in this process already: their properties run in a process of their own (this file as a script), once for all.

What no response sees is NaN in every pool here, and what a table says of it is a random number.

A responses · N query heads · K key/value heads · G = N / K · P pages of the pool · B tokens of a page · J pages of a
table's row · L = J B positions · H head size · Hv head size of the values.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.errors import UserError
from rollout.kernels import eager, flash_paged, paged, paged_attention
from tests.oracles import attention

HEAD_SIZES = (64, 80, 96, 128, 256)
PAGES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Case:
    """A problem: its inputs are drawn from the seed."""

    positions: tuple[int, ...]
    K: int = 1
    G: int = 1
    H: int = 64
    Hv: int | None = None
    B: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    shared: bool = False  # every response has the first page of the first one
    room: int = 0  # pages of the table that no response has come to
    turned: bool = False  # the query is a view, as decoders hand it over
    seed: int = 0
    device: str = "cpu"

    def make(self) -> tuple[list[Tensor], dict]:
        """(query, keys, values, tables, positions), and the other arguments."""
        rng = torch.Generator().manual_seed(self.seed)
        A, N, B = len(self.positions), self.K * self.G, self.B
        J = max(self.positions) // B + 1 + self.room
        P = A * J + 3
        tables_AJ = (torch.randperm(P - 1, generator=rng)[: A * J] + 1).view(A, J)
        if self.shared:
            tables_AJ[:, 0] = tables_AJ[0, 0]
        s_L, p_A1 = torch.arange(J * B), torch.tensor(self.positions)[:, None]
        visible_AL = (s_L <= p_A1) & (s_L > p_A1 - (self.window or J * B))
        seen_PB = torch.zeros(P, B, dtype=torch.bool)
        for a in range(A):
            seen_PB[tables_AJ[a].repeat_interleave(B)[visible_AL[a]], (s_L % B)[visible_AL[a]]] = True
        pools = [torch.randn(P, self.K, B, H, generator=rng) for H in (self.H, self.Hv or self.H)]
        pools = [pool.masked_fill(~seen_PB[:, None, :, None], float("nan")).to(self.dtype) for pool in pools]
        unseen_AJ = ~visible_AL.view(A, J, B).any(-1)
        tables_AJ[unseen_AJ] = torch.randint(0, 2**31 - 1, (int(unseen_AJ.sum()),), generator=rng)
        shape = (N, A, self.H) if self.turned else (A, N, self.H)
        q_ANH = (2 * torch.randn(shape, generator=rng)).to(self.dtype)
        q_ANH = q_ANH.transpose(0, 1) if self.turned else q_ANH
        sinks_N = torch.randn(N, generator=rng).to(self.dtype) if self.sinks else None
        how = {"scale": self.H**-0.5, "window": self.window, "softcap": self.softcap, "sinks_N": sinks_N}
        tensors = [q_ANH, *pools, tables_AJ.int(), p_A1[:, 0]]
        return [x.to(self.device) for x in tensors], how | ({"sinks_N": sinks_N.to(self.device)} if self.sinks else {})


def exact(tensors: list[Tensor], how: dict) -> Tensor:
    """The definition in float64."""
    return eager.paged_attention(*(x.double() for x in tensors[:3]), *tensors[3:], **how)


def allowed(case: Case, tensors: list[Tensor], how: dict) -> Tensor:
    """The largest error that the roundings of a kernel explain, (A, N, H): twice the definition's own in float32, and
    relative to the average of |v|, of which every rounding of a weight is a part: those of the exponentials and the
    soft-cap in float32, in the pools' dtype half an ulp of a weight and one of the output (the interpreter truncates).
    """
    q_ANH, keys_PKBH, values_PKBH, *others = tensors
    average_ANH = exact([q_ANH, keys_PKBH, values_PKBH.abs(), *others], how)
    naive = eager.paged_attention(*(x.float() for x in tensors[:3]), *others, **how) - exact(tensors, how)
    relative = torch.finfo(torch.float32).eps * (16 + 4 * (case.softcap or 0))
    relative += 0.0 if case.dtype == torch.float32 else 1.5 * torch.finfo(case.dtype).eps
    return 2 * naive.abs().max() + relative * average_ANH


def check(case: Case) -> None:
    """The kernels equal the definition."""
    tensors, how = case.make()
    got = paged.paged_attention(*tensors, **how, multiprocessors=132)
    assert got.dtype == case.dtype and got.shape == tensors[0].shape
    excess = (got.double() - exact(tensors, how)).abs() / allowed(case, tensors, how)
    assert excess.max() <= 1, excess.max()  # NaN is not


# --- the definition ---------------------------------------------------------------------------------------------------


@st.composite
def cases(draw, sizes=HEAD_SIZES, pages=PAGES, longest: int = 300, dtypes=(torch.float32,)) -> Case:
    K = draw(st.sampled_from((1, 2, 4)))
    G = draw(st.integers(1, 16))
    positions = draw(st.lists(st.integers(0, longest - 1), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(dtypes))
    values = {"window": st.integers(1, 2 * longest), "softcap": st.sampled_from((1.0, 5.0, 50.0))}
    options = {name: draw(st.none() | values[name]) for name in values}
    options |= {name: draw(st.booleans()) for name in ("sinks", "shared", "turned")}
    options |= {"room": draw(st.integers(0, 2)), "seed": draw(st.integers(0, 2**20))}
    return Case(
        tuple(positions), K, G, draw(st.sampled_from(sizes)), B=draw(st.sampled_from(pages)), dtype=dtype, **options
    )


@settings(deadline=None, max_examples=40)
@given(
    case=cases(sizes=(1, 4, 5), pages=(1, 4, 16), longest=24, dtypes=(torch.float64,)),
    values=st.sampled_from((1, 4, 7)),
)
def test_the_definition_equals_scalar_loops(case, values):
    case = replace(case, K=min(case.K, 2), G=min(case.G, 3), Hv=values)
    (q_ANH, keys_PKBH, values_PKBH, tables_AJ, positions_A), how = case.make()
    out_ANH = paged_attention(q_ANH, keys_PKBH, values_PKBH, tables_AJ, positions_A, **how)
    for a, p in enumerate(case.positions):
        first = max(0, p - case.window + 1) if case.window else 0
        places = [(int(tables_AJ[a, s // case.B]), s % case.B) for s in range(first, p + 1)]
        for n in range(case.K * case.G):
            k, v = (
                [pool[page, n // case.G, row].tolist() for page, row in places] for pool in (keys_PKBH, values_PKBH)
            )
            sink = how["sinks_N"][n].item() if case.sinks else None
            q = [q_ANH[a, n].tolist()] * len(places)
            wanted = attention(q, k, v, how["scale"], softcap=case.softcap, sink=sink)[-1]
            torch.testing.assert_close(out_ANH[a, n].tolist(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_definition_rounds_once(dtype):
    case = Case((70, 3), 2, 3, dtype=dtype, sinks=True)
    tensors, how = case.make()
    got = paged_attention(*tensors, **how)
    assert got.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double(), exact(tensors, how), rtol=1.01 * half, atol=1e-6)  # which is float32's


def test_the_operator_has_a_shape_without_numbers():
    tensors, how = Case((20, 3), 2, 3, Hv=32).make()
    torch.library.opcheck(
        torch.ops.triptych.paged_attention,
        (*tensors, *how.values(), 132),
        test_utils=("test_schema", "test_faketensor"),
    )
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in tensors]
        out_ANH = paged_attention(*fake, **how | {"sinks_N": None})
    assert out_ANH.shape == (2, 6, 32) and out_ANH.dtype == torch.float32


def test_no_responses_no_rows():
    tensors, how = Case((20,)).make()
    nothing = [tensors[0][:0], *tensors[1:3], tensors[3][:0], tensors[4][:0]]
    assert paged_attention(*nothing, **how).shape == (0, 1, 64)


# --- the kernels ------------------------------------------------------------------------------------------------------

PHASES = (Phase.explicit, Phase.generate)  # the interpreter is slow: a failure is not made smaller
FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def short_pieces() -> Iterator[None]:
    """At most 4, the shortest of 64 positions, instead of 32 of 256."""
    before = paged.PIECE, paged.PIECES
    try:
        paged.PIECE, paged.PIECES = 64, 4
        yield
    finally:
        paged.PIECE, paged.PIECES = before


@settings(deadline=None, max_examples=10, database=None, phases=PHASES)
@given(case=cases(dtypes=FLOATS))
@example(case=Case((4999,), H=64, B=32))  # 20 pieces
@example(case=Case((4999, 700), G=2, B=16, window=900, softcap=5.0, dtype=torch.bfloat16))
@example(case=Case((260,), 4, 16, 256, B=256, dtype=torch.float16, sinks=True))  # 64 heads
@example(case=Case((17, 0), 2, 19, 80, sinks=True, turned=True))  # more heads than a program takes
@example(case=Case((4, 9, 15, 31, 32, 255, 256, 257), 1, 3, 96, B=32, shared=True, room=9))
def kernels_equal_float64(case):
    check(case)


@settings(deadline=None, max_examples=4, database=None, phases=PHASES)
@given(case=cases(longest=400, pages=(16, 64, 256)), few=st.integers(1, 400))
def a_result_is_of_its_response_alone(case, few):
    """To the bit: alone, in a table as narrow as can be, on other pages, with another number of programs."""
    tensors, how = case.make()
    q_ANH, keys_PKBH, values_PKBH, tables_AJ, positions_A = tensors
    P, last = len(keys_PKBH), len(case.positions) - 1
    moved_P = torch.randperm(P, generator=torch.Generator().manual_seed(1)).to(case.device)
    elsewhere = [torch.empty_like(pool) for pool in (keys_PKBH, values_PKBH)]
    for there, here in zip(elsewhere, (keys_PKBH, values_PKBH), strict=True):
        there[moved_P] = here
    row_J = tables_AJ[last, : case.positions[last] // case.B + 1]
    row_J = torch.where(row_J < P, moved_P[row_J.clamp(max=P - 1)].int(), row_J)
    alone = [q_ANH[last:], *elsewhere, row_J[None], positions_A[last:]]
    with short_pieces():
        whole_ANH = paged.paged_attention(*tensors, **how, multiprocessors=132)
        assert torch.equal(paged.paged_attention(*alone, **how, multiprocessors=few)[0], whole_ANH[last])


def longer_pieces_where_there_would_be_too_many():
    """As for responses of more than 32 pieces of 256 positions."""
    with short_pieces():
        check(Case((255, 256, 511, 513), B=64))
        check(Case((300, 700), B=16, window=260))


INTERPRETED = [kernels_equal_float64, a_result_is_of_its_response_alone, longer_pieces_where_there_would_be_too_many]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What is wrong with the Triton kernels, by property, from one run of this file under the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    if "only 0-dimensional arrays can be converted" in done.stdout and "handle.data" in done.stdout:
        pytest.skip("the interpreter of this triton (3.6) needs numpy < 2.4")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [check.__name__ for check in INTERPRETED])
def test_under_the_interpreter(name, interpreted):
    assert not interpreted[name], interpreted[name]


def without_error(property) -> str:
    try:
        property()
    except Exception:
        return traceback.format_exc()[-3000:]
    return ""


@given(
    position=st.integers(0, 200_000),
    window=st.none() | st.integers(1, 100_000),
    beyond=st.integers(0, 9),
    B=st.sampled_from(PAGES),
    H=st.sampled_from(HEAD_SIZES),
)
def test_every_piece_of_a_response_has_a_place(position, window, beyond, B, H):
    """The pieces as the kernels cut them are no more than there is memory for, whatever the table's width."""
    pytest.importorskip("triton")
    room, tile = (position // B + 1 + beyond) * B, paged.tile(H, torch.bfloat16)
    start = max(0, position + 1 - window) // tile * tile if window else 0
    piece = paged.PIECE
    while piece * paged.PIECES < position + 1 - start:
        piece *= 2
    longest = paged.longest_of(room, window, tile)
    pieces, programs = paged.shares(3, 8, longest, 132)
    assert -(-(position + 1 - start) // piece) <= pieces <= paged.PIECES and 1 <= programs <= pieces


def test_what_the_kernels_take():
    pytest.importorskip("triton")
    q_ANH, keys_PKBH, values_PKBH, *_ = Case((20,), 2, 3).make()[0]
    assert paged.takes(q_ANH, keys_PKBH, values_PKBH)
    others = {
        "doubles": [x.double() for x in (q_ANH, keys_PKBH, values_PKBH)],
        "two dtypes": [q_ANH.bfloat16(), keys_PKBH, values_PKBH],
        "values of another size": [q_ANH, keys_PKBH, values_PKBH[..., :32].contiguous()],
        "a view of a pool": [q_ANH, keys_PKBH[:, :, ::2], values_PKBH[:, :, ::2]],
        "pages of 24": [q_ANH, *(torch.zeros(3, 2, 24, 64),) * 2],
        "pages of 8": [q_ANH, *(torch.zeros(3, 2, 8, 64),) * 2],
        "heads of 72": [torch.zeros(1, 6, 72), *(torch.zeros(3, 2, 16, 72),) * 2],
        "heads of 512": [torch.zeros(1, 6, 512), *(torch.zeros(3, 2, 16, 512),) * 2],
    }
    assert not [name for name, tensors in others.items() if paged.takes(*tensors)]


# --- flash-attention --------------------------------------------------------------------------------------------------


NAMES = "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad {table} softmax_scale"
NAMES += " causal window_size softcap rotary_interleaved num_splits return_softmax_lse"


def stand_in(table: str, calls: list[dict]):
    """A function that says it has flash-attention's arguments, and computes by them what that would."""

    def called(q_A1NH, k_PBKH, v_PBKH, **how) -> Tensor:
        called.__signature__.bind(q_A1NH, k_PBKH, v_PBKH, **how)
        calls.append(how)
        lengths_A, tables_AJ, (left, right) = how["cache_seqlens"], how[table], how.get("window_size", (-1, -1))
        assert q_A1NH.shape[1] == k_PBKH.stride(3) == v_PBKH.stride(3) == 1 and how["causal"]
        assert lengths_A.dtype == tables_AJ.dtype == torch.int32 and right == min(left, 0)
        rest = {"scale": how["softmax_scale"], "window": None if left < 0 else left + 1, "softcap": how.get("softcap")}
        pools = k_PBKH.transpose(1, 2), v_PBKH.transpose(1, 2)
        return paged_attention(q_A1NH[:, 0], *pools, tables_AJ, lengths_A.long() - 1, **rest)[:, None]

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = NAMES.format(table=table).split()
    called.__signature__ = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names])
    return called


@pytest.fixture
def flash(monkeypatch):
    """flash-attention 2 and 3, and what they were called with."""
    calls: list[dict] = []
    for package, table in (("flash_attn", "block_table"), ("flash_attn_interface", "page_table")):
        module = types.ModuleType(package)
        module.flash_attn_with_kvcache = stand_in(table, calls)
        monkeypatch.setitem(sys.modules, package, module)
    return calls


@pytest.mark.parametrize("backend, B", [("flash2", 256), ("flash2", 512), ("flash3", 16)])
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 5.0}], ids=str)
def test_flash_attention_is_told_the_same(backend, B, options, flash):
    tensors, how = Case((600, 40, 39), 2, 3, B=B, **options).make()
    torch.testing.assert_close(flash_paged(backend)(*tensors, **how), paged_attention(*tensors, **how))
    assert len(flash) == 1


def test_flash_attention_lacks_what_it_lacks(flash, monkeypatch):
    tensors, how = Case((20,), sinks=True).make()
    for backend, told in (("flash3", "no learnable_sink"), ("flash2", "multiples of 256 tokens, not of 16")):
        with pytest.raises(UserError, match=f"pages by {backend} .*{told}"):
            flash_paged(backend)(*tensors, **how)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match="flash2 needs the package flash_attn"):
        flash_paged("flash2")
    assert not flash


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({check.__name__: without_error(check) for check in INTERPRETED}))
