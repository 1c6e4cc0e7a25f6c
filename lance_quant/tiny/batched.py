"""Batched forward passes of a Lance over the static sequences of `layouts`, for training and measuring by the hundred.

They compute what the model's own modules compute, from the same weights; static is what is static here: one window a
picture in the vision tower, a cut for routing, tables of positions and masks looked up by caption length. A layer is a
function of plain tensors, so that one compiled kernel set serves every layer. The tests hold all of it against the
model's general path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lance_quant.model.lance import Lance
from lance_quant.model.pixels import VIT_MEAN, VIT_STD
from lance_quant.model.rotary import rotate
from lance_quant.model.sampler import FlowConfig, is_guided, timesteps
from lance_quant.tiny.layouts import CAPTION_WIDTH, LATENTS, LOOKS, AskLayout, DrawLayout, rotary

EPS = 1e-6
_SIDE = 2 * LOOKS[0]
Weights = list[torch.Tensor]

ATTENTION = (
    *(f"self_attn.{leaf}{{0}}.{part}" for leaf in ("q_proj", "k_proj", "v_proj") for part in ("weight", "bias")),
    *(f"self_attn.{leaf}{{0}}.weight" for leaf in ("q_norm", "k_norm", "o_proj")),
    "input_layernorm{0}.weight",
)
MLP = (
    *(f"mlp{{0}}.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")),
    "post_attention_layernorm{0}.weight",
)
VIT_ATTENTION = ("norm1.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias")
VIT_MLP = ("norm2.weight", *(f"mlp.{leaf}.{part}" for leaf in ("gate_proj", "up_proj", "down_proj") for part in ("weight", "bias")))  # fmt: skip # noqa: E501


def weights(module: nn.Module, names: tuple[str, ...], suffix: str = "") -> Weights:
    return [module.get_parameter(name.format(suffix)) for name in names]


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def project(x: torch.Tensor, w: Weights) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, rows, heads, head_dim] of one expert."""
    wq, bq, wk, bk, wv, bv, q_norm, k_norm, _, norm = w
    x = rms(x, norm)
    q, k, v = (F.linear(x, a, b).unflatten(-1, (-1, q_norm.shape[0])) for a, b in ((wq, bq), (wk, bk), (wv, bv)))
    return rms(q, q_norm), rms(k, k_norm), v


def mlp(x: torch.Tensor, w: Weights) -> torch.Tensor:
    gate, up, down, norm = w
    x = rms(x, norm)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def layer(und, gen, w_und: Weights, w_gen: Weights, cos, sin, bias) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One decoder layer: und [B, n, H] and gen [B, m, H] or None; bias [B or 1, 1, n + m, n + m], 0 or -inf."""
    split = len(ATTENTION)
    q, k, v = project(und, w_und[:split])
    if gen is not None:
        q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), project(gen, w_gen[:split]), strict=True))
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
    # keys and values are repeated here: kernels for grouped queries take no mask
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(q), q.shape[1], -1, -1))
    out = out.transpose(1, 2).flatten(2)
    und = und + F.linear(out[:, : und.shape[1]], w_und[split - 2])
    und = und + mlp(und, w_und[split:])
    if gen is not None:
        gen = gen + F.linear(out[:, und.shape[1] :], w_gen[split - 2])
        gen = gen + mlp(gen, w_gen[split:])
    return und, gen


def vit_block(x: torch.Tensor, w: Weights, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One block of the vision tower on [B, 64, width]; every picture is one attention window."""
    norm, w_qkv, b_qkv, w_out, b_out, norm2, w_gate, b_gate, w_up, b_up, w_down, b_down = w
    q, k, v = F.linear(rms(x, norm), w_qkv, b_qkv).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + F.linear(mixed, w_out, b_out)
    inner = rms(x, norm2)
    return x + F.linear(F.silu(F.linear(inner, w_gate, b_gate)) * F.linear(inner, w_up, b_up), w_down, b_down)


@dataclass(frozen=True)
class Kernels:
    """The two repeated functions, plain or compiled."""

    layer: Callable = layer
    vit_block: Callable = vit_block

    @classmethod
    def compiled(cls) -> Kernels:
        return cls(torch.compile(layer, dynamic=False), torch.compile(vit_block, dynamic=False))


PLAIN = Kernels()


def vit_rotary(head_dim: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [64, head_dim] of the tower's patches in its 2 x 2 grouped order."""
    grid = torch.arange(_SIDE)
    h, w = torch.meshgrid(grid, grid, indexing="ij")
    h, w = (p.reshape(LOOKS[0], 2, LOOKS[1], 2).transpose(1, 2).flatten() for p in (h, w))
    half = head_dim // 2
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    frequencies = frequencies.to(torch.bfloat16).float()
    angles = torch.cat((h[:, None] * frequencies, w[:, None] * frequencies), 1).repeat(1, 2)
    return angles.cos().to(device), angles.sin().to(device)


def working_dtype(lance: Lance) -> torch.dtype:
    """Attention runs in bfloat16 on a GPU (autocast in training, the weights' own else)."""
    return torch.bfloat16 if lance.device.type == "cuda" else lance.dtype


def as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def run_layers(lance: Lance, und, gen, tables, bias, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every layer and the final norms."""
    decoder = lance.language_model.model
    cos, sin = (table.to(lance.dtype) for table in tables)
    for each in decoder.layers:
        w_und = weights(each, ATTENTION + MLP)
        w_gen = weights(each, ATTENTION + MLP, "_moe_gen") if gen is not None else []
        und, gen = kernels.layer(und, gen, w_und, w_gen, cos, sin, bias)
    return decoder.norm(und), None if gen is None else decoder.norm_moe_gen(gen)


class Asker:
    """x2t_image for whole batches: teacher-forced, which tells exactly whether greedy decoding gives the reference."""

    def __init__(self, lance: Lance, layout: AskLayout):
        device = lance.device
        self.lance = lance
        self.prefix = torch.tensor(layout.prefix, device=device)
        self.bias = as_bias(layout.mask.to(device), working_dtype(lance))
        self.tables = tuple(t.to(device) for t in rotary(lance.config, layout.positions))
        self.heads = lance.vit_model.blocks[0].attn.num_heads
        self.vit_tables = vit_rotary(lance.vit_model.blocks[0].attn.head_dim, device)
        self.mean = torch.tensor(VIT_MEAN, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(VIT_STD, device=device).view(1, 3, 1, 1)

    def patches(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, 112, 112] -> float32 vision-tower patches [B, 64, 1176], grouped by 2 x 2."""
        x = (pictures.float() / 255 - self.mean) / self.std
        x = x.view(-1, 3, LOOKS[0], 2, 14, LOOKS[1], 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
        x = x.reshape(len(pictures), _SIDE * _SIDE, 3, 1, 14, 14).expand(-1, -1, -1, 2, -1, -1)
        return x.reshape(len(pictures), _SIDE * _SIDE, -1)

    def look(self, pictures: torch.Tensor, kernels: Kernels = PLAIN) -> torch.Tensor:
        """uint8 pictures -> merged tokens [B, 16, H]."""
        tower = self.lance.vit_model
        x = F.linear(self.patches(pictures).to(self.lance.dtype), tower.patch_embed.proj.weight.flatten(1))
        for block in tower.blocks:
            x = kernels.vit_block(x, weights(block, VIT_ATTENTION + VIT_MLP), self.heads, *self.vit_tables)
        return tower.merger(x).view(len(x), LOOKS[0] * LOOKS[1], -1)

    def logits(self, pictures: torch.Tensor, text: torch.Tensor, kernels: Kernels = PLAIN) -> torch.Tensor:
        """[B, TEXT_WIDTH, V] behind every token of the text part [B, TEXT_WIDTH]."""
        embed = self.lance.language_model.model.embed_tokens
        seen = self.look(pictures, kernels)
        first = embed(self.prefix)[None].expand(len(text), -1, -1)
        hidden = torch.cat((first, seen.to(first.dtype), embed(text)), 1)
        out, _ = run_layers(self.lance, hidden, None, self.tables, self.bias, kernels)
        return self.lance.language_model.lm_head(out[:, -text.shape[1] :])

    @torch.no_grad()
    def exact(self, pictures: torch.Tensor, text: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
        """Bool [B]: every token of the answer, its end included, is the most likely one. spans: [B, 2]."""
        logits = self.logits(pictures, text).float()
        logits[..., self.lance.config.tokenizer_length :] = -torch.inf
        place = torch.arange(1, text.shape[1], device=text.device)
        inside = (place >= spans[:, :1]) & (place < spans[:, 1:])
        return ((logits[:, :-1].argmax(-1) == text[:, 1:]) | ~inside).all(1)


class Drawer:
    """t2i for whole batches: the cached flow's numbers, without its cache."""

    def __init__(self, lance: Lance, layout: DrawLayout):
        self.lance, self.layout = lance, layout
        device = lance.device
        self.prefix = torch.tensor(layout.prefix, device=device)
        self.ends = torch.tensor(layout.ends, device=device)
        self.table = lance.latent_table([(1, *LATENTS)])
        every = torch.arange(CAPTION_WIDTH + 1)
        pairs = torch.cartesian_prod(every, every)
        self.tables = tuple(t.to(device) for t in rotary(lance.config, layout.positions(*pairs.T)))
        self.biases = as_bias(layout.masks(every).to(device), working_dtype(lance))

    def ids(self, captions: torch.Tensor) -> torch.Tensor:
        """[B, texts] of caption ids [B, CAPTION_WIDTH]."""
        count = len(captions)
        return torch.cat((self.prefix.expand(count, -1), captions, self.ends.expand(count, -1)), 1)

    def branch(self, lengths: torch.Tensor, tail_lengths: torch.Tensor) -> tuple[tuple, torch.Tensor]:
        """Rotary tables and attention bias for captions of these lengths [B]."""
        pair = lengths * (CAPTION_WIDTH + 1) + tail_lengths
        return tuple(table[pair] for table in self.tables), self.biases[lengths]

    def velocity(self, captions, x, t, branch: tuple, kernels: Kernels = PLAIN) -> torch.Tensor:
        """[B, 64, 48] of noised latents x [B, 64, 48] at t [B, 1]; captions [B, CAPTION_WIDTH]."""
        und = self.lance.language_model.model.embed_tokens(self.ids(captions))
        gen = self.lance.embed_latents(x, t, self.table)
        _, out = run_layers(self.lance, und, gen.to(und.dtype), *branch, kernels)
        return self.lance.llm2vae(out)

    @torch.no_grad()
    def draw(self, captions: torch.Tensor, lengths: torch.Tensor, noise: torch.Tensor, cfg: FlowConfig) -> torch.Tensor:
        """Latents [B, 64, 48] from noise; guidance renormalised over each picture."""
        with_caption = self.branch(lengths, lengths)
        without = self.branch(torch.zeros_like(lengths), lengths)  # quirk Q3: the tail keeps its positions
        grid = timesteps(cfg)
        x = noise.to(self.lance.dtype)
        for step in range(cfg.steps):
            t = grid[step].to(x.device).expand(len(x), 1)
            v = self.velocity(captions, x, t, with_caption)
            if is_guided(grid[step], cfg):
                free = self.velocity(captions, x, t, without)
                guided = free + cfg.guidance * (v - free)
                norms = [part.float().flatten(1).norm(dim=1) for part in (v, guided)]
                scale = (norms[0] / (norms[1] + 1e-8)).clamp(cfg.renorm_min, 1.0)
                v = (guided * scale[:, None, None]).to(guided.dtype)
            x = (x - v * (grid[step] - grid[step + 1]).item()).to(x.dtype)
        return x
