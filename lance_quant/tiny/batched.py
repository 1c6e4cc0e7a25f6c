"""`Runner`: a task's batches through a Lance, over its static layout, for training and measuring by the hundred.

They compute what the model's own modules compute, from the same weights; static is what is static here: one window a
picture in the vision tower, a cut for routing, masks looked up by the prompt's length, the system text once for the
whole batch. What works token by token is a function of flat rows [tokens, H], so that one compiled kernel set serves
every layer, expert and task. The tests hold all of it against the model's general path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lance_quant.model.lance import Lance
from lance_quant.model.pixels import VIT_MEAN, VIT_STD
from lance_quant.model.request import UNDERSTANDING
from lance_quant.model.rotary import rotate
from lance_quant.model.sampler import FlowConfig, is_guided, timesteps
from lance_quant.tiny.layouts import VIT_EDGE, Layout, rotary

EPS = 1e-6
_PATCHES = VIT_EDGE // 14
_MERGED = _PATCHES // 2
Rows = list[torch.Tensor]


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def project(x: torch.Tensor, w: Rows, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Turned q [T, heads, d] and k, v [T, kv_heads, d] of one expert's rows x [T, H]; cos, sin [T, d]."""
    norm, qkv, bias, q_norm, k_norm, out = w
    width, d = out.shape[1], q_norm.shape[0]
    y = F.linear(rms(x, norm).to(qkv.dtype), qkv, bias)
    rest = (qkv.shape[0] - width) // 2
    q, k, v = (part.unflatten(-1, (-1, d)) for part in y.split((width, rest, rest), -1))
    cos, sin = cos[:, None], sin[:, None]
    return _turn(rms(q, q_norm), cos, sin).to(v.dtype), _turn(rms(k, k_norm), cos, sin).to(v.dtype), v


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def finish(x: torch.Tensor, mixed: torch.Tensor, w: Rows) -> torch.Tensor:
    """The rest of a layer on one expert's rows x [T, H], from what attention mixed [T, H]."""
    out, norm, gate_up, down = w
    x = x + F.linear(mixed, out)
    gate, up = F.linear(rms(x, norm).to(gate_up.dtype), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def vit_block(x: torch.Tensor, w: Rows, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One block of the vision tower on [B, 64, width]; every picture is one attention window."""
    norm, qkv, b_qkv, out, b_out, norm2, gate_up, b_gate_up, down, b_down = w
    inner = rms(x, norm).to(qkv.dtype)
    q, k, v = F.linear(inner, qkv, b_qkv).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + F.linear(mixed, out, b_out)
    gate, up = F.linear(rms(x, norm2).to(gate_up.dtype), gate_up, b_gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down, b_down)


@dataclass(frozen=True)
class Kernels:
    """The repeated functions, plain or compiled."""

    project: Callable = project
    finish: Callable = finish
    vit_block: Callable = vit_block

    @classmethod
    def compiled(cls, **options) -> Kernels:
        """For any number of rows at once; `options` are torch.compile's."""
        return cls(*(_compiled(function, **options) for function in (project, finish, vit_block)))


def _compiled(function: Callable, **options) -> Callable:
    fast = torch.compile(function, **options)

    def call(*inputs):
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.shape[0] != _PATCHES**2:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return fast(*inputs)

    return call


PLAIN = Kernels()


# ---------------------------------------------------------------- weights as the functions above take them


class Expert(NamedTuple):
    """project: norm, qkv, its bias, q_norm, k_norm, o; finish: o, norm, gate_up, down."""

    project: Rows
    finish: Rows


class Working(NamedTuple):
    """Weights of a step, joined and in the dtype of its matrix products: a pair of experts a layer, and the tower's
    blocks."""

    layers: list[tuple[Expert, Expert]]
    tower: list[Rows]


def working_weights(lance: Lance, dtype: torch.dtype) -> Working:
    """Gradients flow through to the model's own."""
    layers = [tuple(_expert(layer, suffix, dtype) for suffix in ("", "_moe_gen")) for layer in lance_layers(lance)]
    return Working(layers, [_vit_weights(block, dtype) for block in lance.vit_model.blocks])


def lance_layers(lance: Lance) -> nn.ModuleList:
    return lance.language_model.model.layers


def _joined(modules: list[nn.Module], leaf: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([getattr(module, leaf) for module in modules]).to(dtype)


def _expert(layer: nn.Module, suffix: str, dtype: torch.dtype) -> Expert:
    attention, mlp = layer.self_attn, layer.get_submodule("mlp" + suffix)
    projections = [attention.get_submodule(leaf + suffix) for leaf in ("q_proj", "k_proj", "v_proj")]
    norms = [attention.get_submodule(leaf + suffix).weight for leaf in ("q_norm", "k_norm")]
    out = attention.get_submodule("o_proj" + suffix).weight.to(dtype)
    first, second = (
        layer.get_submodule(leaf + suffix).weight for leaf in ("input_layernorm", "post_attention_layernorm")
    )
    qkv = [_joined(projections, leaf, dtype) for leaf in ("weight", "bias")]
    gate_up = _joined([mlp.gate_proj, mlp.up_proj], "weight", dtype)
    return Expert([first, *qkv, *norms, out], [out, second, gate_up, mlp.down_proj.weight.to(dtype)])


def _vit_weights(block: nn.Module, dtype: torch.dtype) -> Rows:
    attention, mlp = block.attn, block.mlp
    gate_up = [_joined([mlp.gate_proj, mlp.up_proj], leaf, dtype) for leaf in ("weight", "bias")]
    return [
        block.norm1.weight,
        *(value.to(dtype) for module in (attention.qkv, attention.proj) for value in (module.weight, module.bias)),
        block.norm2.weight,
        *gate_up,
        mlp.down_proj.weight.to(dtype),
        mlp.down_proj.bias.to(dtype),
    ]


# ---------------------------------------------------------------- a task's batches


def vit_rotary(head_dim: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [64, head_dim] of the tower's patches in its 2 x 2 grouped order."""
    grid = torch.arange(_PATCHES)
    h, w = torch.meshgrid(grid, grid, indexing="ij")
    h, w = (p.reshape(_MERGED, 2, _MERGED, 2).transpose(1, 2).flatten() for p in (h, w))
    half = head_dim // 2
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    frequencies = frequencies.to(torch.bfloat16).float()
    angles = torch.cat((h[:, None] * frequencies, w[:, None] * frequencies), 1).repeat(1, 2)
    return angles.cos().to(device), angles.sin().to(device)


def matmul_dtype(lance: Lance) -> torch.dtype:
    """bfloat16 on a GPU, the weights' own else."""
    return torch.bfloat16 if lance.device.type == "cuda" else lance.dtype


class Prompts(NamedTuple):
    """What a batch is about: ids [B, slot] padded, lengths [B], and the tower's tokens [B, looks, H] where the task
    looks at something."""

    ids: torch.Tensor
    lengths: torch.Tensor
    seen: torch.Tensor | None


class Runner:
    """A task's batches through a Lance.

    1. `work = working_weights(lance, dtype)`, once a training step.
    2. `look` at the frames, where the task has any.
    3. `logits` or `exact` of understanding; `velocity` or `draw` of generation.
    """

    def __init__(self, lance: Lance, layout: Layout, kernels: Kernels = PLAIN):
        device = lance.device
        self.lance, self.layout, self.kernels = lance, layout.to(device), kernels
        # the system text is the same for all and sees only itself: its rows run once
        self.shared = layout.looks.start - 1 if layout.looks.stop else len(layout.head)
        self.head = torch.tensor(layout.head, device=device)
        self.tail = torch.tensor(layout.tail, dtype=torch.int64, device=device)
        self.understands = layout.task in UNDERSTANDING
        self.denoised = int(layout.moving.sum())
        every = torch.arange(layout.slot, layout.slot + 1) if self.understands else torch.arange(layout.slot + 1)
        mask = layout.masks(every)[:, :, self.shared :]
        self.biases = torch.zeros(mask.shape, dtype=matmul_dtype(lance)).masked_fill(~mask, -torch.inf).to(device)
        self.table = None if self.understands else lance.latent_table(layout.grids)
        if layout.looks.stop:
            attention = lance.vit_model.blocks[0].attn
            self.heads = attention.num_heads
            self.vit_tables = vit_rotary(attention.head_dim, device)
            self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (VIT_MEAN, VIT_STD))

    def patches(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [B, F, 3, 112, 112] -> float32 patches [B * t, 64, 1176], grouped by 2 x 2; an odd clip repeats its
        last frame."""
        if frames.shape[1] % 2:
            frames = torch.cat((frames, frames[:, -1:]), 1)
        x = (frames.float() / 255 - self.mean) / self.std
        x = x.reshape(-1, 2, 3, _MERGED, 2, 14, _MERGED, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return x.reshape(len(x), _PATCHES**2, -1)

    def look(self, frames: torch.Tensor, work: Working) -> torch.Tensor | None:
        """uint8 frames [B, F, 3, 112, 112] -> merged tokens [B, looks, H]; None where the task looks at nothing."""
        if not self.layout.looks.stop:
            return None
        tower = self.lance.vit_model
        x = F.linear(self.patches(frames).to(self.lance.dtype), tower.patch_embed.proj.weight.flatten(1))
        for w in work.tower:
            x = self.kernels.vit_block(x, w, self.heads, *self.vit_tables)
        return tower.merger(x).view(len(frames), -1, self.lance.config.hidden_size)

    def _texts(self, prompts: Prompts) -> torch.Tensor:
        """Embedded rows of the understanding expert: shared [s, H] and each sample's own [B * m, H], as one."""
        embed, layout = self.lance.language_model.model.embed_tokens, self.layout
        count = len(prompts.ids)
        own = torch.cat(
            [part.expand(count, -1) for part in (self.head[self.shared :], prompts.ids, self.tail) if part.shape[-1]], 1
        )
        shared, own = embed(self.head[: self.shared]), embed(own)
        if prompts.seen is not None:
            start, stop = layout.looks.start - self.shared, layout.looks.stop - self.shared
            own = torch.cat((own[:, :start], prompts.seen.to(own.dtype), own[:, stop:]), 1)
        return torch.cat((shared, own.flatten(0, 1)))

    def _layers(self, und, gen, lengths, context, work: Working) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Every layer and the final norms: und [s + B * m, H], gen [B * latents, H] -> [B, m, H], [B, latents, H]."""
        lance, layout, s, count = self.lance, self.layout, self.shared, len(lengths)
        tables = rotary(lance.config, layout.positions(context, lengths))
        bias = self.biases if self.understands else self.biases[lengths]
        turns = [
            (
                torch.cat((table[0, :s], table[:, s : layout.texts].flatten(0, 1))).to(lance.dtype),
                table[:, layout.texts :].flatten(0, 1).to(lance.dtype),
            )
            for table in tables
        ]
        for w_und, w_gen in work.layers:
            parts = [self.kernels.project(und, w_und.project, turns[0][0], turns[1][0])]
            if gen is not None:
                parts.append(self.kernels.project(gen, w_gen.project, turns[0][1], turns[1][1]))
            mixed, drawn = self._attend(parts, bias, count)
            und = self.kernels.finish(und, mixed, w_und.finish)
            if gen is not None:
                gen = self.kernels.finish(gen, drawn, w_gen.finish)
        decoder = lance.language_model.model
        und = decoder.norm(und[s:].unflatten(0, (count, -1)))
        return und, None if gen is None else decoder.norm_moe_gen(gen.unflatten(0, (count, -1)))

    def _attend(self, parts, bias: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What attention mixes for und rows [s + B * m, H] and gen rows [B * latents, H]."""
        s = self.shared
        heads = parts[0][0].shape[1]
        # keys and values are repeated to all heads: kernels for grouped queries take no mask
        q, k, v = (
            [part[:, :, None].expand(-1, -1, heads // part.shape[1], -1) for part in column]
            for column in zip(*parts, strict=True)
        )
        shared = [column[0][None, :s].flatten(2, 3).transpose(1, 2) for column in (q, k, v)]
        alone = F.scaled_dot_product_attention(*shared, is_causal=True)[0].transpose(0, 1).flatten(1)

        def batched(column: list[torch.Tensor], with_shared: bool) -> torch.Tensor:
            own = [part.unflatten(0, (count, -1)) for part in (column[0][s:], *column[1:])]
            first = [column[0][None, :s].expand(count, -1, -1, -1, -1)] if with_shared else []
            return torch.cat([*first, *own], 1).flatten(2, 3).transpose(1, 2)

        q, k, v = batched(q, False), batched(k, True), batched(v, True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(count, heads, -1, -1))
        out = out.transpose(1, 2).flatten(2)
        own = self.layout.texts - s
        und = torch.cat((alone, out[:, :own].flatten(0, 1)))
        return und, out[:, own:].flatten(0, 1) if len(parts) > 1 else None

    def logits(self, prompts: Prompts, work: Working) -> torch.Tensor:
        """[B, slot, V] behind every token of the slot."""
        und, _ = self._layers(self._texts(prompts), None, prompts.lengths, prompts.lengths, work)
        return self.lance.language_model.lm_head(und[:, -self.layout.slot :])

    @torch.no_grad()
    def exact(self, prompts: Prompts, asked: torch.Tensor, work: Working) -> torch.Tensor:
        """Bool [B]: every token of the answer, its end included, is the most likely one: exactly what tells whether
        greedy decoding gives the reference. asked: where answers start [B]."""
        logits = self.logits(prompts, work).float()
        logits[..., self.lance.config.tokenizer_length :] = -torch.inf
        place = torch.arange(1, prompts.ids.shape[1], device=asked.device)
        inside = (place >= asked[:, None]) & (place < prompts.lengths[:, None])
        return ((logits[:, :-1].argmax(-1) == prompts.ids[:, 1:]) | ~inside).all(1)

    def velocity(self, prompts: Prompts, x, t, context: torch.Tensor, work: Working) -> torch.Tensor:
        """[B, target, 48] of latents x [B, latents, 48], clean ones in their places, at t [B].

        context: lengths [B] of the prompts that the positions of the context are for. Where a prompt is dropped (its
        length 0), they are still the whole prompt's in the cached flow (quirk Q3) and 0 in the uncached one.
        """
        lance, layout = self.lance, self.layout
        clean = lance.time_embedder(torch.zeros(1, device=t.device))
        times = torch.where(layout.moving[:, None], lance.time_embedder(t)[:, None], clean)
        gen = (lance.vae2llm(x.to(lance.dtype)) + times + self.table).to(lance.dtype)
        _, out = self._layers(self._texts(prompts), gen.flatten(0, 1), prompts.lengths, context, work)
        return lance.llm2vae(out[:, -layout.target :])

    def start(self, noise: torch.Tensor, clean: torch.Tensor | None) -> torch.Tensor:
        """Latents [B, latents, 48]: noise where they move, the clean ones elsewhere."""
        return noise if clean is None else torch.where(self.layout.moving[:, None], noise, clean.to(noise.dtype))

    @torch.no_grad()
    def draw(self, prompts: Prompts, state: torch.Tensor, cfg: FlowConfig, work: Working) -> torch.Tensor:
        """Drawn latents [B, target, 48] from `start`, by the cached flow's rules without its cache."""
        moving = self.layout.moving[-self.layout.target :, None]
        free = Prompts(prompts.ids, torch.zeros_like(prompts.lengths), prompts.seen)
        grid = timesteps(cfg)
        state = state.to(self.lance.dtype)
        for step in range(cfg.steps):
            t = grid[step].to(state.device).expand(len(state))
            v = self.velocity(prompts, state, t, prompts.lengths, work)
            if is_guided(grid[step], cfg):
                v = _guided(v, self.velocity(free, state, t, prompts.lengths, work), cfg)
            drawn = state[:, -self.layout.target :]
            drawn = drawn - torch.where(moving, v, 0) * (grid[step] - grid[step + 1]).item()
            state = torch.cat((state[:, : -self.layout.target], drawn.to(state.dtype)), 1)
        return state[:, -self.layout.target :]


def _guided(v: torch.Tensor, free: torch.Tensor, cfg: FlowConfig) -> torch.Tensor:
    """Renormalised over each sample's whole target."""
    guided = free + cfg.guidance * (v - free)
    norms = [part.float().flatten(1).norm(dim=1) for part in (v, guided)]
    scale = (norms[0] / (norms[1] + 1e-8)).clamp(cfg.renorm_min, 1.0)
    return (guided * scale[:, None, None]).to(guided.dtype)
