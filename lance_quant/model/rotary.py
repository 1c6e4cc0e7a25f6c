"""Multimodal rotary embedding: each frequency turns with one of three position axes (Lance spec sec. 9)."""

from functools import cache

import torch


@cache
def frequencies_on(
    device: torch.device, head_dim: int, theta: float, section: tuple[int, int, int], bf16: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(inverse frequencies, axis 0..2 that each follows), both [head_dim / 2]; sent to a device once, not per call."""
    axes = torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    return inverse_frequencies(head_dim, theta, bf16).to(device), axes.to(device)


def inverse_frequencies(head_dim: int, theta: float, bf16: bool) -> torch.Tensor:
    """theta^(-2j / head_dim) for j < head_dim / 2, float32.

    bf16: round them to 8 mantissa bits, as upstream's `.to(bfloat16)` does to the buffer (quirk Q6).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    return frequencies.to(torch.bfloat16).float() if bf16 else frequencies


def rotary_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, axes: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [..., n, head_dim] in `dtype`, of positions [..., 3, n] (axes t, h, w).

    Angles are float32; each frequency follows the axis that `axes` names. Halves are duplicated (rotate-half).
    """
    per_frequency = positions.float().index_select(-2, axes).transpose(-1, -2)  # [..., n, head_dim / 2]
    angles = per_frequency * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, heads, n, head_dim] turned by tables [n, head_dim] or [B, n, head_dim]."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
