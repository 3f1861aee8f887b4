"""The Triton kernels, compiled ahead of time for the GPUs they are meant for: no register spills, whole-width accesses.
Needs no GPU.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402 - after the check that there is a triton
from triton.compiler import ASTSource  # noqa: E402

from losses.kernels import fused  # noqa: E402

DIVISIBLE = [["tt.divisibility", 16]]  # as launches find pointers and rows of a vocabulary that is a multiple of 16
STATISTICS = {
    "logits": "*fp32",
    "targets": "*i64",
    "lse": "*fp32",
    "logprobs": "*fp32",
    "entropy": "*fp32",
    "V": "i32",
    "stride": "i32",
}
GRADIENT = {
    "logits": "*fp32",
    "out": "*bf16",
    "targets": "*i64",
    "lse": "*fp32",
    "logprob_grad": "*fp32",
    "entropy": "*fp32",
    "entropy_grad": "*fp32",
    "V": "i32",
    "stride": "i32",
    "out_stride": "i32",
    "softcap": "fp32",
    "scale": "fp32",
}
VARIANTS = {
    "statistics": (fused._statistics_kernel, STATISTICS, {"WITH_ENTROPY": False}),
    "statistics, entropy": (fused._statistics_kernel, STATISTICS, {"WITH_ENTROPY": True}),
    "gradient": (fused._gradient_kernel, GRADIENT, {"WITH_ENTROPY": False, "WITH_SOFTCAP": False}),
    "gradient, entropy, soft-cap": (fused._gradient_kernel, GRADIENT, {"WITH_ENTROPY": True, "WITH_SOFTCAP": True}),
    "gradient over the logits": (
        fused._gradient_kernel,
        GRADIENT | {"out": "*fp32"},
        {"WITH_ENTROPY": False, "WITH_SOFTCAP": False},
    ),
}


def resources(cubin: bytes, directory: Path) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of a kernel, by the disassembler that triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this triton brings no cuobjdump")
    path = directory / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run(
        [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_kernel_spills(variant, capability, tmp_path):
    kernel, signature, flags = VARIANTS[variant]
    constants = flags | {"BLOCK": fused.BLOCK}
    attributes = {
        (i,): DIVISIBLE
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ("V", "stride", "out_stride")
    }
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    found = resources(compiled.asm["cubin"], tmp_path)
    assert found["STACK"] == found["LOCAL"] == 0 and 0 < found["REG"] <= 128, found
    assert re.search(r"ld\.global[.\w]*\.v4\.b32", compiled.asm["ptx"]), (
        "logits are read by less than 16 bytes a thread"
    )
