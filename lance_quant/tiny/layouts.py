"""`Layout`: the sequences of a task as one static shape, in which only a slot of text varies.

It is read off the model's own assembly and positions: two prompts, one token longer than the other, tell which tokens
move with the length of the prompt and which do not. Attention knows order by positions and mask alone, so latents can
stand last: routing is then a cut, not a gather.

    und   head (text, vision-tower tokens, ends of blocks) | slot, padded | tail
    gen   latents, source before target
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Tokenizer

from lance_quant.errors import LanceQuantError
from lance_quant.model.positions import CAPTION, Grid, block_mask, generation_positions, rope_positions
from lance_quant.model.prompts import IM_END, PAD, USER_BLOCKS, assemble, encode
from lance_quant.model.request import CLIP_TASKS, INSTRUCTIONS, UNDERSTANDING
from lance_quant.model.rotary import frequencies_on, rotary_tables
from lance_quant.tiny.world import CANVAS, CLIP_FRAMES

TAIL = f"{IM_END}\n<|im_start|>assistant\n"
VIT_EDGE = 112
SIDE = CANVAS // 16  # of a latent frame
FRAME_LATENTS = SIDE * SIDE
ALIGN = 8  # attention kernels want a bias whose rows are aligned

# tokens that the slot must hold: a prompt, of understanding tasks with the answer
SLOTS = {"x2t_image": 50, "t2i": 28, "image_edit": 14, "x2t_video": 62, "t2v": 36, "i2v": 14, "video_edit": 12}


def frames_of(task: str) -> int:
    return CLIP_FRAMES if task in CLIP_TASKS else 1


def latent_grid_of(task: str) -> Grid:
    return (frames_of(task) - 1) // 4 + 1, SIDE, SIDE


def vit_grid_of(task: str) -> Grid:
    """Patches; an odd clip repeats its last frame."""
    return (frames_of(task) + 1) // 2, VIT_EDGE // 14, VIT_EDGE // 14


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One task's static sequence of n = head + slot + tail + latents places.

    head, tail: their ids. looks: where in the head the vision tower's tokens stand. mask: bool [n, n], padding not yet
    hidden. start, slope: int64 [3, n]; a place stands at start + slope * length of the prompt. placed: bool [n], the
    target's block, which the cached unconditional branch places anew. moving: bool [latents] that are denoised, the
    rest is clean; target: latents drawn, the last ones. grids: of the latents' blocks.
    """

    task: str
    head: tuple[int, ...]
    tail: tuple[int, ...]
    slot: int
    looks: slice
    mask: torch.Tensor
    start: torch.Tensor
    slope: torch.Tensor
    placed: torch.Tensor
    moving: torch.Tensor
    target: int
    grids: tuple[Grid, ...]

    @property
    def latents(self) -> int:
        return len(self.moving)

    @property
    def texts(self) -> int:
        return len(self.head) + self.slot + len(self.tail)

    def masks(self, lengths: torch.Tensor) -> torch.Tensor:
        """Bool [B, 1, n, n] for prompts of these lengths [B]."""
        place = torch.arange(self.mask.shape[0], device=lengths.device) - len(self.head)
        shown = (place < lengths[:, None]) | (place >= self.slot)
        return (self.mask.to(lengths.device) & shown[:, None, :])[:, None]

    def positions(self, context: torch.Tensor, placed: torch.Tensor) -> torch.Tensor:
        """int64 [B, 3, n]: the context for prompts of lengths `context` [B], the target's block for `placed` [B].

        They differ in the cached unconditional branch alone (Lance spec quirk Q3).
        """
        lengths = torch.where(self.placed, placed[:, None], context[:, None])
        return self.start + self.slope * lengths[:, None]

    def to(self, device: torch.device | str) -> Layout:
        tensors = ("mask", "start", "slope", "placed", "moving")
        return Layout(**(vars(self) | {name: getattr(self, name).to(device) for name in tensors}))


@cache
def layout_of(task: str, source: str) -> Layout:
    """The layout of a task under a tokenizer, given as its JSON."""
    tokenizer = Tokenizer.from_str(source)
    one, two = (_probe(task, tokenizer, words) for words in ("a", "a a"))
    pad = tokenizer.token_to_id(PAD)
    begin, ids = one.prompt[0], one.sample.ids
    latent = one.sample.latent_mask()
    # places of the model's own sequence with a one-token slot, the slot left out, latents last; what stands behind the
    # target sees it not and is seen by nobody
    end = one.sample.spans()[-1][1] if task in UNDERSTANDING else one.target[1]
    context = [place for place in range(end) if place < begin or place >= one.prompt[1]]
    if task in UNDERSTANDING:
        context = [place for place in context if place < begin]
    head = [place for place in context if place < begin and not latent[place]]
    tail = [place for place in context if place >= begin and not latent[place]]
    drawn = [place for place in context if latent[place]]
    fixed = len(head) + len(tail) + len(drawn)
    slot = SLOTS[task] + (-fixed - SLOTS[task]) % ALIGN

    def longer(place: int) -> int:
        return place + (1 if place >= begin else 0)

    at_one = {place: one.positions[:, place] for place in context}
    slopes = {place: two.positions[:, longer(place)] - at_one[place] for place in context}
    order = [*head, *[None] * slot, *tail, *drawn]
    zero = torch.zeros(3, dtype=torch.int64)
    in_slot = iter(range(slot))
    first = one.positions[:, begin]
    start = torch.stack([first + next(in_slot) if p is None else at_one[p] - slopes[p] for p in order], 1)
    slope = torch.stack([zero if place is None else slopes[place] for place in order], 1)
    placed = torch.tensor([place is not None and one.target[0] <= place < one.target[1] for place in order])
    looks = [index for index, place in enumerate(head) if ids[place] == pad]
    rows = _rows(order, begin, slot)
    denoised = set(one.sample.mse_indexes.tolist())
    return Layout(
        task=task,
        head=tuple(ids[head].tolist()),
        tail=tuple(ids[tail].tolist()) if tail else (),
        slot=slot,
        looks=slice(looks[0], looks[-1] + 1) if looks else slice(0, 0),
        mask=_mask(one, slot)[rows][:, rows],
        start=start,
        slope=slope,
        placed=placed,
        moving=torch.tensor([place in denoised for place in drawn], dtype=torch.bool),
        target=sum(one.target[0] <= place < one.target[1] for place in drawn),
        grids=one.sample.latent_grids,
    )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A sample of the model's own assembly: positions [3, n], where its prompt and its target's block stand."""

    sample: object
    positions: torch.Tensor
    prompt: tuple[int, int]
    target: tuple[int, int]


def _probe(task: str, tokenizer: Tokenizer, prompt: str) -> Probe:
    looks = "vit" in USER_BLOCKS[task]
    sample = assemble(
        task,
        tokenizer,
        prompt,
        instruction=INSTRUCTIONS.get(task, ""),
        vit_grid=vit_grid_of(task) if looks else None,
        latent_grid=None if task in UNDERSTANDING else latent_grid_of(task),
    )
    pad = tokenizer.token_to_id(PAD)
    if task in UNDERSTANDING:  # the prompt is the start of the last split
        begin = sample.spans()[-1][0]
        count = len(encode(tokenizer, prompt))
        return Probe(
            sample=sample,
            positions=rope_positions(sample.ids, sample.grids, pad),
            prompt=(begin, begin + count),
            target=(len(sample.ids), len(sample.ids)),
        )
    places = (sample.modality == CAPTION).nonzero().squeeze(1).tolist()
    return Probe(
        sample=sample,
        positions=generation_positions(sample.ids, sample.grids, sample.modality, pad)[0],
        prompt=(places[0], places[-1] + 1),
        target=next((start, end) for start, end, mode in sample.spans() if mode == "noise"),
    )


def _rows(order: list[int | None], begin: int, slot: int) -> torch.Tensor:
    """Where each place of the layout stands in the model's sequence whose prompt has `slot` tokens."""
    rows, inside = [], 0
    for place in order:
        if place is None:
            rows.append(begin + inside)
            inside += 1
        else:
            rows.append(place + (slot - 1 if place >= begin else 0))
    return torch.tensor(rows)


def _mask(probe: Probe, slot: int) -> torch.Tensor:
    """Bool [n, n] of the model's sequence whose prompt has `slot` tokens instead of one."""
    spans = probe.sample.spans()
    lengths = [
        end - start + (slot - 1 if start <= probe.prompt[0] and probe.prompt[1] <= end else 0)
        for start, end, _ in spans
    ]
    return block_mask(lengths, [mode for _, _, mode in spans])


def write_slot(layout: Layout, tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], int, int]:
    """Ids [slot] of a prompt, the length, and where the answer (its end included) starts; that is the length where
    there is none."""
    if layout.task in UNDERSTANDING:
        asked = encode(tokenizer, prompt + TAIL)
        ids = asked + encode(tokenizer, answer + IM_END)
    else:
        asked = ids = encode(tokenizer, prompt)
    if len(ids) > layout.slot:
        raise LanceQuantError(
            f"'{prompt} {answer}' takes {len(ids)} tokens: raise SLOTS['{layout.task}'] above {layout.slot}"
        )
    return ids + [0] * (layout.slot - len(ids)), len(ids), len(asked)


def rotary(config, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [B, n, head_dim], with the bf16 model's rounded frequencies."""
    rope = frequencies_on(positions.device, config.head_dim, config.rope_theta, config.mrope_section, True)
    return rotary_tables(positions, *rope, torch.float32)
