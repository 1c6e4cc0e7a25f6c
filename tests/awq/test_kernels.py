"""The Triton forms of the inner loops, in the interpreter on a CPU, against the torch forms."""

import pytest
import torch

pytest.importorskip("triton")

from lance_quant.awq import clip, compensate, descend, kernels  # noqa: E402
from lance_quant.awq.config import RecipeConfig  # noqa: E402
from lance_quant.awq.grid import Grid  # noqa: E402
from lance_quant.awq.rounding import draft  # noqa: E402
from tests.drawn import DEVICE, random, seed  # noqa: E402, F401


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("count, outputs", [(32, 40), (24, 7)])
def test_compensate_block(holds, count, outputs):
    block, step = random(count, outputs), random(count, outputs).abs() / 8 + 0.05
    zero = torch.randint(0, 16, (count, outputs), device=DEVICE).float()
    onward, share = random(count, count).triu() / 8, random(count).abs()
    fixed = torch.rand(count, outputs, device=DEVICE) < 0.2
    exact = random(count, outputs) if holds else None
    rest = exact, fixed, step, zero, onward, share, 15
    ours, theirs = compensate.Columns(block.clone(), *rest), compensate.Columns(block.clone(), *rest)
    torch.testing.assert_close(
        kernels.compensate_block(ours), compensate.compensate_block(theirs), rtol=1e-4, atol=1e-5
    )  # fmt: skip
    torch.testing.assert_close(ours.latent, theirs.latent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count, outputs", [(32, 40), (24, 7)])
def test_descend_block(count, outputs):
    codes = torch.randint(0, 16, (count, outputs), device=DEVICE).float()
    step, free = random(outputs).abs() / 8 + 0.05, (torch.rand(outputs, device=DEVICE) < 0.8).float()
    x = random(100, count)
    within = x.T @ x
    change = random(count, outputs) / 8
    state = codes, change, within @ change
    rest = step, torch.zeros_like(step), free, within, within.diagonal().reciprocal(), 15
    ours, theirs = (descend.Group(*(part.clone() for part in state), *rest) for _ in range(2))
    kernels.descend_block(ours)
    descend.descend_block(theirs)
    assert not torch.equal(theirs.codes, codes)
    torch.testing.assert_close(ours.codes, theirs.codes)
    torch.testing.assert_close(ours.change, theirs.change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group, outputs", [(32, 40), (24, 7)])
def test_clip_rows(group, outputs):
    weight = random(outputs, 3 * group)
    weight[1], weight[2, :group] = 0, 0.75
    made = draft(weight, Grid(bits=4, group_size=group))
    x = random(200, 3 * group)
    blocks = clip.group_blocks(x.T @ x, group)
    recipe = RecipeConfig(clip_steps=4)
    step, zero, below, above = kernels.clip_rows(made, blocks, recipe)
    wanted = clip.clip_rows(made, blocks, recipe)
    assert (below < 1).any() and (above < 1).any()
    for ours, theirs in zip((step, zero, below, above), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
