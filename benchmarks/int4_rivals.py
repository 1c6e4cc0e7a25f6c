"""The stage `rivals` of int4_kernels.py: what others offer for the same product, beside ours and bf16 cuBLAS.

    tinygemm        torch itself, aten._weight_int4pack_mm
    comfy-kitchen   its CUDA kernel awq_w4a16, from a wheel for CPython 3.12 or newer. That of 0.2.40 is the machine
                    code of 0.2.9 on an H100, whose wheel has 4 MB instead of 68
    gemlite         GemLiteLinearTriton; needs triton 3.6 or newer, numpy and tqdm. With configs for Lance's shapes on
                    an H100; at 2 and 4 rows it times 17 of them first. Its programs add their bf16 results to each
                    other in memory as it comes; with the sums in float32 it is measured too

One after the other, so that one that breaks the GPU leaves the lines before it. One that is not installed, or fails, is
told in a line and left out. Each gets our codes in its own layout, nothing is quantized anew: where it cannot hold our
format exactly the table says so, and the error shows it. TB/s counts the bytes of our format for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lance_quant.runtime.cpu_layout import terms
from lance_quant.runtime.int4_linear import Int4Linear
from lance_quant.runtime.selection import choose

if TYPE_CHECKING:
    from int4_kernels import Bench

INNER_TILES = 8  # of tinygemm: 16 bytes a thread at a time
SAME = 0.05  # relative L2: what is further away multiplies by something else
EXACT = "holds our codes, steps and zero points as they are"
Cells = Mapping[tuple[int, str], Mapping[str, Mapping]]  # (rows, name) -> shape -> line of `Bench.measured`


@dataclass(frozen=True, kw_only=True)
class Rival:
    """pack(linear) -> what multiply(packed, x) takes; ImportError where `package` is missing. close: from the float64
    product; None: what a backend of ours has to keep. offsets: of value = (code - 8) * step + offset, in bf16."""

    name: str
    pack: Callable[[Int4Linear], object]
    multiply: Callable[[object, Tensor], Tensor]
    package: str = ""
    close: float | None = SAME
    offsets: bool = False


# ------------------------------------------------------------ the rivals


def high_first(qweight: Tensor) -> Tensor:
    """The even input's code in the high nibble: tinygemm's order on a GPU."""
    return (qweight << 4) | (qweight >> 4)


def pack_tinygemm(linear: Int4Linear) -> tuple[Tensor, int, Tensor]:
    if linear.qweight.is_cuda:
        codes = torch.ops.aten._convert_weight_to_int4pack(high_first(linear.qweight), INNER_TILES)
    else:
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(linear.codes().int(), INNER_TILES)
    return codes, linear.group_size, terms(linear.scales, linear.zeros)


def tinygemm(packed: tuple[Tensor, int, Tensor], x: Tensor) -> Tensor:
    name = "_weight_int4pack_mm" if x.is_cuda else "_weight_int4pack_mm_for_cpu"
    return getattr(torch.ops.aten, name)(x, *packed)


def pack_comfy(linear: Int4Linear) -> tuple:
    """Bytes as ours; steps and offsets [I/G, O]."""
    registry = import_module("comfy_kitchen.registry").registry
    backend = "cuda" if linear.qweight.is_cuda else "eager"  # by name: else it might take plain torch without a word
    kernel = registry.get_implementation("gemv_awq_w4a16", backend=backend)
    steps, offsets = (part.contiguous() for part in terms(linear.scales, linear.zeros).unbind(-1))
    return kernel, linear.qweight.view(torch.int8), steps, offsets, None, linear.group_size


def comfy(packed: tuple, x: Tensor) -> Tensor:
    kernel, *weight = packed
    return kernel(x, *weight)


def pack_gemlite(linear: Int4Linear, wide_sums: bool = False) -> Callable[[Tensor], Tensor]:
    gemlite = import_module("gemlite")
    gemlite.set_native_atomic_bfp16(not wide_sums)  # of all its linears, when they multiply
    packed = gemlite.GemLiteLinearTriton(
        W_nbits=4,
        group_size=linear.group_size,
        in_features=linear.in_features,
        out_features=linear.out_features,
        input_dtype=gemlite.DType.BF16,
        output_dtype=gemlite.DType.BF16,
    )
    # by default it holds -zero * step in bf16; without fma_mode zero points stay what they are
    packed.pack(linear.codes(), linear.scales, linear.zeros.bfloat16(), fma_mode=False)
    return packed


RIVALS = (
    Rival(
        name="bf16 cuBLAS",
        pack=lambda linear: linear.weight(torch.bfloat16),
        multiply=lambda weight, x: F.linear(x, weight),
        close=None,
    ),
    Rival(name="ours", pack=lambda linear: linear, multiply=lambda linear, x: linear(x), close=None),
    Rival(name="tinygemm", pack=pack_tinygemm, multiply=tinygemm, offsets=True),
    Rival(name="comfy-kitchen", pack=pack_comfy, multiply=comfy, package="comfy-kitchen", offsets=True),
    Rival(name="gemlite", pack=pack_gemlite, multiply=lambda packed, x: packed(x), package="gemlite"),
    Rival(
        name="gemlite, float32 sums",
        pack=partial(pack_gemlite, wide_sums=True),
        multiply=lambda packed, x: packed(x),
        package="gemlite",
    ),
)

# ------------------------------------------------------------ the stage


def measure_rivals(bench: "Bench", rivals: Sequence[Rival] = RIVALS) -> str:
    """Prints each line as it comes; the table, which is in `out` after each rival."""
    cells: dict[tuple[int, str], dict[str, dict]] = {}
    notes, table = [], ""
    for rival in rivals:
        label = packed = None
        for linears, rows, x in bench.each():
            if linears.label != label:
                first, label = label is None, linears.label
                packed = None  # free what the shape before has
                packed = packed_copies(bench, rival, linears.copies)
                if packed is None:
                    break
                if first and rival.close:
                    notes += [f"* {rival.name} {held(rival, linears.copies[0])}"]
            wide = x.double() @ linears.copies[0].weight(torch.float64).T
            name = f"ours ({choose(packed[0], x).__name__})" if rival.name == "ours" else rival.name
            limit = {} if rival.close is None else {"close": rival.close}
            line = bench.measured(linears, rows, name, partial(rival.multiply, x=x), packed, wide, **limit)
            cells.setdefault((rows, name), {})[label] = line
        if bench.late():
            notes += [f"* {rival.name}: out of time, what is missing was not measured"]
        table = table_of(cells, bench.settings.shapes.split(","), notes, ", torch ".join(bench.device().values()))
        if bench.file:
            (bench.file.parent / "int4_rivals.md").write_text(table)
    print(table, flush=True)
    return table


def packed_copies(bench: "Bench", rival: Rival, copies: Sequence[Int4Linear]) -> list | None:
    """None for one that is not there, or cannot pack them, which is told."""
    try:
        return [rival.pack(linear) for linear in copies]
    except ImportError as error:
        print(f"{rival.name}: not installed (pip install {rival.package}): {error}", flush=True)
    except Exception as error:  # whatever a package does
        bench.failed += 1
        print(f"{rival.name}: failed: {type(error).__name__}: {error}".splitlines()[0][:300], flush=True)
    return None


def rounded_share(linear: Int4Linear) -> float:
    """Of the groups whose offset (8 - zero) * step is no bf16."""
    exact = (8 - linear.zeros.double()) * linear.scales.double()
    return float((exact.bfloat16().double() != exact).double().mean())


def held(rival: Rival, linear: Int4Linear) -> str:
    if not rival.offsets:
        return EXACT
    share = rounded_share(linear)
    return f"cannot hold our zero points exactly: bf16 rounds the offset (8 - zero) * step of {share:.0%} of the groups"


def table_of(cells: Cells, shapes: Sequence[str], notes: Sequence[str], device: str) -> str:
    """Markdown. Times ours: all shapes together, where both have them all."""
    lines = [
        f"{device}; weights cold; microseconds (TB/s); error: the largest relative L2 from the float64 product",
        "",
        f"| rows | | {' | '.join(shapes)} | times ours | error |",
        "|---" * (len(shapes) + 4) + "|",
    ]
    for rows in sorted({rows for rows, _ in cells}):
        named = {name: lines for (count, name), lines in cells.items() if count == rows}
        ours = next((total_us(found, shapes) for name, found in named.items() if name.startswith("ours")), None)
        for name, found in named.items():
            total = total_us(found, shapes)
            times = f"{total / ours:.2f}" if total and ours else ""
            error = max((line["error"] for line in found.values() if "error" in line), default=None)
            row = [str(rows), name, *(cell(found.get(shape)) for shape in shapes), times]
            lines.append(f"| {' | '.join(row)} | {'' if error is None else f'{error:.1e}'} |")
    return "\n".join([*lines, "", *notes]) + "\n"


def total_us(found: Mapping[str, Mapping], shapes: Sequence[str]) -> float | None:
    """None unless every shape has a time."""
    each = [found.get(shape, {}).get("us") for shape in shapes]
    return None if None in each else sum(each)


def cell(line: Mapping | None) -> str:
    if line is None:
        return ""
    return f"{line['us']:.1f} ({line['tb_s']:.2f})" if "us" in line else "failed"
