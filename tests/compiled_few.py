"""Compiles `few` for an H100 without one:

    python -m tests.compiled_few INPUTS GROUP ROWS SILU TILES WARPS SPLITS STRETCH AHEAD

ROWS 8 or 16, SILU 0 or 1.

Prints how often tensors change threads before the last product of the tensor cores.
"""

import math
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lance_quant.runtime.kernels.few import FewConfig, _few

TYPES = {
    "x": "*bf16", "qweight": "*i32", "scales": "*bf16", "zeros": "*u8", "parts": "*fp32", "tickets": "*i32",
    "out": "*bf16", "rows": "i32", "outputs": "i32", "sixteen": "i32",
}  # fmt: skip


def compiled(inputs: int, group: int, rows: int, silu_mul: bool, config: FewConfig):
    fixed = {
        "bias": None, "INPUTS": inputs, "G": group, "BIAS": False, "SILU_MUL": silu_mul, "SPLITS": config.splits,
        "TILES": config.tiles, "ROWS": rows, "WARPS": config.warps, "AHEAD": config.ahead, "DOT": tl.bfloat16,
        "GROUPS": math.gcd(config.stretch // group, inputs // group), "EARLY": False,
    }  # fmt: skip
    names = _few.arg_names
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if TYPES.get(name, "").startswith("*") or name == "outputs"
    }
    types = {name: TYPES.get(name, "constexpr") for name in names}
    source = ASTSource(_few, types, {(names.index(name),): value for name, value in fixed.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": config.warps})


def changes(ptx: str) -> int:
    before = ptx[: ptx.rindex("mma.sync")]
    return len(re.findall(r"\b(?:st\.shared|ld\.shared|ldmatrix|stmatrix|shfl)", before))


if __name__ == "__main__":
    inputs, group, rows, silu_mul, *sizes = map(int, sys.argv[1:])
    print(changes(compiled(inputs, group, rows, bool(silu_mul), FewConfig(*sizes)).asm["ptx"]))
