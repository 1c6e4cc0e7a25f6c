"""`lessons`: what a layer should put out for its kept sequences, and what each token of them counts.

Targets are the float model's; inputs are too, except in sequential recipes, where the rounded layers before enter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lance_quant.awq.block import Batch, Block, Traced
from lance_quant.awq.score import TINY


@dataclass(frozen=True)
class Lesson:
    """A batch with the float model's states [B, n, H] before the layer, behind its attention and behind all of it, and
    what each token's squared error counts [B, n]."""

    batch: Batch
    entering: Tensor
    middle: Tensor
    wanted: Tensor
    counts: Tensor


def lessons(
    block: Block,
    source: dict[str, Tensor],
    weights: dict[tuple[str, str], float],
    traced: Sequence[Traced] | None = None,
) -> list[Lesson]:
    """What the float layer makes of its kept sequences. weights: (task, path) -> what it counts; traced: that of
    each batch, where it is known.

    A token's squared error counts by 1 / |its state|, half way between the absolute and the relative one: the few
    states that are a hundred times the others, which every later token attends to, neither drown nor are drowned out.
    """
    if traced is None:
        traced = [block.trace(source, batch, []) for batch in block.batches]
    size: dict[tuple[str, str], float] = {}
    for batch, states in zip(block.batches, traced, strict=True):
        norms = states.out.double().norm(dim=-1)
        for task, path, at in cells(batch):
            size[task, path] = size.get((task, path), 0.0) + norms[at].sum().item()
    total = sum(weights.get(cell, 1.0) for cell in size)
    made = []
    for batch, states in zip(block.batches, traced, strict=True):
        out = states.out
        counts = torch.zeros(out.shape[:2], device=out.device)
        for task, path, at in cells(batch):
            counts[at] = weights.get((task, path), 1.0) / (total * max(size[task, path], TINY))
        made.append(Lesson(batch, batch.states, states.middle, out, counts / out.norm(dim=-1).clamp(min=TINY)))
    return made


def weighed_lessons(taught: Sequence[Lesson], gradients: Mapping[int, Tensor], share: float) -> list[Lesson]:
    """Lessons in which `share` of what a task's latents count is spread as their squared gradients are. Those of text
    follow from one drawn token each, which is too few to weigh single tokens by.

    gradients: sequence number -> at what the layer puts out [n, H]; sequences without any stay as they are.
    """
    known = [
        (lesson, row, task, at[0], gradients[number].to(lesson.counts).square().sum(-1)[at[0]])
        for lesson in taught
        for row, number in enumerate(lesson.batch.numbers)
        if number in gradients
        for task, path, at in cells(lesson.batch.part([row]))
        if path == "gen"
    ]
    sums: dict[str, Tensor] = {}
    for lesson, row, task, at, square in known:
        both = torch.stack([lesson.counts[row, at].sum(), square.sum()]).double()
        sums[task] = sums[task] + both if task in sums else both
    counts = {id(lesson): lesson.counts.clone() for lesson in taught}
    for lesson, row, task, at, square in known:
        counted, squared = sums[task].tolist()
        if squared > TINY:
            even = lesson.counts[row, at] * (1 - share)
            counts[id(lesson)][row, at] = even + square * (share * counted / squared)
    return [replace(lesson, counts=counts[id(lesson)]) for lesson in taught]


def first_lessons(taught: Sequence[Lesson], tokens: int) -> list[Lesson]:
    """Sequences of every lesson, about `tokens` tokens in all, and what they count as if there were no others."""
    held = sum(lesson.counts.numel() for lesson in taught)
    some = []
    for lesson in taught:
        rows = max(1, round(len(lesson.counts) * min(1.0, tokens / held)))
        counts = lesson.counts[:rows] * (len(lesson.counts) / rows)
        states = (part[:rows] for part in (lesson.entering, lesson.middle, lesson.wanted))
        some.append(Lesson(lesson.batch.part(range(rows)), *states, counts))
    return some


def cells(batch: Batch) -> Iterator[tuple[str, str, Tensor]]:
    """(task, path, bool [B, n]) of the tokens that weigh in together."""
    for task in dict.fromkeys(batch.tasks):
        rows = torch.tensor([one == task for one in batch.tasks], device=batch.latent.device)
        for path, at in (("und", ~batch.latent), ("gen", batch.latent)):
            if at.any():
                yield task, path, rows[:, None] & at[None, :]


def loss_of(block: Block, tensors: dict[str, Tensor], lesson: Lesson, rows: Sequence[int]) -> Tensor:
    """Relative squared error in the layer's output over some rows of a lesson."""
    out = block.outputs(tensors, lesson.batch.part(rows))
    return ((out.float() - lesson.wanted[rows]).square().sum(-1) * lesson.counts[rows]).sum()


@torch.no_grad()
def whole_loss(block: Block, tensors: dict[str, Tensor], taught: Sequence[Lesson], most: int) -> float:
    """Over all sequences, `most` tokens at a time."""
    total = 0.0
    for lesson in taught:
        count, length = lesson.counts.shape
        for rows in torch.arange(count).split(max(1, most // length)):
            total += loss_of(block, tensors, lesson, rows.tolist()).item()
    return total
