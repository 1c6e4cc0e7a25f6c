"""`attend`: attention of a run of splits over a context, split by split, without a dense mask (Lance spec sec. 10).

Text is causal, a visual split sees all of itself and of what stands before it, and nobody outside sees a noise split.
Each of these is a plain attention over a stretch of the keys, which fused kernels do.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lance_quant.devices import fixed_order
from lance_quant.model.positions import BLOCK_MODES, HIDDEN_MODES, block_mask, causal_mask

PART = 512  # queries whose scores are there at once
# first token, end, mode: causal | full | full_noise | noise; aside is causal, and hidden from what follows as noise is
Span = tuple[int, int, str]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[Span] | None) -> torch.Tensor:
    """q [B, heads, n, d] over k, v [B, kv_heads, context + n, d] -> [B, heads, n, d].

    spans: the splits of the n tokens, in order and without gaps; None: every token sees everything. The context is
    seen by all.
    """
    if spans is None:
        return _fused(q, k, v)
    context = k.shape[2] - q.shape[2]
    out, hidden = [], []  # hidden: splits that have passed, which what follows does not see
    for start, end, mode in spans:
        seen = (_without(part, hidden, context + end) for part in (k, v))
        out.append(_one(q[:, :, start:end], *seen, causal=mode not in BLOCK_MODES))
        if mode in HIDDEN_MODES:
            hidden.append((context + start, context + end))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def span_mask(spans: Sequence[Span], context: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What `attend` lets each token see, [n, context + n] to be added to scores: 0, or -inf. With it few tokens share
    one attention, where one a split is so many launches of the host's."""
    sees = block_mask([end - start for start, end, _ in spans], [mode for _, _, mode in spans], device)
    width = context + len(sees)
    # rows that begin at 16 numbers: kernels would copy others
    mask = torch.zeros(len(sees), -(-width // 16) * 16, dtype=dtype, device=device)[:, :width]
    mask[:, context:].masked_fill_(~sees, -torch.inf)
    return mask


def attend_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`attend` of splits by their `span_mask`."""
    return _fused(q, k, v, mask=mask)


def _without(keys: torch.Tensor, hidden: Sequence[tuple[int, int]], end: int) -> torch.Tensor:
    """Keys up to `end`, save the hidden stretches."""
    if not hidden:
        return keys[:, :, :end]
    edges = [0, *(edge for stretch in hidden for edge in stretch), end]
    return torch.cat([keys[:, :, a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)], dim=2)


def _in_parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Plain products, PART queries after others, of which nothing is kept: they are done again on the way back."""
    masks = [None] * -(-q.shape[2] // PART) if mask is None else mask.split(PART)
    parts = zip(q.split(PART, dim=2), masks, strict=True)
    return torch.cat(
        [checkpoint(_plain, part, k, v, seen, use_reentrant=False, preserve_rng_state=False) for part, seen in parts],
        dim=2,
    )


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped @ k[:, :, None].mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)


def _one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if not causal or queries == 1:
        return _fused(q, k, v)
    if queries == keys:
        return _fused(q, k, v, causal=True)
    return _fused(q, k, v, mask=causal_mask(queries, keys - queries, q.device))  # causal from the end


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """By a kernel that never holds all scores: none takes grouped heads with a mask, nor on a GPU in float32. Their way
    back adds in no fixed order on a GPU; where one was asked for, in parts."""
    if q.requires_grad and fixed_order():
        return _in_parts(q, k, v, causal_mask(q.shape[2], k.shape[2] - q.shape[2], q.device) if causal else mask)
    grouped = mask is None and not (q.is_cuda and q.dtype == torch.float32)
    if not grouped:
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
