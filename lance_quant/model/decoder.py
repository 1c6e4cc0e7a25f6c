"""The decoder of Lance: a Qwen2.5 stack in which every layer holds two experts, written from the Lance spec sec. 9.

Module names are upstream's, so that keys of a checkpoint are paths in this tree. A batch shares its routing: row i of
every sequence goes to the same expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lance_quant.model.attention import Span, attend
from lance_quant.model.cache import KVCache
from lance_quant.model.config import LanceConfig
from lance_quant.model.linear import Linear
from lance_quant.model.rotary import frequencies_on, rotary_tables, rotate
from lance_quant.model.routing import Routing, Twin


class RMSNorm(nn.Module):
    """`rms_norm` with a weight of its own."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) of the last dimension in float32, cast back to x's dtype, then scaled (Lance spec sec. 9)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


class Attention(nn.Module):
    """Grouped-query attention over the keys of both experts; projections and QK-norms are per expert."""

    def __init__(self, config: LanceConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, query, value = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        for suffix in ("", "_moe_gen"):
            for leaf, rows in (("q_proj", query), ("k_proj", value), ("v_proj", value)):
                self.add_module(leaf + suffix, Linear(hidden, rows, bias=config.attention_bias))
            self.add_module("o_proj" + suffix, Linear(query, hidden, bias=False))
            for leaf in ("q_norm", "k_norm"):
                norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
                self.add_module(leaf + suffix, norm)

    def _project(self, x: torch.Tensor, suffix: str, wide_qk: bool) -> tuple[torch.Tensor, ...]:
        """q, k, v of one expert's rows, each [B, rows, heads, head_dim]; QK-norm comes before rotary."""
        q = self.get_submodule("q_proj" + suffix)(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.get_submodule("k_proj" + suffix)(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.get_submodule("v_proj" + suffix)(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if wide_qk:  # quirk Q6: the cached generation path keeps q and k in float32 up to the end of rotary
            q, k = q.float(), k.float()
        return self.get_submodule("q_norm" + suffix)(q), self.get_submodule("k_norm" + suffix)(k), v

    def forward(self, x: Twin, call: "Call") -> Twin:
        und = self._project(x.und, "", call.wide_qk)
        gen = self._project(x.gen, "_moe_gen", call.wide_qk) if x.gen is not None else (None, None, None)
        q, k, v = (call.routing.merge(Twin(a, b)).transpose(1, 2) for a, b in zip(und, gen, strict=True))
        q, k = rotate(q, *call.rotary).to(v.dtype), rotate(k, *call.rotary).to(v.dtype)
        out = torch.cat([attend(*row, call.spans) for row in self._rows(q, k, v, call.caches)])
        out = call.routing.split(out.transpose(1, 2).flatten(2))
        return Twin(self.o_proj(out.und), None if out.gen is None else self.o_proj_moe_gen(out.gen))

    def _rows(self, q, k, v, caches: Sequence[KVCache]) -> list[tuple[torch.Tensor, ...]]:
        """What attends together: the whole batch, or each row over the context of its own cache."""
        if len(caches) < 2:
            return [(q, *caches[0].write(self.layer, k, v))] if caches else [(q, k, v)]
        parts = zip(caches, q.split(1), k.split(1), v.split(1), strict=True)
        return [(query, *cache.write(self.layer, key, value)) for cache, query, key, value in parts]


class MLP(nn.Module):
    def __init__(self, config: LanceConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LanceConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        for suffix in ("", "_moe_gen"):
            self.add_module("mlp" + suffix, MLP(config))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(norm + suffix, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Twin, call: "Call") -> Twin:
        x = _add(x, self.self_attn(_each(x, self.input_layernorm, self.input_layernorm_moe_gen), call))
        inner = _each(x, self.post_attention_layernorm, self.post_attention_layernorm_moe_gen)
        return _add(x, _each(inner, self.mlp, self.mlp_moe_gen))


def _each(x: Twin, und: nn.Module, gen: nn.Module) -> Twin:
    return Twin(und(x.und), None if x.gen is None else gen(x.gen))


def _add(x: Twin, y: Twin) -> Twin:
    return Twin(x.und + y.und, None if x.gen is None else x.gen + y.gen)


@dataclass(frozen=True)
class Call:
    """What every layer of one forward call shares. caches: none, one for the batch, or one for each of its rows."""

    routing: Routing
    rotary: tuple[torch.Tensor, torch.Tensor]
    spans: Sequence[Span] | None
    caches: tuple[KVCache, ...]
    wide_qk: bool


class Decoder(nn.Module):
    """Embedding table, layers and the two final norms."""

    def __init__(self, config: LanceConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope_inv_freq_bf16: bool | None = None  # None: as upstream, rounded exactly when the model is bf16

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        routing: Routing,
        spans: Sequence[Span] | None = None,
        cache: KVCache | Sequence[KVCache] | None = None,
        keep: bool = True,
    ) -> torch.Tensor:
        """hidden [B, n, H] at positions [3, n] or [B, 3, n] -> final-normed states [B, n, H].

        spans: the splits that the n tokens are (`attention.attend`); None: every token sees everything.
        cache: its context is seen by every token; of one cache a row, by that row's. keep=False leaves it as it was.
        """
        call = self.call(hidden, positions, routing, spans, cache)
        x = routing.split(hidden)
        for layer in self.layers:
            x = layer(x, call)
        if keep:
            for each in call.caches:
                each.advance(hidden.shape[1])
        return self.normed(x, routing)

    def call(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        routing: Routing,
        spans: Sequence[Span] | None = None,
        cache: KVCache | Sequence[KVCache] | None = None,
    ) -> Call:
        """What the layers need to know of a forward call; of `hidden` only device and dtype are looked at."""
        rounded = self.rope_inv_freq_bf16
        if rounded is None:
            rounded = hidden.dtype == torch.bfloat16
        config = self.config
        rope = frequencies_on(hidden.device, config.head_dim, config.rope_theta, config.mrope_section, rounded)
        caches = () if cache is None else (cache,) if isinstance(cache, KVCache) else tuple(cache)
        # upstream widens q and k only in its cached generation mode, and only a bf16 model can tell
        wide = bool(caches) and routing.gen is not None
        return Call(routing, rotary_tables(positions, *rope, hidden.dtype), spans, caches, wide)

    def normed(self, x: Twin, routing: Routing) -> torch.Tensor:
        """The final norms: what the layers put out -> [B, n, H]."""
        return routing.merge(_each(x, self.norm, self.norm_moe_gen))


class LanguageModel(nn.Module):
    def __init__(self, config: LanceConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
