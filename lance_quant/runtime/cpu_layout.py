"""Codes as torch's int4 kernel for CPUs wants them: blocks of rows, a block's rows side by side at each input.

The block's height is the CPU's (32 rows with AVX2, 64 with AVX-512) and torch does not tell it, so a known pattern is
packed once and looked at. Bytes stay [O, I/2], and a block's bytes stay where its rows were.
"""

from functools import cache

import torch
from torch import Tensor

GROUPS = (32, 64, 128, 256)  # what the kernel serves


@cache
def block_rows() -> int | None:
    """Rows of a block; None where this torch or CPU has a layout that is none of the known ones."""
    pack = getattr(torch, "_convert_weight_to_int4pack_for_cpu", None)
    if pack is None or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    codes = torch.randint(0, 16, (128, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = pack(codes, 1).view(torch.uint8).view(128, 32)
    return next((rows for rows in (32, 64) if torch.equal(pack_rows(codes.to(torch.uint8), rows), packed)), None)


def pack_rows(codes: Tensor, rows: int) -> Tensor:
    """uint8 codes [O, I] -> uint8 [O, I/2]: at each input of a block, row r in the low nibble beside r + rows / 2."""
    outputs, inputs = codes.shape
    low, high = codes.view(-1, rows, inputs).transpose(1, 2).chunk(2, dim=-1)
    return (low | (high << 4)).contiguous().view(outputs, inputs // 2)  # of one block it is a view in another order


def unpack_rows(packed: Tensor, rows: int) -> Tensor:
    """uint8 [O, I/2] of whole blocks -> uint8 codes [O, I]."""
    outputs, half = packed.shape
    blocks = packed.view(-1, 2 * half, rows // 2)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2).reshape(outputs, 2 * half)


def terms(scales: Tensor, zeros: Tensor) -> Tensor:
    """bf16 [I/G, O, 2]: scale, and what a code of 0 is worth when codes count from 8: (8 - zero) * scale, rounded."""
    shift = (8 - zeros.float()) * scales.float()
    return torch.stack((scales, shift.to(scales.dtype)), dim=-1).transpose(0, 1).contiguous()


def multiply(x: Tensor, packed: Tensor, group_size: int, both: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, both)
