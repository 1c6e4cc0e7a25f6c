"""Split-KV attention in Triton: `_stretch` over part of the keys, `_join` over what the parts found.

The kernels read the lengths on the device, so that one CUDA graph serves a context of any length.
"""

import math

import torch
import triton
import triton.language as tl

from lance_quant.runtime.kernels.launch import Kernel, cdiv, next_power_of_2

KEYS = 64  # read at a time
MOST_SPLITS = 64


@triton.jit
def _stretch(
    queries,
    keys,
    values,
    lengths,
    partial,
    logsum,
    scale,
    tokens,
    key_layer,
    key_head,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Queries of one kv head (row = token * GROUP + head in group) over one split; scores are in base 2."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv = tl.program_id(0)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kept = tl.load(lengths + batch)
    end = kept + tokens
    width = tl.cdiv(tl.cdiv(end, splits), KEYS) * KEYS
    first = split * width
    last = tl.minimum(first + width, end)
    row = tl.arange(0, ROWS)
    token = row // GROUP
    at = tl.arange(0, SIZE)
    inside = (token < tokens)[:, None]
    source = ((batch * tokens + token) * HEADS + kv * GROUP + row % GROUP)[:, None] * SIZE + at[None, :]
    query = tl.load(queries + source, inside, 0.0)
    base = batch * key_layer + kv.to(tl.int64) * key_head
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, SIZE], tl.float32)
    for start in range(first, last, KEYS):
        key = start + tl.arange(0, KEYS)
        there = (key < last)[:, None]
        part = base + key[:, None] * SIZE + at[None, :]
        k = tl.load(keys + part, there, 0.0)
        v = tl.load(values + part, there, 0.0)
        score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        seen = (key[None, :] <= kept + token[:, None]) & (key < last)[None, :]
        score = tl.where(seen, score, float("-inf"))
        now = tl.maximum(best, tl.max(score, 1))
        anchor = tl.where(now == float("-inf"), 0.0, now)
        weight = tl.exp2(score - anchor[:, None])
        shrink = tl.exp2(best - anchor)
        total = total * shrink + tl.sum(weight, 1)
        found = found * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        best = now
    place = ((batch * tokens + token) * HEADS + kv * GROUP + row % GROUP) * splits + split
    mean = found / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(partial + place[:, None] * SIZE + at[None, :], mean, inside)
    tl.store(logsum + place, tl.where(total == 0.0, float("-inf"), best + tl.log2(total)), token < tokens)


@triton.jit
def _join(partial, logsum, out, splits, SPLITS: tl.constexpr, SIZE: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    there = split < splits
    at = tl.arange(0, SIZE)
    weight = tl.load(logsum + row * splits + split, there, float("-inf"))
    weight = tl.exp2(weight - tl.max(weight, 0))
    value = tl.load(partial + (row * splits + split)[:, None] * SIZE + at[None, :], there[:, None], 0.0)
    joined = tl.sum(value * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * SIZE + at, joined.to(out.dtype.element_ty))


STRETCH, JOIN = Kernel(_stretch), Kernel(_join)


def attend_kept(queries, keys, values, lengths):
    batch, tokens, heads, size = queries.shape
    kv_heads, capacity = keys.shape[1:3]
    splits = min(MOST_SPLITS, cdiv(capacity, KEYS))
    group = heads // kv_heads
    partial = torch.empty(batch, tokens, heads, splits, size, device=queries.device, dtype=torch.float32)
    logsum = torch.empty(batch, tokens, heads, splits, device=queries.device, dtype=torch.float32)
    arguments = (
        queries,
        keys,
        values,
        lengths,
        partial,
        logsum,
        math.log2(math.e) / math.sqrt(size),
        tokens,
        keys.stride(0),
        keys.stride(1),
        splits,
    )
    constants = {
        "HEADS": heads,
        "GROUP": group,
        "SIZE": size,
        "ROWS": max(16, next_power_of_2(tokens * group)),
        "KEYS": KEYS,
        "PRECISION": "ieee" if queries.dtype == torch.float32 else "tf32",
    }
    STRETCH((kv_heads, splits, batch), arguments, constants)
    out = torch.empty_like(queries)
    constants = {"SPLITS": next_power_of_2(splits), "SIZE": size}
    JOIN((batch * tokens * heads, 1, 1), (partial, logsum, out, splits), constants, num_warps=2)
    return out
