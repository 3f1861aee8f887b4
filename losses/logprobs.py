"""Log-probabilities from hidden states, without the logits.

    logits_RV    z = h W^T,  then s z (logit scale),  then c tanh(z / c) (soft-cap)
    logprobs_R   log p(y) = z_y - log sum_v exp z_v
    entropy_R    H = - sum_v p_v log p_v

Training needs log p and its gradient, never z itself. One chunk of rows x V exists at a time, in fp32, and

* `linear_logprobs` gives log p for any loss; its backward recomputes the chunk's logits (four matrix products a row);
* `linear_loss` is for losses whose derivative is known as soon as the chunk's log-probs are (a sum over tokens, or
  over whole groups of rows such as preference pairs): it asks the caller for the loss of the chunk's log-probs,
  differentiates that small function by autograd, and finishes the chunk at once, in three matrix products.

    dL/dz_v = dL/dlogp (1[v = y] - p_v) - dL/dH p_v (log p_v + H)

Beside them stand `naive_logprobs` and `naive_loss`, the few lines that they equal.

R rows (positions that count) · C rows of a chunk · D hidden · V vocabulary · G groups of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.kernels import logits_gradient_, logits_statistics

VOCABULARY_ROWS = 2**14  # of the weight's gradient that are made at a time, where they are added in another dtype
LossOfLogprobs = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to `h W^T` before the softmax: `softcap * tanh(scale * z / softcap)`; 1 and None leave it."""

    scale: float = 1.0
    softcap: float | None = None

    def at(self, temperature: float) -> LogitTransform:
        """The same followed by a division by the temperature: (c / T) tanh((s / T) z / (c / T)) = c tanh(s z / c)
        / T.
        """
        return LogitTransform(self.scale / temperature, None if self.softcap is None else self.softcap / temperature)

    def __call__(self, logits_RV: Tensor) -> Tensor:
        """In place, outside autograd."""
        if self.scale != 1.0:
            logits_RV.mul_(self.scale)
        if self.softcap is not None:
            logits_RV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_RV


IDENTITY = LogitTransform()


def naive_logprobs(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, transform: LogitTransform = IDENTITY
) -> Tensor:
    """log p(y) with the whole (R, V) matrix in memory: what `linear_logprobs` equals."""
    logits_RV = at_least_fp32(hidden_RD @ weight_VD.T) * transform.scale
    if transform.softcap is not None:
        logits_RV = transform.softcap * torch.tanh(logits_RV / transform.softcap)
    return logits_RV.log_softmax(-1).gather(1, targets_R[:, None]).squeeze(1)


def naive_loss(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    loss_of_logprobs: LossOfLogprobs,
    cuts: Sequence[int] | None = None,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """The loss of all rows at once through autograd: what `linear_loss` equals."""
    groups = len(targets_R) if cuts is None else len(cuts) - 1
    return loss_of_logprobs(naive_logprobs(hidden_RD, weight_VD, targets_R, transform), slice(0, groups))


def linear_logprobs(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    entropy: bool = False,
    transform: LogitTransform = IDENTITY,
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(targets) per row, and the entropy of each row's distribution on request, differentiable.

    Args: hidden (R, D) and weight (V, D) in one floating dtype; targets (R) int64 in [0, V); `chunk_rows` rows of
    logits exist at a time (default: a buffer of 256 MiB on a CPU, 2 GiB on a GPU).
    Returns: logprobs (R) in fp32 (fp64 for fp64 input), or (logprobs, entropy).
    Raises: ValueError for shapes or dtypes that do not fit. Targets out of range are the caller's to refuse (the data
    code does). Left out: bias of the output layer (no decoder of the supported families has one), label smoothing,
    z-loss.
    """
    _check(hidden_RD, weight_VD, targets_R)
    chunk_rows = chunk_rows or default_chunk_rows(weight_VD)
    logprobs_R, entropy_R = _LinearLogprobs.apply(hidden_RD, weight_VD, targets_R, entropy, transform, chunk_rows)
    return (logprobs_R, entropy_R) if entropy else logprobs_R


def linear_loss(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    loss_of_logprobs: LossOfLogprobs,
    cuts: Sequence[int] | None = None,
    transform: LogitTransform = IDENTITY,
    *,
    chunk_rows: int | None = None,
) -> Tensor:
    """sum over chunks of `loss_of_logprobs(logprobs_C, groups)`, its gradient taken as the chunk passes.

    `cuts` (G + 1 increasing row numbers from 0 to R) says where a chunk may end: group g is the rows cuts[g]:cuts[g+1],
    and no group is cut, so a loss may couple the rows of a group (a preference pair). None: every row is a group.
    `loss_of_logprobs(logprobs_C, groups)` gets the log-probs of the groups in the slice and returns their scalar loss;
    it is called once for every group, in order, and must not need other groups. A group longer than a chunk is done in
    two passes (its logits are computed twice), so memory never exceeds one chunk.

    Same arguments, dtypes and errors as `linear_logprobs`. Structure: Liger-Kernel's gradient-in-forward, with the loss
    as an argument and fp32 accumulation over long chunks.
    """
    _check(hidden_RD, weight_VD, targets_R)
    chunk_rows = chunk_rows or default_chunk_rows(weight_VD)
    cuts = range(len(targets_R) + 1) if cuts is None else cuts
    spans = _spans_of_whole_groups(cuts, chunk_rows)
    needs = (torch.is_grad_enabled() and hidden_RD.requires_grad, torch.is_grad_enabled() and weight_VD.requires_grad)
    return _LinearLoss.apply(hidden_RD, weight_VD, targets_R, loss_of_logprobs, spans, transform, chunk_rows, needs)


@torch.no_grad()
def linear_argmax(hidden_RD: Tensor, weight_VD: Tensor, chunk_rows: int | None = None) -> Tensor:
    """argmax_v of every row's logits, (R,) int64, by chunks: greedy tokens and token accuracy. Scales and soft-caps
    keep it.
    """
    chunk_rows = chunk_rows or default_chunk_rows(weight_VD)
    rows = torch.zeros(len(hidden_RD), dtype=torch.int64, device=hidden_RD.device)
    head = _Head(hidden_RD, weight_VD, rows, IDENTITY, chunk_rows)
    for piece in _pieces(slice(0, len(rows)), chunk_rows):
        rows[piece] = head.logits(piece).argmax(1)
    return rows


def default_chunk_rows(weight_VD: Tensor) -> int:
    """Rows whose fp32 logits fill the budget; never fewer than 64, below which the matrix products starve."""
    budget = 2**31 if weight_VD.is_cuda else 2**28
    return max(64, budget // (4 * weight_VD.shape[0]))


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> None:
    if hidden_RD.dim() != 2 or weight_VD.dim() != 2 or hidden_RD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden (R, D) and weight (V, D) do not fit: {tuple(hidden_RD.shape)}, {tuple(weight_VD.shape)}"
        )
    if targets_R.shape != hidden_RD.shape[:1] or targets_R.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 ({hidden_RD.shape[0]},), got {targets_R.dtype} {tuple(targets_R.shape)}"
        )
    if hidden_RD.dtype != weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_RD.dtype} and weight is {weight_VD.dtype}; both must have one dtype")


def _spans_of_whole_groups(cuts: Sequence[int], chunk_rows: int) -> list[tuple[slice, slice]]:
    """Greedy (rows, groups) spans of at most `chunk_rows` rows; a longer group is a span of its own."""
    spans, first = [], 0
    for g in range(1, len(cuts)):
        if g > first + 1 and cuts[g] - cuts[first] > chunk_rows:
            spans.append((slice(cuts[first], cuts[g - 1]), slice(first, g - 1)))
            first = g - 1
    if len(cuts) - 1 > first:
        spans.append((slice(cuts[first], cuts[-1]), slice(first, len(cuts) - 1)))
    return spans


def _pieces(rows: slice, chunk_rows: int) -> list[slice]:
    return [slice(start, min(start + chunk_rows, rows.stop)) for start in range(rows.start, rows.stop, chunk_rows)]


class _Head:
    """The chunked products shared by both functions: logits of some rows, and their gradients into two accumulators."""

    def __init__(
        self, hidden_RD, weight_VD, targets_R, transform: LogitTransform, chunk_rows: int, grads=(False, False)
    ):
        self.hidden_RD, self.weight_VD, self.targets_R, self.transform = hidden_RD, weight_VD, targets_R, transform
        self.wide = torch.float64 if hidden_RD.dtype == torch.float64 else torch.float32
        rows = min(chunk_rows, len(targets_R))
        self.buffer_CV = hidden_RD.new_empty((rows, weight_VD.shape[0]), dtype=self.wide)
        mixed = hidden_RD.dtype != self.wide and any(grads)
        self.grad_CV = hidden_RD.new_empty(self.buffer_CV.shape) if mixed else None  # None: over the logits
        self.hidden_grad_RD = torch.empty_like(hidden_RD) if grads[0] else None
        self.weight_grad_VD = torch.zeros_like(weight_VD, dtype=self.wide) if grads[1] else None

    def logits(self, rows: slice) -> Tensor:
        out_CV = self.buffer_CV[: rows.stop - rows.start]
        hidden_CD = self.hidden_RD[rows]
        if hidden_CD.dtype == self.wide:
            torch.mm(hidden_CD, self.weight_VD.T, out=out_CV)
        elif hidden_CD.is_cuda:  # bf16 operands, fp32 result: the tensor cores' own accumulator, not rounded to bf16
            torch.mm(hidden_CD, self.weight_VD.T, out_dtype=torch.float32, out=out_CV)
        else:
            out_CV.copy_(hidden_CD @ self.weight_VD.T)
        return self.transform(out_CV)

    def accumulate(
        self, rows: slice, logits_CV: Tensor, lse_C, logprob_grad_C, entropy_C=None, entropy_grad_C=None
    ) -> None:
        """Adds the gradient of the chunk, which takes the place of its logits, to the two accumulators."""
        into_CV = None if self.grad_CV is None else self.grad_CV[: len(logits_CV)]
        transform = self.transform.softcap, self.transform.scale
        logits_gradient_(
            logits_CV, lse_C, self.targets_R[rows], logprob_grad_C, entropy_C, entropy_grad_C, *transform, into_CV
        )
        grad_CV = logits_CV if into_CV is None else into_CV
        if self.hidden_grad_RD is not None:
            torch.mm(grad_CV, self.weight_VD, out=self.hidden_grad_RD[rows])
        if self.weight_grad_VD is not None:
            add_product_(self.weight_grad_VD, grad_CV.T, self.hidden_RD[rows])


def add_product_(total_VD: Tensor, a_VC: Tensor, b_CD: Tensor) -> None:
    """total += a b, where the total may be wider than the factors; a second V x D matrix never exists."""
    if b_CD.dtype == total_VD.dtype:
        total_VD.addmm_(a_VC, b_CD)
    elif b_CD.is_cuda:  # added within the product, by the tensor cores' own accumulator
        _add_product_(total_VD, a_VC, b_CD)
    else:
        for part in _pieces(slice(0, len(total_VD)), VOCABULARY_ROWS):
            total_VD[part].add_(a_VC[part] @ b_CD)


@torch.library.custom_op("triptych::add_product_", mutates_args=("total_VD",))
def _add_product_(total_VD: Tensor, a_VC: Tensor, b_CD: Tensor) -> None:
    torch.addmm(total_VD, a_VC, b_CD, out_dtype=total_VD.dtype, out=total_VD)


@_add_product_.register_fake
def _(total_VD: Tensor, a_VC: Tensor, b_CD: Tensor) -> None:  # torch 2.11's own, of addmm with an out_dtype, is broken
    return None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, targets_R, entropy, transform, chunk_rows):
        head = _Head(hidden_RD, weight_VD, targets_R, transform, chunk_rows)
        logprobs_R = torch.empty(len(targets_R), dtype=head.wide, device=hidden_RD.device)
        lse_R = torch.empty_like(logprobs_R)
        entropy_R = torch.empty_like(logprobs_R) if entropy else None
        for rows in _pieces(slice(0, len(targets_R)), chunk_rows):
            lse_R[rows], logprobs_R[rows], entropy_C = logits_statistics(head.logits(rows), targets_R[rows], entropy)
            if entropy:
                entropy_R[rows] = entropy_C
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, lse_R, entropy_R)
        ctx.options = (transform, chunk_rows)
        return logprobs_R, entropy_R

    @staticmethod
    def backward(ctx, logprob_grad_R, entropy_grad_R):
        hidden_RD, weight_VD, targets_R, lse_R, entropy_R = ctx.saved_tensors
        transform, chunk_rows = ctx.options
        head = _Head(hidden_RD, weight_VD, targets_R, transform, chunk_rows, grads=ctx.needs_input_grad[:2])
        for rows in _pieces(slice(0, len(targets_R)), chunk_rows):
            with_entropy = (entropy_R[rows], entropy_grad_R[rows]) if entropy_R is not None else ()
            head.accumulate(rows, head.logits(rows), lse_R[rows], logprob_grad_R[rows], *with_entropy)
        return head.hidden_grad_RD, _to_dtype(head.weight_grad_VD, weight_VD), None, None, None, None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, targets_R, loss_of_logprobs, spans, transform, chunk_rows, needs):
        head = _Head(hidden_RD, weight_VD, targets_R, transform, chunk_rows, grads=needs)
        total = torch.zeros((), dtype=head.wide, device=hidden_RD.device)
        for rows, groups in spans:
            pieces = _pieces(rows, chunk_rows)
            lse_R, logprobs_R = [], []
            for piece in pieces:
                logits_CV = head.logits(piece)
                lse_C, logprobs_C, _ = logits_statistics(logits_CV, targets_R[piece], False)
                lse_R.append(lse_C)
                logprobs_R.append(logprobs_C)
            leaf_R = torch.cat(logprobs_R) if pieces else torch.zeros(0, dtype=head.wide, device=hidden_RD.device)
            with torch.enable_grad():
                loss = loss_of_logprobs(leaf_R.requires_grad_(any(needs)), groups)
            total += loss.detach()
            if not loss.requires_grad:  # no gradient asked for, or a loss that does not depend on these rows
                if head.hidden_grad_RD is not None:
                    head.hidden_grad_RD[rows] = 0
                continue
            (logprob_grad_R,) = torch.autograd.grad(loss, leaf_R)
            for i, piece in enumerate(pieces):
                if len(pieces) > 1:  # the buffer holds the last piece only: compute this one again
                    logits_CV = head.logits(piece)
                local = slice(piece.start - rows.start, piece.stop - rows.start)
                head.accumulate(piece, logits_CV, lse_R[i], logprob_grad_R[local].contiguous())
        ctx.save_for_backward(head.hidden_grad_RD, _to_dtype(head.weight_grad_VD, weight_VD))
        return total

    @staticmethod
    def backward(ctx, loss_grad):
        # loss_grad is a scalar, 1 in training (the denominator is already inside the loss): scaling in place copies
        # nothing.
        hidden_grad_RD, weight_grad_VD = ctx.saved_tensors
        scaled = [g if g is None else g.mul_(loss_grad.to(g.dtype)) for g in (hidden_grad_RD, weight_grad_VD)]
        return (*scaled, None, None, None, None, None, None)


def _to_dtype(grad_VD: Tensor | None, like: Tensor) -> Tensor | None:
    return None if grad_VD is None else grad_VD.to(like.dtype)
