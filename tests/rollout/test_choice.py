"""The noise and the choice of tokens, against scalar oracles and statistics."""

from __future__ import annotations

import math

import pytest
import torch

from rollout import SamplingParams, choice
from rollout.choice import block_size, choose
from rollout.noise import gumbel, response_key


def keys(count: int, seed=0) -> torch.Tensor:
    return torch.tensor([response_key(seed, 0, example, 0) for example in range(count)])


def test_noise_is_standard_gumbel_and_independent():
    """Mean (Euler's constant), variance (pi^2 / 6), and correlations over positions, indices and responses, to five
    sigma.
    """
    n = 400
    noise = torch.stack([gumbel(keys(n), torch.full((n,), t), torch.arange(500)) for t in range(2)])  # (2, n, 500)
    count = noise.numel()
    variance = math.pi**2 / 6
    assert abs(noise.mean().item() - 0.5772156649) < 5 * math.sqrt(variance / count)
    # the kurtosis of a Gumbel is 5.4
    assert abs(noise.var().item() - variance) < 5 * math.sqrt(4.4 * variance**2 / count)
    unit = (noise - 0.5772156649) / math.sqrt(variance)
    for a, b in ((unit[0], unit[1]), (unit[:, :, 1:], unit[:, :, :-1]), (unit[:, 1:], unit[:, :-1])):
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
    uniform = torch.exp(-torch.exp(-noise)).flatten()
    counts = torch.histc(uniform.float(), 64, 0, 1).double()
    assert ((counts - count / 64) ** 2 / (count / 64)).sum() < 63 + 5 * math.sqrt(2 * 63)


def test_noise_is_a_function_of_its_name():
    """Rows, order and shape of the call do not matter; the first values are fixed for ever."""
    k, t, i = keys(4), torch.tensor([0, 1, 2, 3]), torch.arange(-3, 7)
    whole = gumbel(k, t, i)
    assert torch.equal(gumbel(k[2:3], t[2:3], i[4:6]), whole[2:3, 4:6])
    assert torch.equal(gumbel(k.flip(0), t.flip(0), i), whole.flip(0))
    assert (
        len({response_key(*name) for name in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))})
        == 5
    )
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    for row in range(4):
        stream = mix(int(k[row]) + (int(t[row]) + 1) * 0x9E3779B97F4A7C15 & mask)
        for column, index in enumerate(i.tolist()):
            u = ((mix(stream + (index + 1) * 0x9E3779B97F4A7C15 & mask) >> 11) + 0.5) / 2**53
            assert math.isclose(whole[row, column].item(), -math.log(-math.log(u)), rel_tol=1e-12)


@pytest.mark.parametrize(("temperature", "vocab"), [(1.0, 37), (0.6, 16), (1.7, 5)])
def test_tokens_follow_the_softmax(temperature, vocab):
    """Chi-square over 40000 responses, and over 40000 positions of one; blocks whole and short."""
    z = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    n = 40000
    params = SamplingParams(temperature=temperature)
    for k, t in ((keys(n), torch.zeros(n, dtype=torch.int64)), (keys(1).expand(n), torch.arange(n))):
        tokens, logprobs, _ = choose(z.expand(n, -1).clone(), params, k, t)
        p = (z.double() / temperature).softmax(0)
        counts = torch.bincount(tokens, minlength=vocab).double()
        chi = ((counts - n * p) ** 2 / (n * p)).sum().item()
        assert chi < vocab - 1 + 5 * math.sqrt(2 * (vocab - 1)) + 5
        torch.testing.assert_close(logprobs, p.log()[tokens].float(), atol=1e-5, rtol=1e-5)


def test_blocks_have_noise_of_their_own():
    """The noise of block b is not that of token b: by hand, over a vocabulary of 3 whole blocks and a short one."""
    z_AV = torch.randn(500, 14, generator=torch.Generator().manual_seed(5)).double()
    positions = torch.zeros(500, dtype=torch.int64)
    tokens, _, _ = choose(z_AV, SamplingParams(), keys(500), positions)
    noise_B, noise_V = (gumbel(keys(500), positions, i) for i in (torch.tensor([-1, -2, -3, -4]), torch.arange(14)))
    for row in range(500):
        sums = [z_AV[row, 4 * b : 4 * b + 4].logsumexp(0) + noise_B[row, b] for b in range(4)]
        b = max(range(4), key=lambda b: sums[b])
        assert tokens[row] == max(range(4 * b, min(14, 4 * b + 4)), key=lambda v: z_AV[row, v] + noise_V[row, v])


def test_greedy_log_probs():
    """Greedy draws from a point mass; the model's own log-prob is reported beside it."""
    z_AV = torch.randn(20, 37, generator=torch.Generator().manual_seed(6)) * 3
    params, positions = SamplingParams(temperature=0), torch.zeros(20, dtype=torch.int64)
    tokens, logprobs, logprobs_t1 = choose(z_AV, params, keys(20), positions)
    assert torch.equal(tokens, z_AV.argmax(1)) and not logprobs.any()
    torch.testing.assert_close(logprobs_t1.double(), z_AV.double().log_softmax(1).amax(1), rtol=1e-6, atol=1e-6)


def oracle(z: list[float], params: SamplingParams) -> dict[int, float]:
    """The sampling distribution by hand: {token: probability}."""
    x = [v / params.temperature for v in z]
    order = sorted(range(len(x)), key=lambda v: -x[v])
    kept = order[: params.top_k] if params.top_k else order
    weights = [math.exp(x[v] - x[order[0]]) for v in kept]
    probs, mass, chosen = [w / math.fsum(weights) for w in weights], 0.0, []
    for v, p in zip(kept, probs, strict=True):
        if mass >= params.top_p and chosen:
            break
        chosen.append((v, p))
        mass += p
    return {v: p / math.fsum(q for _, q in chosen) for v, p in chosen}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, 5, 1), (1, 0, 0.8), (0.5, 7, 0.6), (1.5, 100, 0.95), (1, 1, 1), (1, 0, 1e-6), (2, 0, 1)],
)
def test_filters_against_a_scalar_oracle(temperature, top_k, top_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    z_RV = torch.randn(40, 83, generator=torch.Generator().manual_seed(1)) * 3
    repeats = 64
    keys_A, rows = keys(40 * repeats), torch.arange(40).repeat_interleave(repeats)
    tokens, logprobs, logprobs_t1 = choose(z_RV[rows].clone(), params, keys_A, torch.zeros_like(keys_A))
    for r in range(40):
        p, whole = oracle(z_RV[r].double().tolist(), params), z_RV[r].double().log_softmax(0)
        for token, lp, t1 in zip(*(x[rows == r].tolist() for x in (tokens, logprobs, logprobs_t1)), strict=True):
            assert token in p, "a filtered token was drawn"
            assert abs(lp - math.log(p[token])) < 1e-5 and abs(t1 - whole[token].item()) < 1e-5
        likely = {v for v, q in p.items() if q > 0.2}
        assert likely <= set(tokens[rows == r].tolist())


@pytest.mark.parametrize(("vocab", "size"), [(1, 1), (2, 2), (16, 4), (17, 8), (512, 32), (32000, 256), (128256, 512)])
def test_block_size(vocab, size):
    assert block_size(vocab) == size


def test_a_nucleus_of_any_size_is_found(monkeypatch):
    """Looking at more and more of the vocabulary, or at all of it at once, gives one distribution: flat rows and peaked
    ones.
    """
    z_AV = torch.randn(300, 700, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.05, 8, 300)[:, None]
    params, positions = SamplingParams(top_p=0.9), torch.zeros(300, dtype=torch.int64)
    drawn = []
    for count in (1, 256, 700):
        monkeypatch.setattr(choice, "NUCLEUS", count)
        drawn.append(choose(z_AV.clone(), params, keys(300), positions))
    for other in drawn[1:]:
        assert all(torch.equal(a, b) for a, b in zip(drawn[0], other, strict=True))


@pytest.mark.parametrize("top_p", (1e-6, 0.3, 0.9, 0.999))
@pytest.mark.parametrize("scale", (0.1, 3.0, 30.0))
def test_the_edge_of_the_nucleus_by_halving_is_the_one_by_sorting(top_p, scale):
    """Also with ties, and with tokens that top-k has left out."""
    x_AV = scale * torch.randn(40, 700, generator=torch.Generator().manual_seed(0))
    x_AV[5] = x_AV[5].round()
    x_AV[6:9, 100:] = float("-inf")
    normaliser_A1 = x_AV.logsumexp(-1, keepdim=True)
    edges_A1 = choice._edges_by_halving(x_AV, normaliser_A1, top_p)
    mass_A = (x_AV - normaliser_A1).double().exp().masked_fill(x_AV < edges_A1, 0).sum(-1)
    above_A = (x_AV - normaliser_A1).double().exp().masked_fill(x_AV <= edges_A1, 0).sum(-1)
    assert (mass_A > top_p - 1e-5).all() and (above_A < top_p + 1e-5).all()
    same_A1 = edges_A1 == choice._nucleus_edges(x_AV, top_p)
    assert same_A1.float().mean() > 0.95  # else the mass lies on the edge to the rounding of its sum
