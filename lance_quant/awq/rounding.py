"""`Draft`: a weight on its way to codes, which every way of rounding takes and returns.

codes = clamp(round(latent / step + zero + offset)), weight = (codes - zero) * step. Rounding to nearest leaves the
latent weight as it is; error compensation moves it; learning moves offset, step and zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lance_quant.awq.grid import MIN_SCALE, Grid, Rounded, grouped, step_and_zero


@dataclass(frozen=True)
class Draft:
    """latent float32 [O, I]; step, zero float32 [O, I/G], step as it is stored; offset in -0.5..0.5 [O, I] or None.

    constant: bool [O, I/G], groups of one value, which is one step, off by its rounding to bf16 alone: nothing may move
    them.
    """

    latent: Tensor
    step: Tensor
    zero: Tensor
    constant: Tensor
    grid: Grid
    offset: Tensor | None = None

    def codes(self) -> Tensor:
        """float32 [O, I/G, G]."""
        exact = grouped(self.latent, self.grid.group_size) / self.step[..., None] + self.zero[..., None]
        if self.offset is not None:
            exact = exact + grouped(self.offset, self.grid.group_size)
        return exact.round().clamp(0, self.grid.top)

    def weight(self) -> Tensor:
        """float32 [O, I]."""
        return ((self.codes() - self.zero[..., None]) * self.step[..., None]).view(self.latent.shape)

    def rounded(self) -> Rounded:
        codes = self.codes().view(self.latent.shape).to(torch.uint8)
        return Rounded(codes, self.step.to(torch.bfloat16), self.zero.to(torch.uint8))


def draft(weight: Tensor, grid: Grid) -> Draft:
    """Round to nearest over each group's whole range."""
    groups = grouped(weight, grid.group_size)
    return Draft(weight, *step_and_zero(groups, grid), groups.amin(-1) == groups.amax(-1), grid)


def rows_of(made: Draft, start: int, end: int) -> Draft:
    """Output rows of a draft."""
    offset = None if made.offset is None else made.offset[start:end]
    parts = (part[start:end] for part in (made.latent, made.step, made.zero, made.constant))
    return Draft(*parts, made.grid, offset)


def unstacked(made: Draft, counts: Sequence[int]) -> list[Draft]:
    """The other way: so many output rows each."""
    starts = [sum(counts[:place]) for place in range(len(counts))]
    return [rows_of(made, start, start + count) for start, count in zip(starts, counts, strict=True)]


def stacked(drafts: list[Draft]) -> Draft:
    """Drafts of linears that read the same input, as one."""
    parts = [torch.cat([getattr(one, name) for one in drafts]) for name in ("latent", "step", "zero", "constant")]
    return Draft(*parts, drafts[0].grid)


def with_range(made: Draft, low: Tensor, high: Tensor) -> Draft:
    """The draft over other ends [O, I/G] of its groups (low <= 0 <= high), constant groups aside."""
    grid = made.grid
    step = ((high - low) / grid.top).clamp(min=MIN_SCALE).to(torch.bfloat16).float()
    zero = (-low / step).round().clamp(0, grid.top)
    return replace(
        made, step=torch.where(made.constant, made.step, step), zero=torch.where(made.constant, made.zero, zero)
    )
