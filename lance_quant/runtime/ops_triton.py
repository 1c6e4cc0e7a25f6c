"""The operations of `ops` as Triton kernels: same arguments, same roundings.

Values are float32 inside a kernel and are rounded to the tensors' dtype wherever the plain layer rounds.
"""

import torch
import triton
import triton.language as tl

from lance_quant.runtime.kernels.launch import Kernel, cdiv, next_power_of_2

NORM_WARPS = 8
SILU_BLOCK = 1024
HEAD_ROWS = 8  # rows that one program turns; 1 where few are there, so that they spread over the card


@triton.jit
def _add_rms_norm(x, y, weight, total, out, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row + at, inside, 0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    if ADD:
        value = (value + tl.load(y + row + at, inside, 0.0).to(tl.float32)).to(dtype)
        tl.store(total + row + at, value, inside)
        value = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / size + eps)
    normed = (value * scale).to(dtype).to(tl.float32)
    gain = tl.load(weight + at, inside, 0.0).to(tl.float32)
    tl.store(out + row + at, (normed * gain).to(dtype), inside)


ADD_RMS_NORM = Kernel(_add_rms_norm)


def add_rms_norm(x, y, weight, eps):
    size = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    total = x if y is None else torch.empty_like(x)
    y = x if y is None else y.contiguous()
    constants = {"ADD": total is not x, "BLOCK": next_power_of_2(size)}
    grid = (x.numel() // size, 1, 1)
    ADD_RMS_NORM(grid, (x, y, weight, total, out, size, eps), constants, num_warps=NORM_WARPS)
    return total, out


@triton.jit
def _silu_mul(gate_up, out, size, step, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """step: from row to row of out."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, inside, 0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * step + at, (active * up).to(dtype), inside)


SILU_MUL = Kernel(_silu_mul)


def silu_mul(gate_up, out=None):
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    if out is None:
        out = gate_up.new_empty(*gate_up.shape[:-1], size)
    grid = (out.numel() // size, cdiv(size, SILU_BLOCK), 1)
    SILU_MUL(grid, (gate_up, out, size, out.stride(-2)), {"BLOCK": SILU_BLOCK})
    return out


@triton.jit(do_not_specialize=["rows", "tokens", "start"])
def _place_heads(
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    places,
    starts,
    queries,
    keys,
    values,
    rows,
    tokens,
    start,
    eps,
    table_step,
    key_batch,
    key_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    PLACES: tl.constexpr,
    STARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One head of BLOCK rows: its two halves are turned against each other."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None]
    at = tl.arange(0, HALF)[None, :]
    place = tl.load(places + row, row < rows, 0) if PLACES else row.to(tl.int64)
    first_place = tl.load(starts + batch) if STARTS else start
    source = qkv + ((batch * rows + row)[:, None] * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + at
    first = tl.load(source, inside, 0.0)
    second = tl.load(source + HALF, inside, 0.0)
    kept = (first_place + place)[:, None] * (2 * HALF) + at + batch * key_batch
    if head >= HEADS + KV_HEADS:
        target = values + (head - HEADS - KV_HEADS).to(tl.int64) * key_head + kept
        tl.store(target, first, inside)
        tl.store(target + HALF, second, inside)
    else:
        dtype = queries.dtype.element_ty
        x, y = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            mean = (tl.sum(x * x, 1) + tl.sum(y * y, 1)) / (2 * HALF)
            scale = (1.0 / tl.sqrt(mean + eps))[:, None]
            x, y = x * scale, y * scale
            if not WIDE:
                x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
            weight = q_weight if head < HEADS else k_weight
            x = x * tl.load(weight + at).to(tl.float32)
            y = y * tl.load(weight + HALF + at).to(tl.float32)
            if not WIDE:
                x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
        table = batch * table_step + place[:, None] * (2 * HALF) + at
        cos_first = tl.load(cos + table, inside, 0.0).to(tl.float32)
        cos_second = tl.load(cos + table + HALF, inside, 0.0).to(tl.float32)
        sin_first = tl.load(sin + table, inside, 0.0).to(tl.float32)
        sin_second = tl.load(sin + table + HALF, inside, 0.0).to(tl.float32)
        a, b = x * cos_first, y * sin_first
        c, d = y * cos_second, x * sin_second
        if not WIDE:
            a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
            c, d = c.to(dtype).to(tl.float32), d.to(dtype).to(tl.float32)
        if head < HEADS:
            query = queries + ((batch * tokens + place)[:, None] * HEADS + head) * (2 * HALF) + at
            tl.store(query, (a - b).to(dtype), inside)
            tl.store(query + HALF, (c + d).to(dtype), inside)
        else:
            key = keys + (head - HEADS).to(tl.int64) * key_head + kept
            tl.store(key, (a - b).to(dtype), inside)
            tl.store(key + HALF, (c + d).to(dtype), inside)


PLACE_HEADS = Kernel(_place_heads)


def place_heads(qkv, tables, norm, wide, place, out):
    qkv = qkv.contiguous()
    batch, rows, _ = qkv.shape
    tokens, heads, head_dim = out.queries.shape[1:]
    kv_heads = out.keys.shape[1]
    cos, sin = tables
    by_row = isinstance(place.start, torch.Tensor)
    block = HEAD_ROWS if rows >= 8 * HEAD_ROWS else 1
    arguments = (
        qkv,
        cos,
        sin,
        qkv if norm.q is None else norm.q,
        qkv if norm.k is None else norm.k,
        qkv if place.rows is None else place.rows,
        place.start if by_row else qkv,
        out.queries,
        out.keys,
        out.values,
        rows,
        tokens,
        0 if by_row else place.start,
        norm.eps,
        0 if cos.shape[0] == 1 else cos.stride(0),
        out.keys.stride(0),
        out.keys.stride(1),
    )
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HALF": head_dim // 2,
        "BLOCK": block,
        "NORM": norm.q is not None,
        "WIDE": wide,
        "PLACES": place.rows is not None,
        "STARTS": by_row,
    }
    grid = (cdiv(rows, block), heads + 2 * kv_heads, batch)
    PLACE_HEADS(grid, arguments, constants, num_warps=1 if block == 1 else 4)
