"""Every backend against float64; what a table chooses; what fuse and the CPU's layout keep."""

import json
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

from lance_quant.errors import LanceQuantError
from lance_quant.runtime import backends, selection
from lance_quant.runtime.backends import BACKENDS
from lance_quant.runtime.int4_linear import fuse
from lance_quant.runtime.measure import SHAPES
from lance_quant.runtime.selection import (
    BUILT_IN,
    Choice,
    choose,
    read_table,
    table_file,
    waiting_for_launches,
    write_table,
)
from tests.random_int4 import distance, random_int4

CLOSE = 4e-3
ON_CPU = ("reference", "blocks", "cpu_int4")


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bias", [True, False])
def test_products(name, group, bias):
    (linear, _), (_, exact) = (random_int4(128, 256, group, bias) for _ in range(2))
    assert linear.to_cpu_layout() or name != "cpu_int4"
    linear.backend = name
    for rows in (1, 2, 3, 7, 16, 17, 33):
        x = torch.randn(rows, 256).bfloat16()
        assert BACKENDS[name].serves(linear, x)
        assert distance(linear(x), exact(x)) < CLOSE
    assert linear(x.view(3, 11, 256)).shape == (3, 11, 128)


REAL = (*SHAPES.values(), (256, 2048), (11008, 2048))  # [O, I] of every linear of Lance, fused and as it comes


@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_products_at_the_sizes_of_lance(shape, group):
    linear, exact = random_int4(*shape, group, bias=True)
    x = torch.randn(17, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    biased, bias = exact(x), linear.bias
    for name in ON_CPU:
        if name == "cpu_int4":
            assert linear.to_cpu_layout()
        small = name != "reference" or shape[0] * shape[1] < 2**23  # which takes a third of a second a call otherwise
        for wanted, linear.bias in ((biased, bias), (biased - bias.double(), None))[: 2 if small else 1]:
            for rows in (1, 3, 17):
                assert distance(BACKENDS[name].run(linear, x[:rows]), wanted[:rows]) < CLOSE, (name, rows)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("triton_gemv", (1, 3)),
        ("triton_few", (3, 16)),
        ("triton_gemm", (3, 17)),
        ("triton_dequant_cublas", (17,)),
    ],
)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_products_of_triton_at_a_size_of_lance(name, rows, group):
    """By their own configs, bf16 out, which the interpreter cuts off instead of rounding: that alone is 3.3e-3."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    linear, exact = random_int4(256, 2048, group, bias=group != 128, device=device)
    x = torch.randn(17, 2048, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    for count in rows if group == 64 else rows[-1:]:
        y = BACKENDS[name].run(linear, x[:count])
        assert y.dtype == torch.bfloat16 and distance(y, exact(x[:count])) < CLOSE


@pytest.mark.parametrize("group", [32, 64])
def test_the_cpu_layout_is_the_same_linear(group):
    native, exact = random_int4(192, 64 * 3, group, bias=True)
    linear, _ = random_int4(192, 64 * 3, group, bias=True)
    assert linear.to_cpu_layout() and not torch.equal(linear.qweight, native.qweight)
    assert torch.equal(linear.weight(torch.float32), native.weight(torch.float32))
    assert torch.equal(torch.cat(list(linear.blocks(torch.bfloat16, 5000))), native.weight(torch.bfloat16))
    for key, value in linear.state_dict().items():
        assert torch.equal(value, native.state_dict()[key])
    wide = torch.randn(5, 192, dtype=torch.float64)
    torch.testing.assert_close(linear(wide), exact(wide))


def test_a_linear_that_the_cpu_kernel_does_not_serve_stays_as_it_is():
    for linear, exact in (random_int4(24, 64, 32), random_int4(64, 64, 16)):
        assert not linear.to_cpu_layout()
        x = torch.randn(2, 64).bfloat16()
        assert distance(linear(x), exact(x)) < CLOSE


class OnGpu:
    """As much of so many rows on a GPU as a choice looks at."""

    dtype, device = torch.bfloat16, torch.device("cuda")

    def __init__(self, rows: int):
        self.shape = (rows, 64)


@pytest.mark.parametrize(
    ("rows", "outputs", "group", "wanted"),
    [
        (1, 64, 64, "triton_gemv"),
        (2, 64, 64, "triton_few"),
        (16, 64, 32, "triton_few"),
        (2, 64, 16, "triton_gemv"),
        (2, 31, 64, "triton_gemv"),
        (8, 64, 16, "triton_gemm"),
        (17, 64, 64, "triton_gemm"),
        (64, 64, 64, "triton_gemm"),
        (65, 64, 64, "triton_dequant_cublas"),
    ],
)
def test_what_a_gpu_takes_without_a_table(monkeypatch, rows, outputs, group, wanted):
    linear, _ = random_int4(outputs, 64, group)
    monkeypatch.setattr(selection, "table_of", lambda device: selection.BUILT_IN["cuda"])
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    x = OnGpu(rows)
    assert choose(linear, x) is BACKENDS[wanted].run
    linear.terms = torch.zeros(1)  # codes in the CPU's layout, which no GPU's kernel reads
    assert choose(linear, x) is BACKENDS["reference"].run


@pytest.mark.parametrize(("rows", "wanted"), [(64, "gemm"), (65, "gemm"), (128, "gemm"), (129, "dequant_cublas")])
def test_what_waits_for_launches_takes_the_fewest(monkeypatch, rows, wanted):
    """Whatever a table says; a kept bf16 weight is one launch anyway."""
    linear, _ = random_int4(64, 64, 64)
    monkeypatch.setattr(selection, "table_of", lambda device: selection.BUILT_IN["cuda"])
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    with waiting_for_launches(True):
        assert choose(linear, OnGpu(rows)) is BACKENDS[f"triton_{wanted}"].run
        linear.dense = torch.zeros(64, 64)
        assert rows < 65 or choose(linear, OnGpu(rows)) is BACKENDS["dense"].run
    linear.dense = None
    assert choose(linear, OnGpu(rows)) is BACKENDS["triton_gemm" if rows < 65 else "triton_dequant_cublas"].run


@pytest.mark.parametrize("outputs", [32, 64])
def test_a_single_block_in_the_cpu_layout(outputs):
    (linear, _), (_, exact) = (random_int4(outputs, 64, 32) for _ in range(2))
    linear.to_cpu_layout()
    x = torch.randn(3, 64).bfloat16()
    assert linear.qweight.is_contiguous() and distance(linear(x), exact(x)) < CLOSE


def test_kept_bf16_weights_serve_many_rows():
    linear, exact = random_int4(64, 64, 32, bias=True)
    linear.keep_dense()
    assert torch.equal(linear.dense, linear.weight(torch.bfloat16)) and "dense" not in linear.state_dict()
    x = torch.randn(3, 64).bfloat16()
    assert distance(BACKENDS["dense"].run(linear, x), exact(x)) < CLOSE


def test_fuse():
    parts = [random_int4(outputs, 64, 32, bias, seed) for outputs, bias, seed in ((32, True, 0), (16, False, 1))]
    x = torch.randn(3, 64, dtype=torch.float64)
    wanted = torch.cat([exact(x) for _, exact in parts], dim=-1)
    whole = fuse([linear for linear, _ in parts])
    torch.testing.assert_close(whole(x), wanted)
    assert (whole.out_features, whole.bias[32:].any()) == (48, False)
    assert all(buffer.is_meta for linear, _ in parts for buffer in linear.buffers())


def test_fuse_refuses_linears_that_do_not_share_an_input():
    with pytest.raises(LanceQuantError, match="of 64 inputs in groups of 32 and of 64 in groups of 16"):
        fuse([random_int4(16, 64, 32)[0], random_int4(16, 64, 16)[0]])
    packed = random_int4(64, 64, 32)[0]
    packed.to_cpu_layout()
    with pytest.raises(LanceQuantError, match="fuse before it is made"):
        fuse([packed, random_int4(64, 64, 32)[0]])


def test_fuse_in_the_cpu_layout_and_with_kept_weights():
    parts = [random_int4(outputs, 64, 32, seed=outputs)[0] for outputs in (64, 128)]
    x = torch.randn(3, 64).bfloat16()
    for linear in parts:
        linear.to_cpu_layout()
        linear.keep_dense()
    wanted, weights = torch.cat([linear(x) for linear in parts], -1), torch.cat([linear.dense for linear in parts])
    whole = fuse(parts)
    assert torch.equal(whole(x), wanted) and torch.equal(whole.weight(torch.bfloat16), weights)
    assert torch.equal(whole.dense, weights)


def test_an_unknown_backend():
    linear, _ = random_int4(16, 64, 32)
    linear.backend = "fastest"
    with pytest.raises(LanceQuantError, match="backend=fastest is unknown: take auto or one of triton_gemv,"):
        linear(torch.randn(1, 64))


def test_the_table_chooses_by_rows(monkeypatch):
    linear, _ = random_int4(64, 64, 32)
    linear.to_cpu_layout()
    table = (Choice(2, "cpu_int4"), Choice(None, "blocks"))
    monkeypatch.setattr(selection, "table_of", lambda device: table)
    chosen = [choose(linear, torch.zeros(rows, 64, dtype=torch.bfloat16)).__name__ for rows in (1, 2, 3)]
    assert chosen == ["cpu_int4", "cpu_int4", "blocks"]
    assert choose(linear, torch.zeros(1, 64)).__name__ == "blocks"  # the kernel takes bf16 alone
    linear.backend = "reference"
    assert choose(linear, torch.zeros(1, 64)).__name__ == "reference"


def test_built_in_tables_end_with_any_number():
    for table in BUILT_IN.values():
        assert table[-1].most_rows is None and all(choice.backend in BACKENDS for choice in table)


def test_a_table_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LANCE_QUANT_CACHE", str(tmp_path / "cache"))
    table = (Choice(3, "triton_gemv"), Choice(None, "triton_dequant_cublas"))
    assert read_table("GPU X") is None
    path = write_table("GPU X", table)
    assert read_table("GPU X") == table and read_table("GPU Y") is None
    path.rename(table_file("GPU Y"))
    assert read_table("GPU Y") is None  # it says which GPU it is of


@pytest.mark.parametrize(
    "damage",
    [
        lambda held: "{",
        lambda held: json.dumps([held]),
        lambda held: json.dumps(held | {"version": 0}),
        lambda held: json.dumps(held | {"choices": []}),
        lambda held: json.dumps(held | {"choices": [{"most_rows": None, "backend": "gone"}]}),
        lambda held: json.dumps(held | {"choices": [{"most_rows": 4, "backend": "blocks"}]}),
    ],
)
def test_a_damaged_table_counts_as_none(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("LANCE_QUANT_CACHE", str(tmp_path))
    path = write_table("GPU X", (Choice(None, "blocks"),))
    path.write_text(damage(json.loads(path.read_text())))
    assert read_table("GPU X") is None
