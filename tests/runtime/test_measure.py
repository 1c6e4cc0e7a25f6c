import pytest
import torch

from lance_quant.errors import LanceQuantError
from lance_quant.runtime.measure import SHAPES, cold_seconds, measure, random_linear, table_from
from lance_quant.runtime.selection import Choice
from tests.published import PUBLISHED_SIZES


def test_neighbours_with_the_same_backend_become_one_row():
    seconds = {1: (1, 2, 3), 2: (1, 2, 3), 8: (9, 2, 3), 16: (float("inf"), 2, 3), 64: (9, 9, 3), 512: (9, 9, 3)}
    total = {rows: dict(zip("abc", each, strict=True)) for rows, each in seconds.items()}
    assert table_from(total) == (Choice(2, "a"), Choice(16, "b"), Choice(None, "c"))


def test_the_shapes_are_the_published_ones():
    hidden, inner = PUBLISHED_SIZES.hidden_size, PUBLISHED_SIZES.intermediate_size
    value = PUBLISHED_SIZES.num_key_value_heads * PUBLISHED_SIZES.head_dim
    assert SHAPES == {
        "qkv": (hidden + 2 * value, hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def test_a_timing_calls_every_copy():
    copies = [random_linear((16, 64), 32, "cpu", seed) for seed in range(3)]
    seen, x = [], torch.randn(1, 64)
    assert cold_seconds(lambda linear: seen.append(linear(x).sum()), copies) > 0
    assert len(seen) >= 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_measuring_needs_a_gpu():
    with pytest.raises(LanceQuantError, match="no GPU here"):
        measure()
