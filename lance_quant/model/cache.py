"""`KVCache`: keys and values of a context, allocated once and written in place.

The denoising steps read the context and their own tokens without keeping them: they write behind the end and do not
`advance` it.
"""

import torch

from lance_quant.model.config import LanceConfig


class KVCache:
    """Keys and values of every layer, each [B, kv_heads, capacity, head_dim], after QK-norm and rotary.

    `length` tokens are kept. Raises ValueError where a write would not fit.
    """

    def __init__(self, config: LanceConfig, capacity: int, batch: int, device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0

    @classmethod
    def over(cls, keys: torch.Tensor, values: torch.Tensor) -> "KVCache":
        """An empty cache in memory that is there already, [layers, B, kv_heads, capacity, head_dim]."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.capacity, cache.length = keys, values, keys.shape[3], 0
        return cache

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put this call's keys and values behind the context; returns views of context and call together."""
        end = self.check(key.shape[2])
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def check(self, tokens: int) -> int:
        """Where a call of so many tokens ends. Raises ValueError where it does not fit."""
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed")
        return end

    def take(self, other: "KVCache", start: int, end: int) -> None:
        """Keep tokens `start` to `end` of another cache of the same shape behind the own. Raises ValueError where they
        do not fit."""
        length = self.check(end - start)
        self.keys[:, :, :, self.length : length] = other.keys[:, :, :, start:end]
        self.values[:, :, :, self.length : length] = other.values[:, :, :, start:end]
        self.length = length

    def advance(self, tokens: int) -> None:
        """Keep what the last call wrote."""
        self.length += tokens
