from dataclasses import replace

import pytest
import torch

from lance_quant.errors import LanceQuantError
from lance_quant.runtime import measure as measuring
from lance_quant.runtime.backends import BACKENDS
from lance_quant.runtime.measure import SHAPES, cold_seconds, measure, random_linear, table_from
from lance_quant.runtime.selection import Choice, read_table
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


def test_rows_that_none_takes():
    with pytest.raises(LanceQuantError, match="no backend multiplies 2 rows"):
        table_from({1: {"a": 1.0}, 2: {"a": float("inf")}})


def test_a_candidate_that_fails_is_left_out(monkeypatch, tmp_path):
    def run(linear, x):
        if len(x) > 2:
            raise ValueError("out of registers")
        return BACKENDS["blocks"].run(linear, x)

    rows = {"triton_gemv": replace(BACKENDS["blocks"], run=run), "triton_gemm": BACKENDS["blocks"]}
    monkeypatch.setattr(measuring, "BACKENDS", BACKENDS | rows)
    monkeypatch.setattr(measuring, "CANDIDATES", tuple(rows))
    monkeypatch.setattr(measuring, "SHAPES", {"o": (16, 64), "down": (16, 128)})
    monkeypatch.setattr(measuring, "COLD_BYTES", 1)
    seconds = {"triton_gemv": 1.0, "triton_gemm": 2.0}

    def timed(call, copies):
        call(copies[0])
        return seconds["triton_gemv" if call.__defaults__[0] is run else "triton_gemm"]

    monkeypatch.setattr(measuring, "cold_seconds", timed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setenv("LANCE_QUANT_CACHE", str(tmp_path))
    told = []
    assert measure("cpu", tell=told.append) == (Choice(2, "triton_gemv"), Choice(None, "triton_gemm"))
    assert read_table("GPU X") == (Choice(2, "triton_gemv"), Choice(None, "triton_gemm"))
    assert "triton_gemv failed for 3 rows and is left out: ValueError: out of registers" in told
    seconds["triton_gemm"] = float("inf")
    with pytest.raises(LanceQuantError, match="no backend multiplies 3 rows"):
        measure("cpu", tell=told.append)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_measuring_needs_a_gpu():
    with pytest.raises(LanceQuantError, match="no GPU here"):
        measure()
