"""`triton_dequant_cublas`: many rows of x by codes that become bf16 first, piece by piece.

    chunked(linear, x)                   # pieces into one buffer of the device, each multiplied at once
    gated(gate_up, x)                    # the same with SiLU-times behind each piece

Pieces begin and end at multiples of 256 outputs: cuBLAS then finds whole tiles, and rows of the result start at 16
bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lance_quant.runtime.ops import silu_mul

if TYPE_CHECKING:
    from lance_quant.runtime.int4_linear import Int4Linear

# at a time, 50 MB of bf16: gate and up in two pieces, all others whole, docs/performance.md
PIECE_ELEMENTS = 24 * 2**20
# of x at a time: with 11,264 outputs 1,584 tiles of 128 x 256, twelve for each of an H100's processors
GATED_ROWS = 4608
MANY_ROWS = 8192  # above, tiles always come out even, and products of all rows at once are 1 % faster
TILE, TILE_ROWS = 256, 128  # outputs and rows
ALIGNED = 8  # bf16 in 16 bytes


def pieces(outputs: int, inputs: int, elements: int | None = None) -> list[slice]:
    """Outputs of a weight in even pieces of at most `elements` (by default PIECE_ELEMENTS), of whole tiles each.

    A tile is never split, but where one alone is too large.
    """
    fit = (elements or PIECE_ELEMENTS) // inputs
    unit = TILE if fit >= TILE else ALIGNED
    most = max(unit, fit // unit * unit)
    step = ceil(ceil(outputs / ceil(outputs / most)) / unit) * unit
    return [slice(first, min(first + step, outputs)) for first in range(0, outputs, step)]


def triton_dequant_cublas(linear: "Int4Linear", x: Tensor) -> Tensor:
    """x bf16 [M, I] -> [M, O]."""
    return chunked(linear, x)


def chunked(linear: "Int4Linear", x: Tensor, elements: int | None = None) -> Tensor:
    """Piece by piece through one buffer of the device. Calls on two streams would share the buffer."""
    parts = _parts(linear, elements or PIECE_ELEMENTS)
    if len(parts) == 1:
        return torch.nn.functional.linear(x, parts[0].made(), linear.bias)
    out = x.new_empty(x.shape[0], linear.out_features)
    for part in parts:
        bias = None if linear.bias is None else linear.bias[part.rows]
        _product(x, part.made(), bias, out[:, part.rows])
    return out


def gated(gate_up: "Int4Linear", x: Tensor, elements: int | None = None, most: int | None = None) -> Tensor:
    """silu(gate) * up of x bf16 [M, I] -> [M, O / 2], `most` rows of x and a piece of gate and up at a time.

    Gate and up never exist as a whole: of a guided pair a half does.
    """
    rows_in_all = x.shape[0]
    most = most or (GATED_ROWS if rows_in_all <= MANY_ROWS else rows_in_all)
    parts = _parts(gate_up, elements or PIECE_ELEMENTS, gated=True)
    half, steps = gate_up.out_features // 2, _even(rows_in_all, most)
    out, room = x.new_empty(rows_in_all, half), x.new_empty(steps[0].stop * parts[0].weight.shape[0])
    for part in parts:
        weight, width = part.made(), part.weight.shape[0]
        bias = None
        if gate_up.bias is not None:
            bias = torch.cat((gate_up.bias[:half][part.rows], gate_up.bias[half:][part.rows]))
        for rows in steps:
            both = room[: (rows.stop - rows.start) * width].view(-1, width)
            _product(x[rows], weight, bias, both)
            silu_mul(both, out[rows, part.rows])
    return out


def _even(rows: int, most: int) -> list[slice]:
    """So many rows in steps of whole tiles' height, none above `most`."""
    step = ceil(ceil(rows / ceil(rows / most)) / TILE_ROWS) * TILE_ROWS
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


@dataclass(frozen=True)
class Part:
    """Outputs `rows` of a linear: their weight in a buffer that others use too, and what makes it anew."""

    rows: slice
    weight: Tensor
    make: Callable[[], None]

    def made(self) -> Tensor:
        self.make()
        return self.weight


_PARTS: WeakKeyDictionary = WeakKeyDictionary()  # linear -> what it was cut into: (addresses, by what and how)


def forget_parts(linear: "Int4Linear") -> None:
    """To be called where its codes are given up: what it was cut into holds them."""
    _PARTS.pop(linear, None)


def _parts(linear: "Int4Linear", elements: int, gated: bool = False) -> Sequence[Part]:
    """A weight in pieces, ready to be made. gated: each of `rows` of the first half and those of the second."""
    packed = linear.packed
    addresses, kept = tuple(part.data_ptr() for part in packed), _PARTS.get(linear)
    if kept is None or kept[0] != addresses:
        _PARTS[linear] = kept = addresses, {}
    found = kept[1]
    parts = found.get((elements, gated))
    if parts is None:
        cut, sides = _cut(linear, elements, gated), 2 if gated else 1
        buffer = _buffer(packed[0].device, max(elements, sides * (cut[0].stop - cut[0].start) * linear.in_features))
        parts = [_part(linear, rows, buffer, linear.out_features // 2 if gated else 0) for rows in cut]
        found[elements, gated] = parts
    return parts


def _cut(linear: "Int4Linear", elements: int, gated: bool) -> list[slice]:
    sides = 2 if gated else 1
    return pieces(linear.out_features // sides, sides * linear.in_features, elements)


def _part(linear: "Int4Linear", rows: slice, buffer: Tensor, further: int = 0) -> Part:
    """further: with each row goes the one so many rows on, behind all of them."""
    from lance_quant.runtime.kernels.dequantize import dequantizing

    count = rows.stop - rows.start
    weight = buffer[: (2 if further else 1) * count * linear.in_features].view(-1, linear.in_features)
    seen = slice(rows.start, rows.stop + further)
    gap = (count, further - count) if further else (0, 0)
    return Part(rows, weight, dequantizing(tuple(part[seen] for part in linear.packed), weight, gap=gap))


def reserve(device: torch.device) -> None:
    """Make the buffer of `chunked` now: one made while a graph is captured would belong to the graph."""
    _buffer(device, PIECE_ELEMENTS)


@cache
def _buffer(device: torch.device, elements: int) -> Tensor:
    return torch.empty(elements, dtype=torch.bfloat16, device=device)
