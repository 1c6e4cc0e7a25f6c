"""Clip: shrink the two ends of a group's range apart, where the error in the outputs falls by it.

A table of `RecipeConfig.clip`: "linear" takes one pair of shares for a whole linear, by its whole second moments;
"group" a pair for each group of each row, by the second moments within the group.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.forms import form_of
from lance_quant.awq.grid import grouped
from lance_quant.awq.rounding import Draft, rows_of, with_range

BLOCK = 2**24  # weights at work at once


def shares(recipe: RecipeConfig) -> list[float]:
    """Of a group's end that is kept: 1 first, so that not to clip wins where all are equal."""
    steps = recipe.clip_steps
    return [1 - (1 - recipe.clip_least) * step / (steps - 1) for step in range(steps)]


def group_blocks(moments: Tensor, group_size: int) -> Tensor:
    """Second moments [I, I] -> those within each group [I/G, G, G]."""
    count = len(moments) // group_size
    within = torch.arange(count, device=moments.device)
    return moments.view(count, group_size, count, group_size)[within, :, within, :]


def clip_linear(made: Draft, moments: Tensor, recipe: RecipeConfig) -> tuple[Draft, float, float]:
    """The draft over shorter ranges, and the two shares that all of them kept."""
    groups = grouped(made.latent, made.grid.group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best, least, chosen = made, None, (1.0, 1.0)
    for below in shares(recipe):
        for above in shares(recipe):
            trial = made if below == above == 1 else with_range(made, low * below, high * above)
            change = trial.weight() - made.latent
            error = ((change @ moments) * change).sum(dtype=torch.float64).item()
            if least is None or error < least:
                best, least, chosen = trial, error, (below, above)
    return best, *chosen


def clip_groups(made: Draft, moments: Tensor, recipe: RecipeConfig) -> tuple[Draft, float, float]:
    """The draft over shorter ranges, and the means of the shares that they kept."""
    blocks = group_blocks(moments, made.grid.group_size)
    rows = max(1, BLOCK // made.latent.shape[1])
    clip = form_of(clip_rows, moments)
    parts = [clip(rows_of(made, start, start + rows), blocks, recipe) for start in range(0, len(made.latent), rows)]
    step, zero, below, above = (torch.cat(column) for column in zip(*parts, strict=True))
    return replace(made, step=step, zero=zero), below.mean().item(), above.mean().item()


def clip_rows(made: Draft, blocks: Tensor, recipe: RecipeConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(step, zero, share of the low end, of the high end), each [O, I/G]."""
    groups = grouped(made.latent, made.grid.group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = None
    for below in shares(recipe):
        for above in shares(recipe):
            trial = made if below == above == 1 else with_range(made, low * below, high * above)
            change = (trial.weight() - made.latent).view(groups.shape)
            # one product a group: [I/G, O, G] x [I/G, G, G]
            error = (torch.bmm(change.transpose(0, 1), blocks).transpose(0, 1) * change).sum(-1)
            found = (error, trial.step, trial.zero, torch.full_like(error, below), torch.full_like(error, above))
            if best is None:
                best = found
                continue
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    return best[1:]


CLIPS = {"linear": clip_linear, "group": clip_groups}
