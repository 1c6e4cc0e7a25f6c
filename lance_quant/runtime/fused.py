"""`FusedDecoder`: the same decoder with q/k/v and gate/up as one product each and one kernel between two products.

It takes over the weights of a plain decoder layer by layer, nn.Linear or Int4Linear, and serves every call that the
plain one serves; `step` is the decoding of one more token over a `StaticCache`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn

from lance_quant.model.attention import Span, attend, attend_masked, span_mask
from lance_quant.model.cache import KVCache
from lance_quant.model.decoder import Decoder, LanguageModel, Layer, RMSNorm
from lance_quant.model.linear import Linear
from lance_quant.model.positions import BLOCK_MODES
from lance_quant.model.routing import Routing, Twin
from lance_quant.runtime.attention import StaticCache, attend_kept
from lance_quant.runtime.backends import triton_few, triton_gemv
from lance_quant.runtime.dequantized import gated, triton_dequant_cublas
from lance_quant.runtime.int4_linear import Int4Linear, fuse
from lance_quant.runtime.kernels.early import can_start_early, early
from lance_quant.runtime.ops import Heads, Place, QKNorm, add_rms_norm, place_heads, silu_mul
from lance_quant.runtime.selection import choose, waiting_for_launches

MASKED_TOKENS = 1024  # up to which splits, context included, share an attention: a layer's is then the host's time


class SideBySide(nn.Module):
    """Linears of one input whose outputs stand side by side, where they cannot be one product."""

    def __init__(self, linears: Sequence[nn.Module]):
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


def one_product(linears: Sequence[nn.Module]) -> nn.Module:
    """Linears of one input as one, their outputs in order."""
    if all(isinstance(linear, nn.Linear) for linear in linears):
        return _one_linear(linears)
    if all(isinstance(linear, Int4Linear) and linear.terms is None for linear in linears):
        if len({linear.group_size for linear in linears}) == 1:
            return fuse(linears)
    return SideBySide(linears)


def _one_linear(linears: Sequence[nn.Linear]) -> nn.Linear:
    rows = sum(linear.out_features for linear in linears)
    with torch.device("meta"):
        one = Linear(linears[0].in_features, rows, bias=linears[0].bias is not None)
    for name in ("weight", "bias"):
        if getattr(one, name) is not None:
            value = torch.cat([getattr(linear, name).data for linear in linears])
            setattr(one, name, nn.Parameter(value, requires_grad=False))
    return one


def by_gemv(linear: nn.Module, x: torch.Tensor) -> bool:
    """Whether as many rows as x has go to the GEMV over codes, which does what stands around in the same kernel."""
    return isinstance(linear, Int4Linear) and choose(linear, x.reshape(-1, x.shape[-1])) is triton_gemv


def within(linear: Int4Linear, x: torch.Tensor, **around) -> torch.Tensor:
    """x [..., I] by a linear with what `gemv.Around` says -> [..., outputs]."""
    from lance_quant.runtime.kernels.gemv import Around, gemv

    rows = x.reshape(-1, linear.in_features).contiguous()
    return gemv(rows, linear.packed, linear.bias, Around(**around)).view(*x.shape[:-1], -1)


def active(gate_up: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x."""
    if isinstance(gate_up, Int4Linear):
        rows = x.reshape(-1, x.shape[-1])
        backend = choose(gate_up, rows)
        if backend is triton_gemv:
            return within(gate_up, x, silu_mul=True)
        if backend is triton_few:
            return few_active(gate_up, rows).view(*x.shape[:-1], -1)
        if backend is triton_dequant_cublas:
            return gated(gate_up, rows).view(*x.shape[:-1], -1)
    return silu_mul(gate_up(x))


def few_active(gate_up: Int4Linear, rows: torch.Tensor) -> torch.Tensor:
    """The same by the kernel for few rows, which does it where the product is made."""
    from lance_quant.runtime.kernels.few import few

    return few(rows.contiguous(), gate_up.packed, gate_up.bias, silu_mul=True)


@dataclass(frozen=True)
class FusedCall:
    """What every layer of one call shares. caches as in `decoder.Call`, or the static one of a decoding step.
    mask: of the spans, where few tokens attend with it at once."""

    routing: Routing
    tables: tuple[torch.Tensor, torch.Tensor]
    spans: Sequence[Span] | None
    caches: tuple[KVCache, ...] | StaticCache
    wide_qk: bool
    mask: torch.Tensor | None = None


class Expert(nn.Module):
    """One path of a layer. `attend` stands between `read` and `write`, since both paths meet there."""

    def __init__(self, layer: Layer, suffix: str):
        super().__init__()
        attention, mlp = layer.self_attn, layer.get_submodule("mlp" + suffix)
        self.norm = layer.get_submodule("input_layernorm" + suffix)
        self.qkv = one_product([attention.get_submodule(leaf + suffix) for leaf in ("q_proj", "k_proj", "v_proj")])
        self.q_norm, self.k_norm = (attention.get_submodule(leaf + suffix) for leaf in ("q_norm", "k_norm"))
        self.out = attention.get_submodule("o_proj" + suffix)
        self.inner_norm = layer.get_submodule("post_attention_layernorm" + suffix)
        self.gate_up = one_product([mlp.gate_proj, mlp.up_proj])
        self.down = mlp.down_proj

    @property
    def qk_norm(self) -> QKNorm:
        if isinstance(self.q_norm, RMSNorm):
            return QKNorm(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        return QKNorm(None, None, 0.0)

    def read(self, x: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream with what the layer before adds to it, and q, k, v side by side."""
        if added is None and by_gemv(self.qkv, x):
            return x, within(self.qkv, x, gain=self.norm.weight, eps=self.norm.eps)
        x, normed = add_rms_norm(x, added, self.norm.weight, self.norm.eps)
        return x, self.qkv(normed)

    def write(self, x: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream after attention, and what the MLP adds to it; None where it is added already."""
        if all(by_gemv(linear, attended) for linear in (self.out, self.gate_up, self.down)):
            x = within(self.out, attended, residual=x.contiguous())
            inner = within(self.gate_up, x, gain=self.inner_norm.weight, eps=self.inner_norm.eps, silu_mul=True)
            return within(self.down, inner, residual=x), None
        x, normed = add_rms_norm(x, self.out(attended), self.inner_norm.weight, self.inner_norm.eps)
        return x, self.down(active(self.gate_up, normed))


class FusedLayer(nn.Module):
    def __init__(self, layer: Layer):
        super().__init__()
        attention = layer.self_attn
        self.index, self.head_dim = attention.layer, attention.head_dim
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.und, self.gen = Expert(layer, ""), Expert(layer, "_moe_gen")

    def forward(self, x: Twin, added: Twin, call: FusedCall) -> tuple[Twin, Twin]:
        """Residual stream and what is still to be added to it, in and out."""
        und, und_qkv = self.und.read(x.und, added.und)
        if x.gen is None:
            attended = self._attend(Twin(und_qkv, None), call)
            und, added_und = self.und.write(und, attended.und)
            return Twin(und, None), Twin(added_und, None)
        gen, gen_qkv = self.gen.read(x.gen, added.gen)
        attended = self._attend(Twin(und_qkv, gen_qkv), call)
        und, added_und = self.und.write(und, attended.und)
        gen, added_gen = self.gen.write(gen, attended.gen)
        return Twin(und, gen), Twin(added_und, added_gen)

    def _attend(self, qkv: Twin, call: FusedCall) -> Twin:
        """Each path's rows of the attended values [B, rows, heads * d]."""
        batch, caches = len(qkv.und), call.caches
        tokens = qkv.und.shape[1] + (0 if qkv.gen is None else qkv.gen.shape[1])
        queries = qkv.und.new_empty(batch, tokens, self.heads, self.head_dim)
        if isinstance(caches, StaticCache):
            out = Heads(queries, caches.keys[self.index], caches.values[self.index])
            self._place(qkv, slice(None), caches.lengths, out, call)
            return Twin(attend_kept(queries, out.keys, out.values, caches.lengths).flatten(2), None)
        rows = []
        for index, cache in enumerate(caches or (None,)):
            part = slice(None) if len(caches) < 2 else slice(index, index + 1)
            start = 0 if cache is None else cache.length
            keys, values = self._room(qkv.und, tokens, cache)
            self._place(qkv, part, start, Heads(queries[part], keys, values), call)
            seen = (kept[:, :, : start + tokens] for kept in (keys, values))
            heads = queries[part].transpose(1, 2)
            attended = attend(heads, *seen, call.spans) if call.mask is None else attend_masked(heads, *seen, call.mask)
            rows.append(attended.transpose(1, 2).flatten(2))
        return _split(rows, call.routing)

    def _room(self, like: torch.Tensor, tokens: int, cache: KVCache | None) -> tuple[torch.Tensor, torch.Tensor]:
        if cache is not None:
            cache.check(tokens)
            return cache.keys[self.index], cache.values[self.index]
        room = (len(like), self.kv_heads, tokens, self.head_dim)
        return like.new_empty(room), like.new_empty(room)

    def _place(self, qkv: Twin, part: slice, start: int | torch.Tensor, out: Heads, call: FusedCall) -> None:
        tables = call.tables if len(call.tables[0]) == 1 else tuple(table[part] for table in call.tables)
        paths = ((self.und, qkv.und, call.routing.und), (self.gen, qkv.gen, call.routing.gen))
        for expert, rows, places in paths:
            if rows is not None:
                place_heads(rows[part], tables, expert.qk_norm, call.wide_qk, Place(places, start), out)


def _split(rows: Sequence[torch.Tensor], routing: Routing) -> Twin:
    """Batch rows [1 or B, n, ...] -> each expert's, copied only where they must be."""
    if routing.gen is None:
        return Twin(_joined(rows), None)
    und = _joined([row.index_select(1, routing.und) for row in rows])
    if routing.stretch is None:
        return Twin(und, _joined([row.index_select(1, routing.gen) for row in rows]))
    start, end = routing.stretch
    return Twin(und, _joined([row[:, start:end] for row in rows]))


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


_pause: ContextVar[tuple[int, Callable[[], None]] | None] = ContextVar("pause", default=None)  # of a thread


@contextmanager
def pausing(layers: int | None, pause: Callable[[], None]) -> Iterator[None]:
    """Call `pause` after every so many layers of what this thread runs within; None: never."""
    kept = _pause.set(None if layers is None else (layers, pause))
    try:
        yield
    finally:
        _pause.reset(kept)


class FusedDecoder(Decoder):
    """Takes the place of `decoder` in a model, and its weights: its layers are gone afterwards."""

    def __init__(self, decoder: Decoder):
        nn.Module.__init__(self)
        self.config, self.rope_inv_freq_bf16 = decoder.config, decoder.rope_inv_freq_bf16
        self.embed_tokens, self.norm, self.norm_moe_gen = decoder.embed_tokens, decoder.norm, decoder.norm_moe_gen
        self.early = False
        self.layers = decoder.layers
        for index, layer in enumerate(decoder.layers):
            self.layers[index] = FusedLayer(layer)  # one at a time: the plain one's memory is free before the next

    def forward(self, hidden, positions, routing, spans=None, cache=None, keep=True):
        call = self.call(hidden, positions, routing, spans, cache)
        context = spans is not None  # which runs kernel by kernel, where steps are recorded
        with early(self.early), waiting_for_launches(context):
            states = self._through(routing.split(hidden), self._fused(call, call.caches))
        if keep:
            for each in call.caches:
                each.advance(hidden.shape[1])
        return routing.merge(states)

    def step(self, hidden: torch.Tensor, positions: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        """hidden [B, n, H] at positions [B, 3, n], behind each row's kept tokens -> states [B, n, H].

        Does not count the lengths on. Reads nothing on the host, so that it can be captured.
        """
        call = self._fused(self.call(hidden, positions, Routing()), cache)
        with early(self.early):
            return self._through(Twin(hidden, None), call).und

    def _fused(self, call, caches) -> FusedCall:
        tables = tuple((table if table.dim() == 3 else table[None]).contiguous() for table in call.rotary)
        return FusedCall(call.routing, tables, call.spans, caches, call.wide_qk, self._mask(call, tables[0]))

    def _mask(self, call, like: torch.Tensor) -> torch.Tensor | None:
        """Where one attention over few tokens takes the place of several, or of one that would need a mask anyway."""
        spans, context = call.spans, sum(each.length for each in call.caches)
        if not spans or len(call.caches) > 1 or context + spans[-1][1] > MASKED_TOKENS:
            return None
        alone = len(spans) == 1 and (not context or spans[0][2] in BLOCK_MODES or spans[0][1] == 1)
        return None if alone else span_mask(spans, context, like.dtype, like.device)

    def _through(self, x: Twin, call: FusedCall) -> Twin:
        added = Twin(None, None)
        every, pause = _pause.get() or (len(self.layers), None)
        for index, layer in enumerate(self.layers):
            if index and index % every == 0:
                pause()
            x, added = layer(x, added, call)
        und = add_rms_norm(x.und, added.und, self.norm.weight, self.norm.eps)[1]
        if x.gen is None:
            return Twin(und, None)
        return Twin(und, add_rms_norm(x.gen, added.gen, self.norm_moe_gen.weight, self.norm_moe_gen.eps)[1])


def use_early(decoder: FusedDecoder, on: bool) -> None:
    """Whether kernels start before their predecessors end, where the GPU can do that (`kernels/early.py`); from the
    next call on: what is recorded already stays as it is."""
    decoder.early = on and can_start_early(decoder.norm.weight.device)


def fuse_decoder(language_model: LanguageModel) -> None:
    """Fuse a language model's decoder where it is."""
    if not isinstance(language_model.model, FusedDecoder):
        language_model.model = FusedDecoder(language_model.model)
