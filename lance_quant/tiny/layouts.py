"""Static sequences for batches: every sample of a task has the same length, routing and blocks; only ids, lengths
and pixels vary.

Attention knows order by positions and mask alone, so a drawing sequence keeps its latents last: routing is then a
cut, not a gather.

    x2t_image   prefix, vision_start | 16 looks | vision_end, question, tail, answer, im_end, padding
    t2i         prefix | caption, padded | tail | vision_start, vision_end | 64 latents
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from tokenizers import Tokenizer

from lance_quant.errors import LanceQuantError
from lance_quant.model.positions import block_mask
from lance_quant.model.prompts import IM_END, SYSTEM, encode
from lance_quant.model.request import INSTRUCTIONS
from lance_quant.model.rotary import frequencies_on, rotary_tables
from lance_quant.model.routing import Routing, Twin

TAIL = f"{IM_END}\n<|im_start|>assistant\n"
LOOKS = (4, 4)  # merged vision-tower tokens of a 112 px picture
LATENTS = (8, 8)  # latents of a 128 px picture
VIT_EDGE = 112
TEXT_WIDTH = 56
CAPTION_WIDTH = 30


@dataclass(frozen=True)
class CutRouting(Routing):
    """Understanding rows first, `latents` generation rows last."""

    latents: int = 0

    def split(self, x: torch.Tensor) -> Twin:
        return Twin(x[:, : -self.latents], x[:, -self.latents :])

    def merge(self, twin: Twin) -> torch.Tensor:
        return torch.cat((twin.und, twin.gen), 1)


def head(system: str) -> str:
    return f"<|im_start|>system\n{system}{IM_END}\n<|im_start|>user\n"


def block_positions(base: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Positions [..., 3, h * w] of a picture's block whose vision_start stands at base - 1."""
    h, w = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    offsets = torch.stack((torch.zeros_like(h), h, w)).flatten(1).to(base.device)
    return base[..., None, None] + offsets


def text_positions(base: torch.Tensor, count: int) -> torch.Tensor:
    """Positions [..., 3, count] that count up from base on all axes."""
    return (base[..., None] + torch.arange(count, device=base.device))[..., None, :].expand(*base.shape, 3, count)


@dataclass(frozen=True)
class AskLayout:
    """x2t_image: the same mask and positions for every sample; padding stands behind the answer, where nothing sees
    it."""

    tokenizer: Tokenizer

    @cached_property
    def prefix(self) -> list[int]:
        return encode(self.tokenizer, head(INSTRUCTIONS["x2t_image"]) + "<|vision_start|>")

    @property
    def length(self) -> int:
        return len(self.prefix) + LOOKS[0] * LOOKS[1] + TEXT_WIDTH

    @cached_property
    def mask(self) -> torch.Tensor:
        """Bool [1, 1, n, n]."""
        start, looks = len(self.prefix) - 1, LOOKS[0] * LOOKS[1]
        lengths = (start, looks + 2, self.length - start - looks - 2)
        return block_mask(lengths, ("causal", "full", "causal"))[None, None]

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [1, 3, n]."""
        base = torch.tensor([len(self.prefix)])
        after = base + max(LOOKS)
        return torch.cat(
            (
                text_positions(base * 0, len(self.prefix)),
                block_positions(base, LOOKS),
                text_positions(after, TEXT_WIDTH),
            ),
            2,
        )

    def text(self, question: str, answer: str) -> tuple[list[int], int, int]:
        """Ids [TEXT_WIDTH] of everything behind the looks, and where the answer (im_end included) starts and ends."""
        asked = encode(self.tokenizer, f"<|vision_end|>{question}{TAIL}")
        told = encode(self.tokenizer, answer + IM_END)
        ids = asked + told
        if len(ids) > TEXT_WIDTH:
            raise LanceQuantError(f"'{question} {answer}' takes {len(ids)} tokens, the layout holds {TEXT_WIDTH}.")
        return ids + [0] * (TEXT_WIDTH - len(ids)), len(asked), len(ids)


@dataclass(frozen=True)
class DrawLayout:
    """t2i: captions are padded inside the sequence; the mask hides the padding and positions skip it."""

    tokenizer: Tokenizer

    @cached_property
    def prefix(self) -> list[int]:
        return encode(self.tokenizer, head(SYSTEM["t2i"]))

    @cached_property
    def ends(self) -> list[int]:
        """Tail, vision_start, vision_end."""
        return encode(self.tokenizer, f"{TAIL}<|vision_start|><|vision_end|>")

    @property
    def latents(self) -> int:
        return LATENTS[0] * LATENTS[1]

    @property
    def texts(self) -> int:
        return len(self.prefix) + CAPTION_WIDTH + len(self.ends)

    @cached_property
    def order(self) -> torch.Tensor:
        """Where each place of this layout stands in the model's own order (vision_end comes behind the latents)."""
        texts = torch.arange(self.texts)
        texts[-1] += self.latents
        return torch.cat((texts, torch.arange(self.latents) + self.texts - 1))

    @cached_property
    def mask(self) -> torch.Tensor:
        """Bool [n, n], padding not yet hidden."""
        lengths = (len(self.prefix), CAPTION_WIDTH, len(self.ends) - 2, self.latents + 2)
        return block_mask(lengths, ("causal", "causal", "causal", "noise"))[self.order][:, self.order]

    @property
    def routing(self) -> CutRouting:
        return CutRouting(latents=self.latents)

    def caption(self, text: str) -> tuple[list[int], int]:
        ids = encode(self.tokenizer, text)
        if len(ids) > CAPTION_WIDTH:
            raise LanceQuantError(f"'{text}' takes {len(ids)} tokens, the layout holds {CAPTION_WIDTH}.")
        return ids + [0] * (CAPTION_WIDTH - len(ids)), len(ids)

    def masks(self, lengths: torch.Tensor) -> torch.Tensor:
        """Bool [B, 1, n, n] for captions of these lengths [B]."""
        place = torch.arange(CAPTION_WIDTH, device=lengths.device)
        open_ = torch.ones(len(lengths), self.texts + self.latents, dtype=torch.bool, device=lengths.device)
        a = len(self.prefix)
        open_[:, a : a + CAPTION_WIDTH] = place < lengths[:, None]
        return (self.mask.to(lengths.device) & open_[:, None, :])[:, None]

    def positions(self, lengths: torch.Tensor, tail_lengths: torch.Tensor) -> torch.Tensor:
        """int64 [B, 3, n]. `lengths`: captions as the drawn block counts them; `tail_lengths`: as the tail does.
        They differ in the cached unconditional branch alone (Lance spec quirk Q3)."""
        a, tail = len(self.prefix), len(self.ends) - 2
        zero = torch.zeros_like(lengths)
        start = a + lengths + tail
        return torch.cat(
            (
                text_positions(zero, a),
                text_positions(zero + a, CAPTION_WIDTH),
                text_positions(a + tail_lengths, tail),
                text_positions(start, 1),
                text_positions(start + 1 + max(LATENTS), 1),
                block_positions(start + 1, LATENTS),
            ),
            2,
        )


def rotary(config, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [B, n, head_dim], with the bf16 model's rounded frequencies."""
    rope = frequencies_on(positions.device, config.head_dim, config.rope_theta, config.mrope_section, True)
    return rotary_tables(positions, *rope, torch.float32)
