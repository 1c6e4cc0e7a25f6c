"""Configs of the Triton kernels that int4_kernels.py compares, each with its call and what it should give."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from lance_quant.runtime.kernels.dequantize import DequantizeConfig, dequantize
from lance_quant.runtime.kernels.few import MOST_ROWS as FEW_ROWS
from lance_quant.runtime.kernels.few import FewConfig, few
from lance_quant.runtime.kernels.gemm import GemmConfig, gemm
from lance_quant.runtime.kernels.gemv import MOST_ROWS as GEMV_ROWS
from lance_quant.runtime.kernels.gemv import Around, GemvConfig, gemv

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """table: where the best config goes. call(linear, x). exact(x, wide): the result, from the float64 product."""

    table: str
    config: object
    call: Callable
    exact: Callable[[Tensor, Tensor], Tensor] = lambda x, wide: wide


def dequantizers(linear) -> list[Candidate]:
    buffer = torch.empty(linear.out_features, linear.in_features, dtype=torch.bfloat16, device=linear.qweight.device)
    sizes = [(32 * warps, turns, warps) for warps, turns in product((2, 4, 8, 16), (1, 2, 4, 8))]
    sizes += [(512, 2, 8), (1024, 1, 8), (1024, 2, 8)]  # more than a word a thread at a time
    return [
        Candidate(
            table="kernels/dequantize.py DequantizeConfig",
            config=DequantizeConfig(*size),
            call=lambda linear, x, size=size: dequantize(*linear.packed, buffer, DequantizeConfig(*size)),
        )
        for size in sizes
    ]


def gemvs(label: str, shape: tuple[int, int], rows: int) -> list[Candidate]:
    """With what stands around each linear in a decode step."""
    if rows > GEMV_ROWS:
        return []
    wide = shape[1] > 4096
    words = ((256, 2), (512, 4), (1024, 8), (2048, 8)) if wide else ((256, 1), (256, 2), (256, 4), (128, 1))
    configs = [GemvConfig(block_o, *each) for block_o, each in product((2, 4, 8, 16), words)]
    around = Surroundings(label)
    return [
        Candidate(
            table="kernels/gemv.py TUNED",
            config=config,
            call=lambda linear, x, config=config: gemv(x, linear.packed, around=around.of(linear, x), config=config),
            exact=around.exact,
        )
        for config in configs
    ]


class Surroundings:
    """What a decode step does in the kernel of a linear: norm, SiLU and residual."""

    def __init__(self, label: str):
        self.normed, self.silu_mul, self.added = label in ("qkv", "gate_up"), label == "gate_up", label in ("o", "down")
        self.gain = self.residual = None

    def of(self, linear, x: Tensor) -> Around:
        if self.normed and self.gain is None:
            self.gain = torch.ones(linear.in_features, dtype=torch.bfloat16, device=x.device)
        if self.added and self.residual is None:
            self.residual = torch.ones(len(x), linear.out_features, dtype=torch.bfloat16, device=x.device)
        return Around(gain=self.gain, eps=EPS, silu_mul=self.silu_mul, residual=self.residual)

    def exact(self, x: Tensor, wide: Tensor) -> Tensor:
        if self.normed:
            wide = wide / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        if self.silu_mul:
            return silu_of(x, wide)
        return wide + 1 if self.added else wide


# tiles, warps, splits, stretch, ahead
MANY_OUTPUTS = (  # with SiLU, so that a tile is 32 rows of W
    (1, 8, 1, 256, 1), (1, 8, 1, 128, 2), (1, 8, 1, 128, 1), (1, 16, 1, 128, 1), (1, 4, 1, 256, 2), (1, 4, 1, 256, 1),
    (1, 4, 1, 128, 4), (1, 4, 1, 128, 2), (1, 4, 1, 128, 1), (1, 4, 1, 512, 1), (1, 2, 1, 128, 4), (1, 2, 1, 128, 2),
    (1, 2, 2, 256, 2), (1, 4, 2, 256, 1), (2, 8, 1, 128, 2), (2, 8, 1, 128, 1),
)  # fmt: skip
MANY_OUTPUTS_ALONE = (
    (1, 8, 1, 256, 1), (1, 8, 1, 128, 2), (1, 4, 1, 256, 2), (1, 4, 1, 256, 1), (1, 4, 1, 128, 4), (1, 4, 1, 128, 2),
    (1, 4, 1, 512, 1), (1, 2, 1, 256, 2), (1, 2, 1, 128, 4), (2, 8, 1, 256, 1), (2, 8, 1, 128, 1), (2, 4, 1, 128, 2),
)  # fmt: skip
FEW_OUTPUTS = (
    (1, 8, 1, 256, 1), (1, 16, 1, 128, 1), (1, 8, 1, 128, 2), (1, 4, 1, 256, 2), (1, 4, 1, 128, 4), (1, 4, 1, 512, 1),
    (1, 4, 2, 256, 1), (1, 4, 2, 128, 2), (1, 8, 2, 128, 1), (1, 2, 4, 256, 1), (1, 4, 4, 128, 1), (1, 2, 2, 256, 2),
    (2, 8, 1, 256, 1), (2, 8, 1, 128, 2), (2, 8, 2, 128, 1), (2, 4, 2, 256, 1), (2, 4, 4, 128, 1),
)  # fmt: skip
LONG_INPUTS = (  # 43 stretches of 256 each
    (1, 4, 4, 256, 3), (1, 4, 4, 256, 2), (1, 4, 11, 256, 1), (1, 4, 6, 256, 2), (1, 4, 3, 256, 2), (1, 4, 2, 256, 2),
    (1, 8, 6, 256, 1), (1, 8, 3, 256, 2), (1, 8, 2, 256, 3), (1, 8, 2, 256, 2), (1, 8, 1, 256, 2),
    (1, 16, 3, 256, 1), (1, 16, 1, 256, 2), (1, 2, 8, 256, 3), (1, 2, 11, 256, 2),
    (1, 4, 6, 128, 4), (1, 4, 8, 128, 3), (1, 4, 11, 128, 2), (1, 8, 4, 128, 3), (1, 8, 3, 128, 4), (1, 16, 2, 128, 3),
    (2, 4, 11, 256, 1), (2, 8, 6, 256, 1), (2, 8, 3, 256, 1), (2, 4, 6, 256, 1),
    (2, 4, 11, 128, 2), (2, 4, 6, 128, 2), (2, 8, 4, 128, 2), (2, 8, 6, 128, 2), (2, 16, 3, 128, 2),
)  # fmt: skip


def fews(label: str, shape: tuple[int, int], rows: int) -> list[Candidate]:
    """Those whose threads have 64 to 128 bytes of codes on their way, for the kind of shape; gate and up with SiLU, and
    some without."""
    if not 1 < rows <= FEW_ROWS:
        return []
    sizes = LONG_INPUTS if shape[1] > 4096 else MANY_OUTPUTS_ALONE if shape[0] > 4096 else FEW_OUTPUTS
    table = "kernels/few.py TUNED"
    if label != "gate_up":
        return [_few_candidate(FewConfig(*size), table) for size in sizes]
    found = [_few_candidate(FewConfig(*size), table, silu_mul=True) for size in MANY_OUTPUTS]
    return found + [_few_candidate(FewConfig(*size), "kernels/few.py, without SiLU") for size in sizes]


def _few_candidate(config: FewConfig, table: str, silu_mul: bool = False) -> Candidate:
    return Candidate(
        table=table,
        config=config,
        call=lambda linear, x: few(x, linear.packed, config=config, silu_mul=silu_mul),
        exact=silu_of if silu_mul else Candidate.exact,
    )


def silu_of(x: Tensor, wide: Tensor) -> Tensor:
    gate, up = wide.chunk(2, -1)
    return F.silu(gate) * up


def gemms(shape: tuple[int, int], rows: int) -> list[Candidate]:
    """Those that give each of some 130 multiprocessors one to sixteen programs."""
    if not FEW_ROWS < rows <= 128:
        return []
    block_m = max(16, min(64, 1 << (rows - 1).bit_length()))
    sizes = product(((16, 1), (32, 2), (64, 4)), (16, 32), (1, 2, 4, 8), (3, 4))
    configs = [
        GemmConfig(block_o, block_w, splits, warps, block_m, stages)
        for (block_o, warps), block_w, splits, stages in sizes
        if 130 <= shape[0] / block_o * splits <= 2112 or shape[0] < 1024
    ]
    return [
        Candidate(
            table="kernels/gemm.py TUNED",
            config=config,
            call=lambda linear, x, config=config: gemm(x, linear.packed, config=config),
        )
        for config in configs
    ]
