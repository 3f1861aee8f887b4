"""The Triton kernels of attention over pages, compiled ahead of time for the GPUs they are meant for: no register
spills, whole-width accesses, and as many programs a multiprocessor as the design counts on. Needs no GPU.
"""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402 - after the check that there is a triton
from triton.compiler import ASTSource  # noqa: E402

from rollout.kernels import paged  # noqa: E402
from tests.losses.test_kernels_compiled import DIVISIBLE, resources  # noqa: E402

POOLS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COUNTS = {"room": "i32", "table_stride": "i32", "pieces": "i32", "window": "i32"}
SHARED_MEMORY = {80: 163 * 2**10, 90: 227 * 2**10, 100: 227 * 2**10}  # bytes of a multiprocessor that programs have
HEAD_SIZES = (64, 80, 96, 128, 256)
# capability, dtype of the pools, H, B, window and soft-cap: pages of less and more than a tile, heads that are padded
VARIANTS = [
    (80, "bf16", 80, 16, True),
    (80, "bf16", 128, 256, False),
    (80, "fp32", 96, 16, True),
    (90, "bf16", 64, 64, False),
    (90, "bf16", 128, 16, True),
    (90, "fp32", 256, 256, False),
    (100, "bf16", 128, 16, True),
    (100, "fp16", 256, 16, True),
]
ALL = [
    pytest.param(
        (capability, dtype, H, B, options), marks=pytest.mark.drill, id=f"{capability} {dtype} {H} {B} {options}"
    )
    for capability in SHARED_MEMORY
    for dtype in ("bf16", "fp32")
    for H in HEAD_SIZES
    for B in (16, 256)
    for options in (False, True)
]


def compiled(kernel, signature: dict[str, str], constants: dict, capability: int, options: dict):
    """As a launch compiles it: pointers, and strides of whole heads, are multiples of 16."""
    attributes = {
        (i,): DIVISIBLE
        for i, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or name in ("q_stride_a", "q_stride_n")
    }
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("variant", [*VARIANTS, *ALL], ids=str)
def test_partial_results_do_not_spill(variant, tmp_path):
    capability, dtype, H, B, options = variant
    pool = f"*{dtype}"
    signature = {"q": pool, "keys": pool, "values": pool, "tables": "*i32", "positions": "*i64"}
    signature |= {"partial": "*fp32", "lse": "*fp32", "q_stride_a": "i32", "q_stride_n": "i32"}
    signature |= COUNTS | {"scale": "fp32", "softcap": "fp32"}
    constants = paged.constants(H, POOLS[dtype], options)
    constants |= {"K": 8, "G": 4, "B": B, "ROWS": paged.ROWS, "CAPPED": options, "WIDEN": False}
    launch = paged.launch(H, POOLS[dtype])
    kernel = compiled(paged._partial_kernel, signature, constants, capability, launch)
    found = resources(kernel.asm["cubin"], tmp_path)
    assert found["STACK"] == found["LOCAL"] == 0 and 0 < found["REG"] <= 168, found
    assert (2 if capability == 80 else 3) * (kernel.metadata.shared + 1024) <= SHARED_MEMORY[capability]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*, (0x\w+), ", kernel.asm["ptx"])
    of_a_tile = 2 * paged.TILE_BYTES // (32 * launch["num_warps"] * 16)  # keys and values, 16 bytes a thread
    assert copies.count("0x10") == of_a_tile * (launch["num_stages"] // 2 + 1), "tiles on their way, one in the loop"
    assert set(copies) <= {"0x10", "0x8", "0x4"}  # the others are numbers of pages
    assert not re.search(r"ld\.global[.\w]*\.b16 ", kernel.asm["ptx"]), "numbers are read one by one"


@pytest.mark.parametrize("capability, H", [(80, 256), (90, 128), (100, 80)])
def test_the_sum_does_not_spill(capability, H, tmp_path):
    signature = {"partial": "*fp32", "lse": "*fp32", "sinks": "*bf16", "positions": "*i64", "out": "*bf16"}
    signature |= {name: COUNTS[name] for name in ("room", "pieces", "window")}
    constants = paged.constants(H, torch.bfloat16, True) | {"N": 32, "WITH_SINKS": True}
    kernel = compiled(paged._sum_kernel, signature, constants, capability, {})
    found = resources(kernel.asm["cubin"], tmp_path)
    assert found["STACK"] == found["LOCAL"] == 0 and 0 < found["REG"] <= 128, found
    assert re.search(r"ld\.global[.\w]*\.v4\.b32", kernel.asm["ptx"]), "partial results are read by less than 16 bytes"
