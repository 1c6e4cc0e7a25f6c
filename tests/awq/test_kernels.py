"""The Triton forms of the inner loops, in the interpreter on a CPU, against the torch forms."""

import pytest
import torch

pytest.importorskip("triton")

from lance_quant.awq import compensate, descend, kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("count, outputs", [(32, 40), (24, 7)])
def test_compensate_block(holds, count, outputs):
    block, step = random(count, outputs), random(count, outputs).abs() / 8 + 0.05
    zero = torch.randint(0, 16, (count, outputs), device=DEVICE).float()
    onward, share = random(count, count).triu() / 8, random(count).abs()
    fixed = torch.rand(count, outputs, device=DEVICE) < 0.2
    exact = random(count, outputs) if holds else None
    ours, theirs = block.clone(), block.clone()
    errors = kernels.compensate_block(ours, exact, fixed, step, zero, onward, share, 15)
    wanted = compensate.compensate_block(theirs, exact, fixed, step, zero, onward, share, 15)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count, outputs", [(32, 40), (24, 7)])
def test_descend_block(count, outputs):
    codes = torch.randint(0, 16, (count, outputs), device=DEVICE).float()
    step, free = random(outputs).abs() / 8 + 0.05, (torch.rand(outputs, device=DEVICE) < 0.8).float()
    x = random(100, count)
    within = x.T @ x
    change = random(count, outputs) / 8
    state = [codes, change, within @ change]
    ours, theirs = [part.clone() for part in state], [part.clone() for part in state]
    rest = step, free, within, within.diagonal().reciprocal(), 15
    kernels.descend_block(*ours, *rest)
    descend.descend_block(*theirs, *rest)
    assert not torch.equal(theirs[0], codes)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)
