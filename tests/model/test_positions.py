"""Masks and embeddings whose rules are stated, not recorded."""

import pytest
import torch
from safetensors.torch import load_file

from lance_quant.errors import LanceQuantError
from lance_quant.model.embedders import latent_positions
from lance_quant.model.positions import block_mask, causal_mask, rope_positions
from tests.golden_cases import FOLDER, GOLDEN


def test_latent_positions_are_the_published_table():
    tensors = load_file(FOLDER / "posembed_2048.safetensors")
    for index, row in zip(tensors["ids"].tolist(), tensors["rows"], strict=True):
        grid = (index // 4096 + 1, index // 64 % 64 + 1, index % 64 + 1)
        assert torch.equal(latent_positions(grid, 2048)[-1], row)


def test_a_grid_beyond_the_table_is_refused():
    with pytest.raises(LanceQuantError, match="beyond this model"):
        GOLDEN.lance("f32").latent_table([(1, 4, 21)])


def test_block_mask_rules():
    lengths, modes = (2, 2, 2, 2, 1), ("causal", "full", "causal", "noise", "causal")
    mask = block_mask(lengths, modes)
    split = [index for index, length in enumerate(lengths) for _ in range(length)]
    for q in range(9):
        for k in range(9):
            same = split[q] == split[k]
            sees = k <= q or (same and modes[split[q]] != "causal")
            if modes[split[k]] == "noise" and not same:
                sees = False
            assert bool(mask[q, k]) is sees, (q, k)


def test_causal_mask_is_aligned_at_the_end():
    assert causal_mask(1, 5) is None
    assert causal_mask(2, 1).tolist() == [[True, True, False], [True, True, True]]


def test_positions_refuse_what_does_not_fit():
    ids = torch.tensor([1, 9, 9, 2])
    with pytest.raises(ValueError, match="fewer pads"):
        rope_positions(ids, [(1, 4, 4)], pad=9)
    with pytest.raises(ValueError, match="grids"):
        rope_positions(ids, [(1, 2, 4), (1, 2, 2)], pad=9)
