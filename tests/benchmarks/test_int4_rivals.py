"""What of the rivals' stage a CPU can show: our codes in their conventions, the table, one that is not installed."""

import json
from dataclasses import replace

import pytest
import torch
from random_int4 import distance, random_int4

pytest.importorskip("triton")  # the script measures our kernels too

from int4_kernels import CLOSE, Bench, Settings  # noqa: E402
from int4_rivals import (  # noqa: E402
    RIVALS,
    high_first,
    measure_rivals,
    pack_tinygemm,
    rounded_share,
    table_of,
    tinygemm,
)

BY_NAME = {rival.name: rival for rival in RIVALS}


def test_high_nibbles_first():
    linear, _ = random_int4(64, 256, 64)
    codes = linear.codes()
    assert torch.equal(high_first(linear.qweight), codes[:, ::2] << 4 | codes[:, 1::2])


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"), reason="this torch has no such kernel")
def test_tinygemm_multiplies_by_our_weight():
    """Exactly, where bf16 holds the offsets: steps of one bit. With others it rounds some of them."""
    linear, exact = random_int4(64, 256, 64)
    assert 0 < rounded_share(linear) < 1
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert distance(tinygemm(pack_tinygemm(linear), x), exact(x)) < CLOSE

    linear.scales.fill_(2**-7)
    assert rounded_share(linear) == 0
    ones = torch.eye(256).bfloat16()  # each output is then a weight, which bf16 holds
    assert torch.equal(tinygemm(pack_tinygemm(linear), ones).double(), exact(ones))


def test_a_table():
    us = {"us": 10.0, "tb_s": 1.5, "error": 2e-3}
    cells = {
        (2, "ours (few)"): {"o": us, "down": us | {"us": 30.0}},
        (2, "other"): {"o": us | {"us": 15.25}, "down": us | {"us": 44.75, "error": 1e-2}},
        (1, "bf16 cuBLAS"): {"o": us, "down": {"failed": "RuntimeError: no"}},
        (2, "third"): {"o": us},
    }
    table = table_of(cells, ["o", "down"], ["* a note"], "a GPU")
    assert table.splitlines()[2:] == [
        "| rows | | o | down | times ours | error |",
        "|---|---|---|---|---|---|",
        "| 1 | bf16 cuBLAS | 10.0 (1.50) | failed |  | 2.0e-03 |",
        "| 2 | ours (few) | 10.0 (1.50) | 30.0 (1.50) | 1.00 | 2.0e-03 |",
        "| 2 | other | 15.2 (1.50) | 44.8 (1.50) | 1.50 | 1.0e-02 |",
        "| 2 | third | 10.0 (1.50) |  |  | 2.0e-03 |",
        "",
        "* a note",
    ]


def test_one_that_is_not_installed_is_told_and_the_others_go_on(tmp_path, capsys):
    def missing(linear):
        raise ModuleNotFoundError("No module named 'nowhere'")

    def broken(linear):
        raise RuntimeError("no such GPU\nand more")

    bench = Bench(Settings(device="cpu", copies=1, shapes="tiny", rows="1,3", stage="rivals", out=str(tmp_path)))
    bench.stage, bench.stage_started = "rivals", bench.started
    absent = replace(BY_NAME["gemlite"], name="absent", pack=missing, package="nowhere")
    table = measure_rivals(bench, [absent, replace(absent, name="broken", pack=broken), BY_NAME["ours"]])
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [
        "absent: not installed (pip install nowhere): No module named 'nowhere'",
        "broken: failed: RuntimeError: no such GPU",
    ]
    assert bench.failed == 1
    lines = [json.loads(line) for line in (tmp_path / "int4_kernels.jsonl").read_text().splitlines()]
    assert [(line["rows"], line["kernel"][:4]) for line in lines] == [(1, "ours"), (3, "ours")]
    assert (tmp_path / "int4_rivals.md").read_text() == table
    assert "| 3 | ours (" in table and "absent" not in table
