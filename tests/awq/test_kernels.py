"""The Triton forms of the inner loops, in the interpreter on a CPU, against the torch forms."""

import pytest
import torch

pytest.importorskip("triton")

from lance_quant.awq import clip, compensate, descend, kernels, score  # noqa: E402
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
def test_descend_group(count, outputs):
    codes = torch.randint(0, 16, (count, outputs), device=DEVICE).float()
    step, zero = (random(outputs).abs() / 8 + 0.05).bfloat16().float(), torch.randint(0, 16, (outputs,)).float()
    zero, free = zero.to(DEVICE), (torch.rand(outputs, device=DEVICE) < 0.8).float()
    x = random(100, count)
    within = x.T @ x
    change = random(count, outputs) / 8 + 0.05
    moving = codes, change, within @ change, within @ (codes - zero), step, zero
    fixed = free, within, within.sum(1), within.diagonal().reciprocal(), 15
    ours, theirs = (descend.Group(*(part.clone() for part in moving), *fixed) for _ in range(2))
    kernels.descend_group(ours)
    descend.descend_group(theirs)
    for name, was in (("codes", codes), ("step", step), ("zero", zero)):
        assert not torch.equal(getattr(theirs, name), was), name
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.change, theirs.change, rtol=1e-4, atol=1e-5)
    held = free == 0
    assert torch.equal(ours.codes[:, held], codes[:, held]) and torch.equal(ours.change[:, held], change[:, held])


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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group, outputs", [(32, 100), (24, 7)])
def test_rounding_change(group, outputs, bits):
    weight, columns = random(outputs, 3 * group), random(3 * group).abs() + 0.1
    columns[:group] = 2.0
    weight[1], weight[2, :group], weight[3] = 0, -0.3, weight[3].abs() + 0.5
    for stored in (True, False):
        grid = Grid(bits=bits, group_size=group, bf16_scale_codes=stored)
        ours, theirs = (form.rounding_change(weight, columns, grid) for form in (kernels, score))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
