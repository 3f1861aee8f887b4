"""FSDP2's cut of a tensor: dimension 0 in chunks of ceil(rows / ranks), so that the last ranks may hold less, or
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(p: Any) -> Tensor:
    """This rank's shard; a whole tensor as it is."""
    return p.to_local() if isinstance(p, DTensor) else p


def local_rows(p: Any) -> slice:
    """The rows of the whole tensor that this rank holds."""
    if not isinstance(p, DTensor):
        return slice(0, p.shape[0] if p.dim() else None)
    per_rank = -(-p.shape[0] // p.device_mesh.size())
    start = min(p.device_mesh.get_local_rank() * per_rank, p.shape[0])
    stop = min(start + per_rank, p.shape[0])
    assert p.to_local().shape[0] == stop - start, (p.to_local().shape, start, stop)
    return slice(start, stop)


def whole(p: Any) -> Tensor:
    """All rows, on every rank. Collective."""
    if not isinstance(p, DTensor):
        return p
    if p.dtype.itemsize > 1:
        return p.full_tensor()
    # gloo knows bytes, and no float of one
    return sharded_like(local(p).view(torch.uint8), p).full_tensor().view(p.dtype)


def sharded_like(rows: Tensor, p: Any) -> Any:
    """This rank's rows as the shard of a tensor that is cut as `p` is, with p's number of rows."""
    if not isinstance(p, DTensor):
        return rows
    shape = torch.Size([p.shape[0], *rows.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, p.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
