"""Triton operations and split-KV attention in the interpreter against their torch forms.

float32 throughout: the interpreter cuts a bf16 off instead of rounding it.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
pytest.importorskip("triton")

from lance_quant.runtime import attention, attention_triton, ops, ops_triton  # noqa: E402
from tests.drawn import DEVICE, random, seed  # noqa: E402, F401


def test_add_rms_norm():
    x, y, weight = random(3, 5, 96), random(3, 5, 96), random(96)
    for added in (None, y):
        ours = ops_triton.add_rms_norm(x, added, weight, 1e-6)
        torch.testing.assert_close(ours, ops.plain_add_rms_norm(x, added, weight, 1e-6))


def test_silu_mul():
    gate_up = random(2, 3, 2 * 1100)
    plain = ops.plain_silu_mul(gate_up)
    torch.testing.assert_close(ops_triton.silu_mul(gate_up), plain)
    for form in (ops_triton.silu_mul, ops.plain_silu_mul):  # into columns of a wider matrix
        wide = random(6, 1200)
        form(gate_up.view(6, -1), wide[:, 64:1164])
        torch.testing.assert_close(wide[:, 64:1164], plain.view(6, -1))


@pytest.mark.parametrize("rows", [2, 70])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("start", [0, 3, "rows"])
def test_place_heads(rows, wide, normed, start):
    batch, heads, kv_heads, size, tokens = 2, 4, 2, 32, rows + 2
    qkv = random(batch, rows, (heads + 2 * kv_heads) * size)
    tables = random(batch, tokens, size), random(batch, tokens, size)
    norm = ops.QKNorm(random(size), random(size), 1e-6) if normed else ops.QKNorm(None, None, 0.0)
    start = torch.tensor([4, 1], dtype=torch.int32, device=DEVICE) if start == "rows" else start
    places = torch.randperm(tokens, device=DEVICE)[:rows] if rows > 2 else None
    outs = []
    for form in (ops.plain_place_heads, ops_triton.place_heads):
        room = batch, kv_heads, tokens + 4, size
        out = ops.Heads(torch.zeros(batch, tokens, heads, size, device=DEVICE), random(*room) * 0, random(*room) * 0)
        form(qkv, tables, norm, wide, ops.Place(places, start), out)
        outs.append((out.queries, out.keys, out.values))
    torch.testing.assert_close(outs[1], outs[0])


@pytest.mark.parametrize("heads", [(16, 2), (4, 2)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_attend_kept(heads, tokens):
    queries = random(4, tokens, heads[0], 64)
    keys, values = random(4, heads[1], 512, 64), random(4, heads[1], 512, 64)
    lengths = torch.tensor([0, 1, 200, 512 - tokens], dtype=torch.int32, device=DEVICE)
    ours = attention_triton.attend_kept(queries, keys, values, lengths)
    torch.testing.assert_close(ours, attention.plain_attend_kept(queries, keys, values, lengths), atol=1e-5, rtol=1e-4)
    for row, length in enumerate(lengths.tolist()):  # and without a mask
        seen = (part[row : row + 1, :, : length + tokens] for part in (keys, values))
        last = queries[row : row + 1, -1:].transpose(1, 2)
        plain = torch.nn.functional.scaled_dot_product_attention(last, *seen, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(ours[row : row + 1, -1:], plain, atol=1e-5, rtol=1e-4)
