"""Group-wise asymmetric rounding: weight = (code - zero) * scale, codes and zero in 0..2^bits - 1.

Two variants of one arithmetic. The published one takes a group's range as it is, clamps the zero point, and computes
codes with the float32 scale: a group of one sign loses up to min|w| at its far end. The repaired one
(`zero_in_range`, `bf16_scale_codes`) stretches the range to include 0 and rounds against the scale that is stored.
"""

from dataclasses import dataclass

import torch

from lance_quant.awq.config import RecipeConfig

PUBLISHED_MIN_SCALE = 1e-8
PUBLISHED_TRIAL_MIN_SCALE = 1e-5
MIN_SCALE = 2.0**-100  # of an all-zero group: representable in bf16, and nothing is divided by zero


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a weight is rounded to. group_size: inputs that share a scale."""

    bits: int
    group_size: int
    zero_in_range: bool = True
    bf16_scale_codes: bool = True

    @property
    def top(self) -> int:
        return 2**self.bits - 1


@dataclass(frozen=True)
class Rounded:
    """codes uint8 [O, I], scales bf16 [O, I/G], zeros uint8 [O, I/G]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """float32 [O, I]."""
        outputs, groups = self.scales.shape
        codes = self.codes.view(outputs, groups, -1).float()
        return ((codes - self.zeros[..., None].float()) * self.scales[..., None].float()).view(outputs, -1)


def grid_of(recipe: RecipeConfig, bits: int, group_size: int) -> Grid:
    """The recipe's variant."""
    return Grid(
        bits=bits,
        group_size=group_size,
        zero_in_range=recipe.zero_in_range,
        bf16_scale_codes=recipe.bf16_scale_codes,
    )


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[O, I] -> [O, I/G, G]."""
    return weight.view(weight.shape[0], -1, group_size)


def step_and_zero(groups: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, both float32 [O, I/G], of groups [O, I/G, G]."""
    low, high = groups.amin(-1), groups.amax(-1)
    if not grid.zero_in_range:
        scale = ((high - low) / grid.top).clamp(min=PUBLISHED_MIN_SCALE)
        scale = scale.to(torch.bfloat16).float() if grid.bf16_scale_codes else scale
        return scale, (-low / scale).round().clamp(0, grid.top)
    constant = torch.where(low == high, low.abs(), 0.0)  # one step of its own size: what bf16 takes is lost alone
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.where(constant > 0, constant, (high - low) / grid.top).clamp(min=MIN_SCALE)
    if grid.bf16_scale_codes:
        scale = scale.to(torch.bfloat16).float()
    return scale, (-low / scale).round().clamp(0, grid.top)


def quantize(weight: torch.Tensor, grid: Grid) -> Rounded:
    """Round float32 weights [O, I] to nearest, half to even, the zero point added before rounding."""
    groups = grouped(weight, grid.group_size)
    scale, zero = step_and_zero(groups, grid)
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, grid.top)
    return Rounded(codes.view(weight.shape).to(torch.uint8), scale.to(torch.bfloat16), zero.to(torch.uint8))


def published_trial(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The rounding inside the published search, dequantized, float32 [O, I]: its zero point is not clamped."""
    groups = grouped(weight, grid.group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / grid.top).clamp(min=PUBLISHED_TRIAL_MIN_SCALE)
    zero = (-low / scale).round()
    return (((groups / scale + zero).round().clamp(0, grid.top) - zero) * scale).view(weight.shape)
