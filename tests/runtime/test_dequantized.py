"""Weights that become bf16 before they are multiplied: pieces of whole tiles, and the next one ahead of its turn."""

import gc
import os
import weakref

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
pytest.importorskip("triton")

from lance_quant.runtime import dequantized  # noqa: E402
from lance_quant.runtime.dequantized import PIECE_ELEMENTS, TILE, Ahead, chunked, gated, pieces  # noqa: E402
from lance_quant.runtime.measure import SHAPES  # noqa: E402
from tests.random_int4 import distance, random_int4  # noqa: E402

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
    linear, exact = random_int4(40, 64, 32, bias)
    x = torch.randn(9, 64).bfloat16()
    assert len(pieces(40, 64, 64 * 16)) == 3
    assert distance(chunked(linear, x, 64 * 16), exact(x)) < CLOSE
    assert distance(chunked(linear, x), exact(x)) < CLOSE


def test_parts_follow_their_weight_and_let_go_of_it():
    linear, exact = random_int4(64, 64, 32)
    x = torch.randn(9, 64).bfloat16()
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
    linear, exact = random_int4(80, 64, 32, bias)
    x = torch.randn(rows, 64).bfloat16()
    gate, up = exact(x).chunk(2, -1)
    for elements in (2 * 64 * 16, None):
        ours = gated(linear, x, elements, most)
        assert ours.shape == (rows, 40) and distance(ours, torch.nn.functional.silu(gate) * up) < 2 * CLOSE


def test_ahead_makes_each_piece_once_and_in_time(monkeypatch):
    monkeypatch.setattr(dequantized, "PIECE_ELEMENTS", 64 * 32)
    monkeypatch.setattr(dequantized, "TILE", 8)
    shapes = [(96, 64), (64, 64), (128, 64), (64, 128)] * 3
    linears = [random_int4(*shape, 32, seed=at)[0] for at, shape in enumerate(shapes)]
    ahead = Ahead(linears, linears[2::4])
    made, parts = [], ahead.parts
    for at, part in enumerate(parts):
        make = part.make
        object.__setattr__(part, "make", lambda at=at, make=make: (made.append(at), make()))
    for _ in range(2):
        for linear in linears:
            whole = linear.weight(torch.float32)
            for part in ahead.of[linear]:
                weight = part.made().float()
                assert made[-1] == min(part.at + 1, len(parts) - 1)
                wanted = whole[part.rows]
                if linear in linears[2::4]:
                    wanted = torch.cat([half[part.rows] for half in whole.chunk(2)])
                assert (weight - wanted).abs().max() <= weight.abs().max() / 128
        assert made == list(range(len(parts))) and not ahead.begun and len(parts) > 2 * len(linears)
        made.clear()


def test_ahead_leaves_a_kept_weight_alone_and_starts_anew_after_a_pass_broke_off():
    linears = [random_int4(64, 64, 32, seed=at)[0] for at in range(5)]
    linears[1].keep_dense()
    ahead = Ahead(linears)
    ahead.need(0)
    assert not ahead.begun
    ahead.need(2)
    assert list(ahead.begun) == [3]
    ahead.need(0)
    assert not ahead.begun


def test_a_linear_takes_its_pieces_from_ahead_and_is_freed_without_it():
    linear, exact = random_int4(64, 64, 32, bias=True)
    linear.ahead = Ahead([linear])
    x = torch.randn(5, 64).bfloat16()
    assert distance(dequantized.triton_dequant_cublas(linear, x), exact(x)) < CLOSE
    codes = weakref.ref(linear.qweight)
    del linear, exact
    assert codes() is None
    gate_up, exact = random_int4(80, 64, 32)
    gate_up.ahead = Ahead([gate_up], [gate_up])
    gate, up = exact(x).chunk(2, -1)
    assert distance(gated(gate_up, x), torch.nn.functional.silu(gate) * up) < 2 * CLOSE
