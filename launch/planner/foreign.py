"""What the planner must know of code that is not ours: torch's FSDP and DTensor, its storages, bitsandbytes.

Nothing here has a seam, so it is replaced while a plan is made. Every name is asserted to exist: of a torch that has
another, `launch.plan` says so in one line and makes no plan, since a plan without what hangs on that name would be
wrong.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from engine.errors import UserError
from engine.model.bnb import bitsandbytes, installed
from launch.planner.ledger import GATHERED, GRADIENTS, WEIGHTS, Ledger

Method = Callable[..., Any]


@contextlib.contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Method], Any]) -> Iterator[None]:
    """`owner.name` is `wrap(owner.name)` within. Raises UserError where there is no such name."""
    if not hasattr(owner, name):
        where = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
        raise _unknown(f"{where} has no {name}", where)
    before, inherited = getattr(owner, name), name not in vars(owner)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def named(module: str, name: str) -> Any:
    """A class of a private module. Raises UserError where it is not."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise _unknown(f"there is no {module}.{name}", module) from None


def _unknown(what: str, where: str) -> UserError:
    package = where.partition(".")[0]
    return UserError(f"launch.plan does not know {package} {importlib.metadata.version(package)}: {what}")


@contextlib.contextmanager
def followed(ledger: Ledger, cuda: bool) -> Iterator[None]:
    """The ledger sees what happens in foreign code; `cuda`: fake tensors say that they are on such a device."""
    with contextlib.ExitStack() as stack:
        for context in (*_fsdp(ledger), *_shapes_of_dtensors(ledger), *_storages(ledger), *_updates(ledger)):
            stack.enter_context(context)
        if cuda:  # so that the code takes the branches that it takes there
            stack.enter_context(replaced(FakeTensor, "is_cuda", lambda _: property(lambda self: True)))
        yield


def _fsdp(ledger: Ledger) -> list[Any]:
    """FSDP's buffers and gradients by their names."""
    group = named("torch.distributed.fsdp._fully_shard._fsdp_param_group", "FSDPParamGroup")

    def gathering(method: Method) -> Method:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            with ledger.allocating(GATHERED):
                return method(self, *args, **options)

        return wrapped

    def reducing(method: Method) -> Method:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            kinds = [ledger.kind_of(p.sharded_param) for p in self.fsdp_params]
            own = [(p, GRADIENTS if kind == WEIGHTS else kind) for p, kind in zip(self.fsdp_params, kinds, strict=True)]
            for p, kind in own:
                ledger.mark([_unsharded_gradient(p)], kind)
            with ledger.allocating(GATHERED):
                result = method(self, *args, **options)
            for p, kind in own:
                ledger.mark([p.sharded_param.grad, _unsharded_gradient(p), p.unsharded_accumulated_grad], kind)
            return result

        return wrapped

    wraps = {"unshard": gathering, "wait_for_unshard": gathering, "post_backward": reducing}
    return [replaced(group, name, wrap) for name, wrap in wraps.items()]


def _unsharded_gradient(p: Any) -> Tensor | None:
    """Of a whole parameter; FSDP makes it when it is first gathered."""
    return getattr(getattr(p, "_unsharded_param", None), "grad", None)


def _shapes_of_dtensors(ledger: Ledger) -> list[Any]:
    """DTensor learns the shape of a result by running the operator on whole tensors, which nobody allocates."""
    propagator = named("torch.distributed.tensor._sharding_prop", "ShardingPropagator")

    def aside(method: Method) -> Method:
        @functools.wraps(method)
        def wrapped(*args: Any, **options: Any) -> Any:
            before, ledger.paused = ledger.paused, True
            try:
                return method(*args, **options)
            finally:
                ledger.paused = before

        return wrapped

    return [replaced(propagator, "_propagate_tensor_meta_non_cached", aside)]


def _storages(ledger: Ledger) -> list[Any]:
    """FSDP frees and refills gathered weights by resizing their storage."""

    def followed_resize(resize_: Method) -> Method:
        def wrapped(storage: torch.UntypedStorage, size: int) -> Any:
            ledger.resize(storage, size)
            return resize_(storage, size)

        return wrapped

    return [replaced(torch.UntypedStorage, "resize_", followed_resize)]


def _updates(ledger: Ledger) -> list[Any]:
    """8-bit AdamW's kernels read and write a gradient, its parameter and two moments."""
    if not installed():  # then no configuration that needs it was let through
        return []

    def update(_: Method) -> Method:
        return lambda **tensors: ledger.touch([tensors[name] for name in ("g", "p", "state1", "state2")])

    kernels = bitsandbytes().functional
    return [replaced(kernels, name, update) for name in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit")]
