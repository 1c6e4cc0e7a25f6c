"""Weights that become bf16 before they are multiplied, in pieces of whole tiles."""

import gc
import os
import weakref

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
pytest.importorskip("triton")

from lance_quant.runtime.dequantized import PIECE_ELEMENTS, TILE, chunked, gated, pieces  # noqa: E402
from lance_quant.runtime.measure import SHAPES  # noqa: E402
from tests.random_int4 import distance, random_int4  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 6e-3  # a weight and a result rounded to bf16, where the interpreter cuts off instead


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1000, 2048), (7, 64), (520, 2**20)])
@pytest.mark.parametrize("elements", [PIECE_ELEMENTS, 2**22])
def test_pieces_are_whole_tiles_that_fit(shape, elements):
    outputs, inputs = shape
    parts = pieces(outputs, inputs, elements)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == outputs
    unit = TILE if elements // inputs >= TILE else 8
    assert all(part.start % unit == 0 for part in parts)
    assert all((part.stop - part.start) * inputs <= max(elements, unit * inputs) for part in parts)


@pytest.mark.parametrize("bias", [True, False])
def test_pieces_make_the_whole_product(bias):
    linear, exact = random_int4(40, 64, 32, bias, device=DEVICE)
    x = torch.randn(9, 64, device=DEVICE).bfloat16()
    assert len(pieces(40, 64, 64 * 16)) == 3
    assert distance(chunked(linear, x, 64 * 16), exact(x)) < CLOSE
    assert distance(chunked(linear, x), exact(x)) < CLOSE


def test_parts_follow_their_weight_and_let_go_of_it():
    linear, exact = random_int4(64, 64, 32, device=DEVICE)
    x = torch.randn(9, 64, device=DEVICE).bfloat16()
    assert distance(chunked(linear, x), exact(x)) < CLOSE
    linear.scales = linear.scales * 2
    assert distance(chunked(linear, x), exact(x)) < CLOSE
    codes = weakref.ref(linear.qweight)
    linear.to("meta")
    gc.collect()
    assert codes() is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "most"), [(9, 2304), (300, 128)])
def test_gated_is_silu_times_of_the_whole_product(rows, most, bias):
    linear, exact = random_int4(80, 64, 32, bias, device=DEVICE)
    x = torch.randn(rows, 64, device=DEVICE).bfloat16()
    gate, up = exact(x).chunk(2, -1)
    for elements in (2 * 64 * 16, None):
        ours = gated(linear, x, elements, most)
        assert ours.shape == (rows, 40) and distance(ours, torch.nn.functional.silu(gate) * up) < 2 * CLOSE
