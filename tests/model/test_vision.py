"""The vision tower with its windows in batches, against the library's own attention, window by window."""

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from lance_quant.model.vision import Plans, build_vision_tower, rows_by_length
from tests.random_checkpoint import VISION

GRIDS = {
    "whole windows": [[1, 8, 16]],
    "odd edges": [[1, 10, 22]],
    "smaller than a window": [[1, 4, 6]],
    "a clip": [[3, 10, 12]],
    "two pictures and a clip": [[1, 8, 8], [1, 6, 20], [2, 12, 10]],
}


@pytest.fixture(scope="module")
def towers():
    """Ours and the stock one with the same weights, float32."""
    made = []
    for _ in range(2):
        tower = build_vision_tower(VISION | {"depth": 3}, torch.float32).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(1)
        for parameter in tower.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * max(1, parameter[0].numel()) ** -0.5
        tower.rotary_pos_emb.__init__(tower.config)
        made.append(tower.requires_grad_(False))
    for block in made[1].blocks:
        block.attn.__class__ = Qwen2_5_VLVisionAttention
    return made


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_as_the_stock_attention(towers, grids):
    grid = torch.tensor(grids)
    patches = torch.randn(int(grid.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(2))
    ours, stock = (tower(patches, grid_thw=grid).pooler_output for tower in towers)
    assert stock.abs().max() > 0.1
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_windows_run_in_a_few_calls(towers, monkeypatch):
    """A clip of 30 windows in each of two layers, 3 frames in the third: one call a length of window."""
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    towers[0](torch.randn(3 * 18 * 28, 1176), grid_thw=torch.tensor([[3, 18, 28]]))
    lengths = [shape[2] for shape in calls]
    assert sorted(set(lengths)) == [8, 16, 32, 64, 18 * 28]
    assert len(calls) == 2 * 4 + 1


def test_boundaries_are_read_once_a_call(monkeypatch):
    plans, windows, frames = Plans(), torch.tensor([0, 4, 8, 10]), torch.tensor([0, 10])
    reads = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or tensor.numpy().tolist())
    for _ in range(4):
        assert [tuple(rows.shape) for rows in plans.of(windows)] == [(1, 2), (2, 4)]
        assert plans.of(frames)[0].shape == (1, 10)
    assert len(reads) == 2


def test_rows_by_length():
    rows = rows_by_length([0, 2, 5, 5, 7], "cpu")
    assert [each.tolist() for each in rows] == [[[0, 1], [5, 6]], [[2, 3, 4]]]
