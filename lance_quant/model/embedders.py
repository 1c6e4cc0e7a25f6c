"""Timestep and latent position embeddings of the generation side (Lance spec sec. 11)."""

import math

import torch
from torch import nn

from lance_quant.checkpoint.layout import TIME_FREQUENCIES


class TimeEmbedder(nn.Module):
    """Timestep in [0, 1] -> hidden, through a sinusoid (cos first, not scaled by 1000) and two linears."""

    def __init__(self, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """t float32 [...] -> [..., H] in the linears' dtype."""
        half = TIME_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[..., None] * torch.exp(-math.log(10000.0) * steps / half)
        sinusoid = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(sinusoid.to(self.mlp[0].weight.dtype))


def latent_positions(grid: tuple[int, int, int], hidden: int, device="cpu") -> torch.Tensor:
    """Rows of the fixed 3-D sinusoid for a latent grid (t, h, w): float32 [t*h*w, hidden], row-major.

    Computed for the grid in use, never held as a table: the rows of an image are those of a clip's first frame, so the
    image and the video model share them. sin comes first, unlike in the timestep's sinusoid.
    """
    even = hidden // 3 // 2 * 2
    widths = (even, even, hidden - 2 * even)
    t, h, w = grid
    # rounded before they are spread: 20,000 rows of float64 on the CPU take seconds
    axes = [_axis(count, width).float().to(device) for count, width in zip(grid, widths, strict=True)]
    parts = [
        axes[0][:, None, None, :].expand(t, h, w, -1),
        axes[1][None, :, None, :].expand(t, h, w, -1),
        axes[2][None, None, :, :].expand(t, h, w, -1),
    ]
    return torch.cat(parts, dim=-1).flatten(0, 2)


def _axis(count: int, width: int) -> torch.Tensor:
    omega = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.arange(count, dtype=torch.float64)[:, None] * omega
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
