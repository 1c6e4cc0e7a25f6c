"""`attend_kept`: a few new tokens over a kept context whose length only the device knows, split along the keys.

With two kv heads and one token, one program a head leaves a GPU idle: many programs read a stretch of the keys each,
and a second kernel joins what they found. `StaticCache` is the context: fixed memory, own length of each answer.
"""

import torch
import torch.nn.functional as F

from lance_quant.devices import on_triton
from lance_quant.model.attention import attend
from lance_quant.model.cache import KVCache
from lance_quant.model.config import LanceConfig

MOST_TOKENS = 16


class StaticCache:
    """Keys and values of B answers, [layers, B, kv_heads, capacity, head_dim]; `lengths` int32 [B] on the device."""

    def __init__(self, config: LanceConfig, batch: int, capacity: int, device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int32)
        self.capacity = capacity

    def row(self, index: int) -> KVCache:
        """An empty cache over the memory of one answer, for its prefill."""
        part = slice(index, index + 1)
        return KVCache.over(self.keys[:, part], self.values[:, part])


def attend_kept(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """queries [B, n, heads, d], whose keys stand behind `lengths` [B] others in keys, values [B, kv, capacity, d].

    Each sees what is kept, itself and the new ones before it. Returns [B, n, heads, d].
    """
    if on_triton(queries) and queries.shape[1] <= MOST_TOKENS:
        from lance_quant.runtime import attention_triton

        return attention_triton.attend_kept(queries, keys, values, lengths)
    return plain_attend_kept(queries, keys, values, lengths)


def plain_attend_kept(queries, keys, values, lengths):
    """Row by row over what is kept on a CPU; elsewhere with a mask over the capacity, since lengths stay unread."""
    new = queries.shape[1]
    if queries.device.type == "cpu":
        spans = [(0, new, "causal")]
        rows = zip(queries.transpose(1, 2).split(1), keys.split(1), values.split(1), lengths.tolist(), strict=True)
        return torch.cat(
            [attend(q, k[:, :, : kept + new], v[:, :, : kept + new], spans) for q, k, v, kept in rows]
        ).transpose(1, 2)
    tokens = torch.arange(new, device=queries.device)
    at = torch.arange(keys.shape[2], device=queries.device)
    seen = at <= (lengths[:, None] + tokens)[..., None]
    group = queries.shape[2] // keys.shape[1]
    keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
    out = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=seen[:, None])
    return out.transpose(1, 2)
