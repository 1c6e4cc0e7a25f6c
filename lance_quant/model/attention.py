"""`attend`: attention of a run of splits over a context, split by split, without a dense mask (Lance spec sec. 10).

Text is causal, a visual split sees all of itself and of what stands before it, and nobody outside sees a noise split.
Each of these is a plain attention over a stretch of the keys, which fused kernels do.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lance_quant.model.positions import causal_mask

Span = tuple[int, int, str]  # first token, end, mode: causal | full | full_noise | noise


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[Span] | None) -> torch.Tensor:
    """q [B, heads, n, d] over k, v [B, kv_heads, context + n, d] -> [B, heads, n, d].

    spans: the splits of the n tokens, in order and without gaps; None: every token sees everything. The context is
    seen by all.
    """
    if spans is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    context = k.shape[2] - q.shape[2]
    out, hidden = [], []  # hidden: noise splits that have passed, which what follows does not see
    for start, end, mode in spans:
        seen = (_without(part, hidden, context + end) for part in (k, v))
        out.append(_one(q[:, :, start:end], *seen, causal=mode == "causal"))
        if mode == "noise":
            hidden.append((context + start, context + end))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def _without(keys: torch.Tensor, hidden: Sequence[tuple[int, int]], end: int) -> torch.Tensor:
    """Keys up to `end`, save the hidden stretches."""
    if not hidden:
        return keys[:, :, :end]
    edges = [0, *(edge for stretch in hidden for edge in stretch), end]
    return torch.cat([keys[:, :, a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)], dim=2)


def _one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if not causal or queries == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # causal from the end: no fused kernel takes a mask and grouped heads together
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(queries, keys - queries, q.device))
