"""`learn`: rounding offsets and group ranges of a layer's linears learned together, by the sign of the gradient.

1. target  what the float layer puts out for the kept sequences; in sequential recipes what the rounded layers before
           leave of these enters
2. step    round, run some sequences, take the gradient of the error in the layer's output through the rounding as if
           it were not there, move offsets (within half a code) and range factors by the step's rate against its sign
3. keep    the best of start and end over all sequences

Attention and MLP, both paths, make up for each other's errors (SignRound, arXiv 2309.05516).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lance_quant.awq.block import Block
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.grid import grouped
from lance_quant.awq.lessons import Lesson, cells, loss_of, whole_loss
from lance_quant.awq.rounding import Draft, with_range
from lance_quant.checkpoint.layout import layer_targets
from lance_quant.devices import repeatable


@dataclass
class Variable:
    """What is learned of one linear: offset [O, I] in -0.5..0.5, factors [O, I/G] of its groups' ends."""

    start: Draft
    low: Tensor
    high: Tensor
    offset: Tensor
    below: Tensor
    above: Tensor

    @classmethod
    def of(cls, made: Draft) -> "Variable":
        """From where the draft stands."""
        low, high = -made.zero * made.step, (made.grid.top - made.zero) * made.step
        offset = torch.zeros_like(made.latent) if made.offset is None else made.offset.clone()
        return cls(made, low, high, offset, torch.ones_like(low), torch.ones_like(high))

    def draft(self) -> Draft:
        """As learned so far."""
        return replace(with_range(self.start, self.low * self.below, self.high * self.above), offset=self.offset)

    def move(self, gradient: Tensor, rate: float, range_rate: float) -> None:
        """One step against the sign of the gradient [O, I] of the rounded weight."""
        made = self.draft()
        top, size = made.grid.top, made.grid.group_size
        gradient = grouped(gradient, size).masked_fill(made.constant[..., None], 0.0)
        ratio = grouped(self.start.latent, size) / made.step[..., None]
        exact = ratio + made.zero[..., None] + grouped(self.offset, size)
        under, over = exact < -0.5, exact > top + 0.5
        inside = ~(under | over)
        self.offset -= rate * (gradient * inside).sign().view(self.offset.shape)
        self.offset.clamp_(-0.5, 0.5)
        if not range_rate:
            return
        # inside, a longer step spreads the codes; outside, the weight is the range's own end
        codes = exact.round().clamp(0, top) - made.zero[..., None]
        along = (gradient * inside * (codes - ratio)).sum(-1) / top
        low = (gradient * under).sum(-1) - along
        high = (gradient * over).sum(-1) + along
        for factor, slope in ((self.below, low * self.low), (self.above, high * self.high)):
            factor -= range_rate * slope.sign()
            factor.clamp_(*FACTORS)


FACTORS = (0.5, 1.0)  # of a group's end


def turns(taught: Sequence[Lesson], steps: int, tokens: int, seed: int) -> list[dict[int, list[int]]]:
    """For each step lesson -> rows, about `tokens` tokens; every sequence once before any comes twice."""
    draw = torch.Generator().manual_seed(seed)
    everything = [(index, row) for index, lesson in enumerate(taught) for row in range(len(lesson.counts))]
    waiting: list[int] = []
    out = []
    for _ in range(steps):
        taken: dict[int, list[int]] = {}
        left = tokens
        while left > 0 and sum(map(len, taken.values())) < len(everything):
            if not waiting:
                waiting = torch.randperm(len(everything), generator=draw).tolist()
            index, row = everything[waiting.pop()]
            if row not in taken.setdefault(index, []):
                taken[index].append(row)
            left -= taught[index].counts.shape[1]
        out.append(taken)
    return out


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What `learn` knows beside the drafts.

    folded: the layer as it is stored, but for the weights of the drafts; taught: what it should put out.
    """

    block: Block
    folded: dict[str, Tensor]
    taught: Sequence[Lesson]
    recipe: RecipeConfig
    seed: int


@torch.no_grad()
def learn(job: Learning, drafts: dict[str, Draft]) -> tuple[dict[str, Draft], float, float]:
    """Better drafts of the linears in `drafts` (name -> draft), and the loss over all sequences before and after.

    Linears of a path that no kept sequence takes stay as they are.
    """
    block, recipe, taught = job.block, job.recipe, job.taught
    paths = {path for batch in block.batches for _, path, _ in cells(batch)}
    reached = [target.name for target in layer_targets(block.config, block.layer) if target.path in paths]
    variables = {name: Variable.of(drafts[name]) for name in reached}
    if not variables:
        return drafts, 0.0, 0.0

    def loss(of: dict[str, Draft]) -> float:
        return whole_loss(block, job.folded | weights_of(of), taught, recipe.learned_tokens)

    before = loss(drafts)
    fixed = job.folded | weights_of(drafts)
    with repeatable(block.device):
        for step, turn in enumerate(turns(taught, recipe.learned_steps, recipe.learned_tokens, job.seed)):
            gradients = _gradients(block, fixed, variables, taught, turn)
            left = 1 - step / recipe.learned_steps
            for name, variable in variables.items():
                variable.move(gradients[name], recipe.learned_rate * left, recipe.range_rate * left)
    learned = drafts | {name: variable.draft() for name, variable in variables.items()}
    after = loss(learned)
    return (learned, before, after) if after < before else (drafts, before, before)


def weights_of(drafts: dict[str, Draft]) -> dict[str, Tensor]:
    """As source keys."""
    return {f"{name}.weight": made.weight() for name, made in drafts.items()}


def _gradients(
    block: Block, fixed: dict[str, Tensor], variables: dict[str, Variable], taught: Sequence[Lesson], turn: dict
) -> dict[str, Tensor]:
    """Of the loss, for the rounded weight of every variable."""
    leaves = {name: variable.draft().weight().requires_grad_() for name, variable in variables.items()}
    now = fixed | {f"{name}.weight": leaf for name, leaf in leaves.items()}
    for index, rows in turn.items():
        with torch.enable_grad(), torch.autocast("cuda", torch.bfloat16, enabled=block.device.startswith("cuda")):
            loss = loss_of(block, now, taught[index], rows)
        loss.backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
