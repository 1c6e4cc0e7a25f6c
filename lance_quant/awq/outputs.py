"""`OutputMoments`: what errors in a linear's outputs do to what the model puts out; rows that make up for each other.

Second moments of the gradients at the outputs stand beside those of the inputs as in K-FAC (arXiv 1503.05671): the
error E [O, I] of a weight costs tr(M E X E^T), M of the gradients, X of the inputs. Compensation column by column makes
up for X alone, each row by itself. `in_turn` rounds some rows of a linear after others, each time moving those that are
left to where they cancel what the rounded ones err in common, as YAQA does (arXiv 2505.22988, two-sided LDLQ). What is
drawn hangs on few directions of a layer's states: most of what is rounded away ends up in the others.

M is kept for blocks of at most BLOCK outputs; rows of different blocks know nothing of each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lance_quant.awq.block import Batch, Block
from lance_quant.awq.rounding import Draft, stacked, unstacked
from lance_quant.checkpoint.layout import layer_targets

BLOCK = 1024
TURNS = 8  # in which the rows of a block are rounded: each costs a pass over all columns
TOKENS = 4096  # taken back at once

Settle = Callable[[Draft], Draft]


@dataclass(frozen=True)
class OutputMoments:
    """Of one linear: blocks float32 [n, b, b] with n * b outputs, damped: positive definite."""

    blocks: Tensor

    @classmethod
    def of(cls, blocks: Tensor, damping: float) -> "OutputMoments | None":
        """damping: share of the mean second moment that is added to all; None where no gradient came."""
        diagonal = blocks.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean()
        if not (mean > 0 and mean.isfinite()):
            return None
        made = blocks / mean
        made.diagonal(dim1=1, dim2=2).add_(damping)
        return cls(made)

    def folded(self, rows: Tensor) -> "OutputMoments":
        """Of outputs that a fold divided by `rows` [O]."""
        rows = rows.view(self.blocks.shape[:2])
        return OutputMoments(self.blocks * rows[:, :, None] * rows[:, None, :])

    @cached_property
    def root(self) -> Tensor:
        """Upper factors R [n, b, b] with M = R^T R."""
        return torch.linalg.cholesky(self.blocks, upper=True)

    def weighed(self, x: Tensor) -> Tensor:
        """x [O, K] -> R x, whose squares count alike."""
        return (self.root @ x.reshape(*self.blocks.shape[:2], -1)).view(x.shape)


def weighed(x: Tensor, outputs: OutputMoments | None) -> Tensor:
    """x [O, K] as errors of its rows count; as it is where no gradient tells."""
    return x if outputs is None else outputs.weighed(x)


def block_size(outputs: int) -> int:
    """The largest that divides."""
    return max(size for size in range(1, min(outputs, BLOCK) + 1) if outputs % size == 0)


def gradient_moments(
    block: Block,
    tensors: Mapping[str, Tensor],
    gradients: Mapping[int, Tensor],
    counts: Mapping[tuple[str, str], float],
) -> dict[str, Tensor]:
    """Linear -> second moments [n, b, b] of the gradients at its outputs; absent where no token with a gradient came.

    tensors: of the float layer; gradients: sequence number -> at what the layer puts out [n, H]; counts: (task, path)
    -> what a task weighs, which its sequences share.
    """
    targets = layer_targets(block.config, block.layer)
    found: dict[str, Tensor] = {}
    tasks = [batch.tasks[row] for batch in block.batches for row in _rows(batch, gradients)]
    for batch in block.batches:
        rows = _rows(batch, gradients)
        step = max(1, TOKENS // batch.states.shape[1])
        for some in (rows[start : start + step] for start in range(0, len(rows), step)):
            part = batch.part(some)
            behind = torch.stack([gradients[number] for number in part.numbers]).to(part.states)
            for target, gradient in zip(targets, block.gradients(tensors, part, behind), strict=True):
                if gradient is not None:
                    shares = [counts.get((task, target.path), 1.0) / tasks.count(task) for task in part.tasks]
                    root = torch.tensor(shares, device=gradient.device).sqrt()[:, None, None]
                    rows_ = (gradient * root).flatten(0, 1).unflatten(1, (-1, block_size(target.out_features)))
                    moments = torch.einsum("tnb,tnc->nbc", rows_, rows_)
                    found[target.name] = found[target.name].add_(moments) if target.name in found else moments
    return found


def _rows(batch: Batch, gradients: Mapping[int, Tensor]) -> list[int]:
    return [row for row, number in enumerate(batch.numbers) if number in gradients]


class _Turns:
    """The rows of one linear, on their way."""

    def __init__(self, made: Draft, moments: OutputMoments):
        self.made, (count, self.size, _) = made, moments.blocks.shape
        order = moments.blocks.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        ordered = moments.blocks.gather(1, order[:, :, None].expand_as(moments.blocks))
        ordered = ordered.gather(2, order[:, None, :].expand_as(moments.blocks))
        self.factor = inverse_factors(ordered)
        self.rows = order + torch.arange(count, device=order.device)[:, None] * self.size
        self.left = made.latent[self.rows]  # what rows that are not yet rounded should become [n, b, I]
        self.width = -(-self.size // TURNS)
        self.parts: list[Draft] = []

    def part(self, turn: int) -> Draft | None:
        """The rows of a turn, rounded to nearest; None where there are none left."""
        at = self._at(turn)
        rows = self.rows[:, at].flatten()
        if not len(rows):
            return None
        made, left = self.made, self.left[:, at].flatten(0, 1)
        held = made.constant[rows].repeat_interleave(made.grid.group_size, dim=1)  # of one value: nothing may move them
        latent = torch.where(held, made.latent[rows], left)
        return Draft(latent, made.step[rows], made.zero[rows], made.constant[rows], made.grid)

    def settle(self, turn: int, part: Draft) -> None:
        """Take the rounded rows, and let those that are left make up for them."""
        at = self._at(turn)
        after = slice(at.stop, self.size)
        error = self.left[:, at] - part.weight().view(self.left[:, at].shape)
        error = torch.linalg.solve_triangular(self.factor[:, at, at].mT, error, upper=False)
        self.left[:, after].baddbmm_(self.factor[:, at, after].mT, error, alpha=-1)
        self.parts.append(part)

    def whole(self) -> Draft:
        """All rows in their order; `settle` came for every turn."""
        at = [self.rows[:, self._at(turn)].flatten() for turn in range(len(self.parts))]
        back = torch.cat(at).argsort()
        parts = ("latent", "step", "zero")
        together = {name: torch.cat([getattr(part, name) for part in self.parts])[back] for name in parts}
        return replace(self.made, **together)

    def _at(self, turn: int) -> slice:
        start = min(turn * self.width, self.size)
        return slice(start, min(start + self.width, self.size))


def in_turn(drafts: Sequence[Draft], moments: Sequence[OutputMoments], settle: Settle) -> list[Draft]:
    """Linears of one input, a share of all their rows after another.

    drafts: rounded to nearest over their ranges; settle: compensates some rows, each by itself.
    """
    linears = [_Turns(made, one) for made, one in zip(drafts, moments, strict=True)]
    for turn in range(TURNS):
        parts = [(linear, part) for linear in linears if (part := linear.part(turn)) is not None]
        if parts:
            settled = unstacked(settle(stacked([part for _, part in parts])), [len(part.latent) for _, part in parts])
            for (linear, _), part in zip(parts, settled, strict=True):
                linear.settle(turn, part)
    return [linear.whole() for linear in linears]


def inverse_factors(moments: Tensor) -> Tensor:
    """Upper Cholesky factors of the inverses of [n, b, b], float32."""
    size = moments.diagonal(dim1=1, dim2=2).sqrt().double()
    # of outputs of one size each, back to front (as `compensate.inverse_factor`)
    even = (moments / size[:, :, None] / size[:, None, :]).flip(1, 2)
    one = torch.eye(even.shape[1], dtype=even.dtype, device=even.device)
    upper = torch.linalg.solve_triangular(torch.linalg.cholesky(even), one, upper=False).flip(1, 2)
    return (upper / size[:, None, :]).float()
