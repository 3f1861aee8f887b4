"""The two passes over a chunk of logits, in torch operations and as Triton kernels, against float64 autograd.

The kernels run on a CPU under Triton's interpreter. TRITON_INTERPRET must be set before triton is imported, and triton
may be in this process already, so they run in a process of their own (this file as a script), once for all cases.

C rows of a chunk · R rows · D hidden · V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

# rows, vocabulary (the block is 4096), entropy, soft-cap
CASES = [
    (3, 5003, False, None),
    (3, 5003, True, None),
    (2, 4096, True, None),
    (2, 8193, False, 30.0),
    (4, 7, True, 5.0),
    (1, 1, True, None),
    (1, 9001, True, 1.0),
    (0, 100, True, 30.0),
]
HEADS = ["linear_logprobs", "linear_loss"]


def exact(
    logits_CV: Tensor, targets_C: Tensor, coef_C: Tensor, entropy_coef_C: Tensor, entropy: bool, softcap: float | None
):
    """(lse, logprobs, entropy, gradient for the logits before the soft-cap) in float64, by autograd."""
    z_CV = logits_CV.double().requires_grad_()
    capped_CV = z_CV if softcap is None else softcap * torch.tanh(z_CV / softcap)
    logp_CV = capped_CV.log_softmax(-1)
    logprobs_C = logp_CV.gather(1, targets_C[:, None]).squeeze(1)
    entropy_C = -(logp_CV.exp() * logp_CV).sum(-1)
    loss = (coef_C * logprobs_C).sum() + ((entropy_coef_C * entropy_C).sum() if entropy else 0)
    (grad_CV,) = torch.autograd.grad(loss, z_CV)
    return capped_CV.logsumexp(-1), logprobs_C, entropy_C, grad_CV


def difference(module, rows: int, vocab: int, entropy: bool, softcap: float | None, device: str = "cpu") -> float:
    """Largest difference from float64 in any output of both passes; also that logits survive the first, and memory
    beside them both.
    """
    generator = torch.Generator(device).manual_seed(vocab)
    raw_CV = 4 * torch.randn(rows, vocab, generator=generator, device=device)
    targets_C = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    targets_C[:1] = vocab - 1  # the last column, in the last and partial block
    coef_C, entropy_coef_C = torch.randn(2, rows, generator=generator, device=device)
    expected = exact(raw_CV, targets_C, coef_C, entropy_coef_C, entropy, softcap)

    # the chunk is a slice of a longer buffer, as in training
    around = torch.full((rows + 1, vocab), 7.0, device=device)
    logits_CV = around[:rows].copy_(raw_CV if softcap is None else softcap * torch.tanh(raw_CV / softcap))
    before = logits_CV.clone()
    lse_C, logprobs_C, entropy_C = module.logits_statistics(logits_CV, targets_C, entropy)
    assert (entropy_C is not None) == entropy and torch.equal(logits_CV, before)
    entropies = (entropy_C, entropy_coef_C) if entropy else (None, None)
    module.logits_gradient_(logits_CV, lse_C, targets_C, coef_C, *entropies, softcap)
    assert (around[rows] == 7.0).all()
    # in another dtype, with a scale
    into_CV = torch.full((rows, vocab + 3), 7.0, device=device, dtype=torch.bfloat16)[:, :vocab]
    module.logits_gradient_(before, lse_C, targets_C, coef_C, *entropies, softcap, 0.5, into_CV)
    torch.testing.assert_close(into_CV.double(), 0.5 * expected[3], rtol=2**-7, atol=1e-6)  # the interpreter truncates
    pairs = [(lse_C, expected[0]), (logprobs_C, expected[1]), (logits_CV, expected[3])] + (
        [(entropy_C, expected[2])] if entropy else []
    )
    return max(((got - want).abs().max().item() if got.numel() else 0.0) for got, want in pairs)


def head_difference(head: str) -> float:
    """A whole head on the Triton passes against the naive one: largest relative difference in loss and gradients."""
    import losses.kernels
    from losses.kernels import fused
    from losses.logprobs import LogitTransform, linear_logprobs, linear_loss, naive_logprobs

    losses.kernels._module = lambda logits_CV: fused
    generator = torch.Generator().manual_seed(5)
    hidden_RD, weight_VD = torch.randn(11, 8, generator=generator), torch.randn(4099, 8, generator=generator)
    targets_R, transform = torch.randint(0, 4099, (11,), generator=generator), LogitTransform(0.7, 20.0)
    got = [x.clone().requires_grad_() for x in (hidden_RD, weight_VD)]
    wanted = [x.double().requires_grad_() for x in (hidden_RD, weight_VD)]
    logprobs_R = naive_logprobs(*wanted, targets_R, transform)
    if head == "linear_logprobs":
        ours_R, entropy_R = linear_logprobs(*got, targets_R, entropy=True, transform=transform, chunk_rows=4)
        logits_RV = 20 * torch.tanh(0.7 * (wanted[0] @ wanted[1].T) / 20)
        loss, expected = (
            (ours_R * entropy_R).sum(),
            (logprobs_R * torch.distributions.Categorical(logits=logits_RV).entropy()).sum(),
        )
    else:
        cuts = [0, 3, 8, 11]  # 5 rows in one group: longer than a chunk
        of_group = lambda logprobs_C: logprobs_C.mean() ** 2
        per_groups = lambda logprobs_C, groups: sum(map(of_group, logprobs_C.split([3, 5, 3][groups])))
        loss = linear_loss(*got, targets_R, per_groups, cuts, transform, chunk_rows=4)
        expected = per_groups(logprobs_R, slice(0, 3))
    triples = zip(
        (loss, *torch.autograd.grad(loss, got)), (expected, *torch.autograd.grad(expected, wanted)), strict=True
    )
    return max(((x - y).norm() / y.norm()).item() for x, y in triples)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_passes_equal_float64(case):
    from losses.kernels import eager

    assert difference(eager, *case) < 1e-5


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    """Differences of the Triton kernels, by case, from one run of this file under the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    if "only 0-dimensional arrays can be converted" in done.stderr and "handle.data" in done.stderr:
        pytest.skip("the interpreter of this triton (3.6) needs numpy < 2.4")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_kernels_equal_float64(case, interpreted):
    assert interpreted[str(case)] < 1e-5


@pytest.mark.parametrize("head", HEADS)
def test_heads_on_triton_kernels_equal_naive(head, interpreted):
    assert interpreted[head] < 1e-5


if __name__ == "__main__":
    from losses.kernels import fused

    print(
        json.dumps(
            {
                **{str(case): difference(fused, *case) for case in CASES},
                **{head: head_difference(head) for head in HEADS},
            }
        )
    )
