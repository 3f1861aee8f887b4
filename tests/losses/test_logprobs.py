"""Log-probs without logits, against float64 scalar loops; the tolerance is the naive method's own error."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import linear_logprobs, linear_loss, naive_logprobs, naive_loss
from losses.logprobs import LogitTransform, _spans_of_whole_groups
from tests import oracles

TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.125),
    LogitTransform(softcap=5.0),
    LogitTransform(scale=2.0, softcap=3.0),
]
SHAPES = [(1, 3, 2), (7, 5, 11), (65, 16, 257)]


def case(rows, hidden, vocab, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)
    return (
        h.to(dtype).requires_grad_(),
        w.to(dtype).requires_grad_(),
        torch.randint(0, vocab, (rows,), generator=generator),
    )


def truth(h, w, targets, transform):
    rows = [oracles.row_logits(x, w.tolist(), transform.scale, transform.softcap) for x in h.double().tolist()]
    pairs = [oracles.log_softmax_at(z, t) for z, t in zip(rows, targets.tolist(), strict=True)]
    return (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_against_scalar_loops(shape, transform, dtype):
    h, w, targets = case(*shape, dtype)
    logprobs, entropy = linear_logprobs(h, w, targets, entropy=True, transform=transform, chunk_rows=8)
    expected, expected_entropy = truth(h, w, targets, transform)
    naive_error = (naive_logprobs(h, w, targets, transform).double() - expected).abs().max()
    assert logprobs.dtype == torch.float32
    assert (logprobs.double() - expected).abs().max() <= 2 * naive_error + 1e-6
    assert (entropy.double() - expected_entropy).abs().max() <= 20 * naive_error + 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk_rows", [1, 3, 64])
def test_gradients_against_autograd_in_float64(transform, chunk_rows):
    """dL/dh and dL/dW of a loss in log-probs and entropies, through the formula written out under autograd in
    float64.
    """
    h, w, targets = case(7, 5, 11, torch.float64)
    coef = torch.linspace(-1, 2, 7, dtype=torch.float64)

    logprobs, entropy = linear_logprobs(h, w, targets, entropy=True, transform=transform, chunk_rows=chunk_rows)
    ours = torch.autograd.grad((coef * logprobs).sum() + (coef**2 * entropy).sum(), (h, w))

    z = transform.scale * h @ w.T
    z = z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)
    logp = z - z.exp().sum(1, keepdim=True).log()
    expected = torch.autograd.grad(
        (coef * logp[range(7), targets]).sum() + (coef**2 * -(logp.exp() * logp).sum(1)).sum(), (h, w)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    h, w, targets = case(5, 4, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, targets, entropy=True, chunk_rows=2), (h, w))


def pair_loss(logprobs, groups):
    """A loss that couples the rows of a group: the square of the group's sum (groups of the cuts below)."""
    cuts = torch.tensor([0, 3, 4, 10, 12])[groups.start : groups.stop + 1]
    sums = torch.stack([logprobs[a - cuts[0] : b - cuts[0]].sum() for a, b in itertools.pairwise(cuts)])
    return (sums**2).sum() + torch.log1p(-sums).sum()


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 100])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_linear_loss_equals_the_naive_loss(chunk_rows, transform):
    """Also where a group (6 rows) is longer than a chunk, and so goes in two passes."""
    h, w, targets = case(12, 5, 11, torch.float64)
    cuts = [0, 3, 4, 10, 12]
    ours = linear_loss(h, w, targets, pair_loss, cuts, transform, chunk_rows=chunk_rows)
    naive = naive_loss(h, w, targets, pair_loss, cuts, transform)
    torch.testing.assert_close(ours, naive, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad(3 * ours, (h, w)), torch.autograd.grad(3 * naive, (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_loss_is_no_worse_than_naive(dtype):
    h, w, targets = case(65, 16, 257, dtype)
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = torch.autograd.grad(naive_loss(h64, w64, targets, lambda lp, _: -lp.sum()), (h64, w64))
    naive = torch.autograd.grad(naive_loss(h, w, targets, lambda lp, _: -lp.sum()), (h, w))
    ours = torch.autograd.grad(linear_loss(h, w, targets, lambda lp, _: -lp.sum(), chunk_rows=16), (h, w))
    for a, b, e in zip(ours, naive, expected, strict=True):
        assert (a.double() - e).norm() <= 1.5 * (b.double() - e).norm() + 1e-6 * e.norm()


def test_the_weights_gradient_is_summed_in_fp32_over_many_chunks():
    """In bfloat16 a sum of 256 chunks would lose what is less than 1 / 256 of it; one rounding is left."""
    h, w, targets = case(1024, 8, 33, torch.bfloat16)
    h.data += 1  # so that the chunks' gradients add up
    truth = torch.autograd.grad(
        naive_loss(h.detach().double(), w64 := w.detach().double().requires_grad_(), targets, lambda lp, _: -lp.sum()),
        w64,
    )[0]
    (ours,) = torch.autograd.grad(linear_loss(h, w, targets, lambda lp, _: -lp.sum(), chunk_rows=4), w)
    assert (ours.double() - truth).norm() <= 4e-3 * truth.norm()


def test_only_what_needs_a_gradient_gets_one():
    h, w, targets = case(9, 4, 6)
    frozen = w.detach()
    linear_loss(h, frozen, targets, lambda lp, _: -lp.sum()).backward()
    assert h.grad is not None and frozen.grad is None
    with torch.no_grad():
        assert not linear_loss(h, w, targets, lambda lp, _: -lp.sum()).requires_grad


def test_no_rows_is_a_zero_loss_with_zero_gradients():
    h, w, _ = case(3, 4, 6)
    none = torch.zeros(0, dtype=torch.int64)
    loss = linear_loss(h[:0], w, none, lambda lp, _: -lp.sum())
    loss.backward()
    assert loss == 0 and w.grad.abs().max() == 0 and h.grad.abs().max() == 0


@pytest.mark.parametrize(
    "bad, said",
    [
        (lambda h, w, t: (h, w[:, :2], t), "do not fit"),
        (lambda h, w, t: (h, w, t.int()), "int64"),
        (lambda h, w, t: (h, w.double(), t), "one dtype"),
    ],
)
def test_wrong_arguments(bad, said):
    with pytest.raises(ValueError, match=said):
        linear_logprobs(*bad(*case(3, 4, 6)))


@given(st.lists(st.integers(1, 9), min_size=0, max_size=20), st.integers(1, 12))
@settings(deadline=None, max_examples=200)
def test_spans_hold_whole_groups(sizes, chunk_rows):
    cuts = [0]
    for size in sizes:
        cuts.append(cuts[-1] + size)
    spans = _spans_of_whole_groups(cuts, chunk_rows)
    assert [g for _, groups in spans for g in range(groups.start, groups.stop)] == list(range(len(sizes)))
    for rows, groups in spans:
        assert (rows.start, rows.stop) == (cuts[groups.start], cuts[groups.stop])
        assert rows.stop - rows.start <= chunk_rows or groups.stop - groups.start == 1
