"""A run without its machine: a world of any size in one process, on tensors that have shapes and no numbers.

Within `rehearsal` the engine's own code runs as it is, under a ledger. What stands in for the GPU, when one is planned
for:

    attention           an operation that keeps what a flash kernel keeps (its output and an fp32 log-sum-exp per head and token)
                        and takes its workspace (fp32 query gradients, one key and value gradient a query head)
    the head's kernels  the two Triton kernels, which take nothing, and a product that adds, whose fake of torch 2.11 is broken
    Tensor.is_cuda      True, so that the code takes the branches that it takes there

Collectives are torch's fake process group's: they move nothing, and what is allocated around them is real FSDP's doing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from engine import attention, layers, model, weights
from engine.bnb import bitsandbytes, installed
from engine.hardware import Device
from engine.ledger import HOST, Ledger
from engine.world import World
from losses import logprobs

GATHERED, GRADIENTS, WEIGHTS, HEAD, ACTIVATIONS = "gathered weights", "gradients", "weights", "loss head", "activations"


class RehearsedWorld(World):
    """Rank 0 of `size`; every other rank says what it says."""

    def gather(self, x: Any) -> list[Any]:
        return [x] * self.size

    def say(self, *lines: str) -> None:
        pass


@contextlib.contextmanager
def rehearsal(
    device: Device, size: int, *, per_node: int, fused: float = 1.0
) -> Iterator[tuple[RehearsedWorld, Ledger, FakeTensorMode]]:
    """(world, ledger, mode) of a rehearsal of `size` ranks. No process group may exist yet."""
    import torch.testing._internal.distributed.fake_pg as fake  # registers the backend

    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ranks",))
        here = RehearsedWorld(0, size, 0, torch.device("cpu"), mesh, dist.HashStore())
        ledger = Ledger(device, ranks=size, per_node=per_node, block=1 if device.name == "cpu" else 512, fused=fused)
        with contextlib.ExitStack() as stack:
            for patch in (
                _stand_ins(device, size) + _attributions(ledger) + _asides(ledger) + _updates(ledger) + _hauls(ledger)
            ):
                stack.enter_context(patch)
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(ledger)
            yield here, ledger, mode
    finally:
        dist.destroy_process_group()


def follow(root: model.Root, ledger: Ledger) -> None:
    """What the root's forward allocates is activations until the last hidden states are there, and the head's after
    that.
    """
    forward, hidden = root.forward, root.hidden

    def followed_forward(*args: Any, **options: Any) -> Tensor:
        with ledger.allocating(ACTIVATIONS):
            return forward(*args, **options)

    def followed_hidden(*args: Any) -> Tensor:
        out = hidden(*args)
        ledger.kind = HEAD
        return out

    root.forward, root.hidden = followed_forward, followed_hidden


def _stand_ins(device: Device, size: int) -> list[Any]:
    patches = [
        mock.patch.object(
            logprobs, "logits_statistics", lambda logits_CV, targets_C, entropy: _statistics(logits_CV, entropy)
        ),
        mock.patch.object(logprobs, "logits_gradient_", lambda logits_CV, *others: _gradient(logits_CV)),
        mock.patch.object(weights, "host_memory", lambda: device.memory * size),
    ]
    if device.name != "cpu":
        flash = attention._packed(_attend)
        patches += [
            mock.patch.object(attention, "packed", lambda backend: flash),
            mock.patch.object(
                logprobs,
                "add_product_",
                lambda total_VD, a_VC, b_CD: torch.mm(a_VC, b_CD, out_dtype=total_VD.dtype, out=total_VD),
            ),
            mock.patch.object(FakeTensor, "is_cuda", property(lambda self: True), create=True),
        ]
    return patches


def _attributions(ledger: Ledger) -> list[Any]:
    """FSDP's buffers and gradients by their names; without its private class (another torch) they count as activations."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    except ImportError:
        return []

    def gathering(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            with ledger.allocating(GATHERED):
                return method(self, *args, **options)

        return wrapped

    def reducing(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            kinds = [ledger.kind_of(p.sharded_param) for p in self.fsdp_params]
            own = [(p, GRADIENTS if kind == WEIGHTS else kind) for p, kind in zip(self.fsdp_params, kinds, strict=True)]
            for p, kind in own:
                ledger.mark([getattr(getattr(p, "_unsharded_param", None), "grad", None)], kind)
            with ledger.allocating(GATHERED):
                result = method(self, *args, **options)
            for p, kind in own:
                unreduced = getattr(p, "unsharded_accumulated_grad", None)
                ledger.mark(
                    [p.sharded_param.grad, getattr(getattr(p, "_unsharded_param", None), "grad", None), unreduced], kind
                )
            return result

        return wrapped

    wrappers = {"unshard": gathering, "wait_for_unshard": gathering, "post_backward": reducing}
    return _wrapped(FSDPParamGroup, wrappers)


def _updates(ledger: Ledger) -> list[Any]:
    """8-bit AdamW's kernels read and write a gradient, its parameter and two moments."""
    if not installed():  # then no configuration that needs it was let through
        return []
    kernels = bitsandbytes().functional

    def update(**k: Any) -> None:
        ledger.touch([k[name] for name in ("g", "p", "state1", "state2")])

    return [
        mock.patch.object(kernels, name, update)
        for name in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit")
    ]


def _hauls(ledger: Ledger) -> list[Any]:
    """--activation_offload: what is packed lies in host memory, and travels over the link to it."""
    load, road = getattr(layers, "_Load", None), getattr(layers, "_Road", None)
    if load is None or road is None or ledger.device.name == "cpu":
        return []

    def packing(method: Callable) -> Callable:
        def wrapped(*args: Any) -> Any:
            with ledger.allocating(HOST):
                return method(*args)

        return wrapped

    def copying(_: Callable) -> Callable:
        return lambda self, target, source: ledger.haul(source)

    return _wrapped(load, {"pack": packing}) + _wrapped(road, {"copy": copying})


def _asides(ledger: Ledger) -> list[Any]:
    """DTensor learns the shape of a result by running the operator on whole tensors, which nobody allocates."""
    try:
        from torch.distributed.tensor._sharding_prop import ShardingPropagator
    except ImportError:
        return []

    def aside(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapped(*args: Any, **options: Any) -> Any:
            before, ledger.paused = ledger.paused, True
            try:
                return method(*args, **options)
            finally:
                ledger.paused = before

        return wrapped

    return _wrapped(ShardingPropagator, {"_propagate_tensor_meta_non_cached": aside})


def _wrapped(owner: type, wrappers: dict[str, Callable]) -> list[Any]:
    return [
        mock.patch.object(owner, name, wrap(getattr(owner, name)))
        for name, wrap in wrappers.items()
        if hasattr(owner, name)
    ]


# --- stand-ins for kernels
# ------------------------------------------------------------------------------------------------------


def visible_pairs(lengths: tuple[int, ...], window: int | None = None) -> float:
    """Pairs of a query and a key that it sees, over all sequences."""
    return float(
        sum(
            n * (n + 1) // 2 if window is None or window >= n else window * n - window * (window - 1) // 2
            for n in lengths
        )
    )


def _attend(q_TNH, k_TKH, v_TKH, packing, *, scale, window, softcap, sinks_N) -> Tensor:
    flops = 4.0 * q_TNH.shape[1] * q_TNH.shape[2] * visible_pairs(packing.lengths, window)
    return flash_attention(q_TNH, k_TKH, v_TKH, flops, 0)[0]


@torch.library.custom_op("triptych::rehearsed_attention", mutates_args=())
def flash_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, flops: float, workspace: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("fake tensors only")


@flash_attention.register_fake
def _(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, flops: float, workspace: int) -> tuple[Tensor, Tensor]:
    return torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device), q_TNH.new_empty(
        (q_TNH.shape[1], len(q_TNH)), dtype=torch.float32
    )


@torch.library.custom_op("triptych::rehearsed_attention_backward", mutates_args=())
def flash_attention_backward(
    grad_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    out_TNH: Tensor,
    lse_NT: Tensor,
    flops: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("fake tensors only")


@flash_attention_backward.register_fake
def _(grad_TNH, q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, flops, workspace) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TNH, k_TKH, v_TKH))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.flops = inputs[3]


def _backward(ctx: Any, grad_TNH: Tensor, _: Tensor) -> tuple:
    q_TNH, k_TKH, v_TKH, out_TNH, lse_NT = ctx.saved_tensors
    expanded = 2 * q_TNH.numel() * q_TNH.element_size() if k_TKH.shape[1] < q_TNH.shape[1] else 0
    workspace = 4 * (q_TNH.numel() + lse_NT.numel()) + expanded
    grads = flash_attention_backward(
        grad_TNH.contiguous(), q_TNH, k_TKH, v_TKH, out_TNH, lse_NT, 2.5 * ctx.flops, workspace
    )
    return (*grads, None, None)


flash_attention.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("triptych::rehearsed_statistics", mutates_args=())
def _statistics_op(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("fake tensors only")


@_statistics_op.register_fake
def _(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(logits_CV.new_empty(len(logits_CV)) for _ in range(3))


def _statistics(logits_CV: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    lse_C, logprobs_C, entropy_C = _statistics_op(logits_CV)
    return lse_C, logprobs_C, entropy_C if entropy else None


@torch.library.custom_op("triptych::rehearsed_gradient", mutates_args=("logits_CV",))
def _gradient(logits_CV: Tensor) -> None:
    raise NotImplementedError("fake tensors only")


@_gradient.register_fake
def _(logits_CV: Tensor) -> None:
    return None
