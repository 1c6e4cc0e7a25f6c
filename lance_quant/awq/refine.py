"""`refine`: from folded weights to drafts, one ingredient after another: clip, compensation, residual, learning.

Each takes the drafts of the one before. Sites that calibration did not reach stay rounded to nearest.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lance_quant.awq.block import Block
from lance_quant.awq.clip import CLIPS
from lance_quant.awq.compensate import compensate
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.descend import descend
from lance_quant.awq.grid import quantize
from lance_quant.awq.learn import Learning, learn, weights_of
from lance_quant.awq.lessons import Lesson, first_lessons, whole_loss
from lance_quant.awq.moments import Split, second_moments
from lance_quant.awq.residual import SITE, make_up, missing_parts
from lance_quant.awq.rounding import Draft, draft, rows_of, stacked
from lance_quant.awq.score import OutputError
from lance_quant.checkpoint.layout import Target

LOSS_TOKENS = 4096  # of a layer's kept sequences, for the table of ingredients


@dataclass
class Refinement:
    """A folded layer on its way to codes.

    source, folded: source key -> float32; columns: linear -> what folds multiplied its columns by [I], rows: its rows
    [O]; splits: (path, site) -> captured inputs; block, taught: None and empty without kept sequences. clips: linear ->
    mean shares of its ends that are kept; losses: ingredient -> of the whole layer on its kept sequences.
    """

    targets: list[Target]
    recipe: RecipeConfig
    seed: int
    source: dict[str, Tensor]
    folded: dict[str, Tensor]
    columns: dict[str, Tensor]
    rows: dict[str, Tensor]
    splits: dict[tuple[str, str], Split]
    block: Block | None
    taught: list[Lesson]
    clips: dict[str, tuple[float, float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    known: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def sites(self) -> list[tuple[Split, list[Target]]]:
        """Captured inputs with the linears that read them."""
        return [
            (split, [target for target in self.targets if (target.path, target.site) == key])
            for key, split in self.splits.items()
        ]

    def weight(self, target: Target) -> Tensor:
        return self.source[f"{target.name}.weight"]

    def moments(self, split: Split, linears: list[Target]) -> Tensor:
        """Of the rows that are fitted to; clip and compensation ask for the same ones."""
        key = (linears[0].path, linears[0].site)
        if key not in self.known:
            weights = [self.weight(target) for target in linears]
            self.known[key] = second_moments(weights, split.fit, self.columns[linears[0].name])
        return self.known[key]

    def stored(self) -> dict[str, Tensor]:
        """The folded layer as it is stored: norms and biases bf16."""
        weights = {f"{target.name}.weight" for target in self.targets}
        return {
            key: value if key in weights else value.to(torch.bfloat16).float() for key, value in self.folded.items()
        }

    def loss(self, drafts: dict[str, Draft]) -> float:
        """Mean relative squared error of the layer's output over some of its kept sequences."""
        return self._loss(self.stored() | weights_of(drafts))

    def loss_without(self, drafts: dict[str, Draft]) -> float:
        """The same of the layer rounded to nearest, no fold, nothing: on the grids of `drafts`."""
        plain = {target.name: quantize(self.weight(target), drafts[target.name].grid) for target in self.targets}
        return self._loss(self.source | {f"{name}.weight": rounded.dequantize() for name, rounded in plain.items()})

    def _loss(self, tensors: dict[str, Tensor]) -> float:
        return whole_loss(self.block, tensors, first_lessons(self.taught, LOSS_TOKENS), LOSS_TOKENS)

    def unfolded(self, target: Target, weight: Tensor) -> Tensor:
        """A folded weight as it acts in the unfolded layer."""
        return weight / self.columns[target.name] * self.rows[target.name][:, None]


Stage = tuple[str, dict[str, Draft]]  # an ingredient and what all linears are after it


def refine(work: Refinement, drafts: dict[str, Draft]) -> list[Stage]:
    """All ingredients of the recipe in order; `drafts` (linear -> draft) are rounded to nearest."""
    stages = [("folds" if work.recipe.folds else "minmax", drafts)]
    if work.recipe.clip != "none":
        stages.append(("clip", clipped(work, drafts)))
    for name in work.recipe.rounding:
        if name in ROUNDINGS:
            stages.append((name, ROUNDINGS[name](work, stages[-1][1])))
    if work.block is not None:
        work.losses = {"minmax": work.loss_without(drafts)} | {name: work.loss(made) for name, made in stages}
    return stages


def clipped(work: Refinement, drafts: dict[str, Draft]) -> dict[str, Draft]:
    """Linear by linear; one whose outputs are no closer by it keeps its whole range."""
    clip, made = CLIPS[work.recipe.clip], dict(drafts)
    for split, linears in work.sites():
        moments = work.moments(split, linears)
        for target in linears:
            trial, below, above = clip(drafts[target.name], moments, work.recipe)
            helps = closer(work, target, split, drafts[target.name], trial)
            made[target.name] = trial if helps else drafts[target.name]
            work.clips[target.name] = (below, above) if helps else (1.0, 1.0)
    return made


def closer(work: Refinement, target: Target, split: Split, was: Draft, trial: Draft) -> bool:
    """Whether a linear's outputs on the rows that choices are made by are closer to the float ones."""
    error = OutputError(work.weight(target), split.judge)
    before, after = (error(work.unfolded(target, one.weight()) - work.weight(target)) for one in (was, trial))
    return after < before


def compensated(work: Refinement, drafts: dict[str, Draft]) -> dict[str, Draft]:
    """Linears of a site together; one whose outputs are no closer by it stays as it was."""
    made = dict(drafts)
    for split, linears in work.sites():
        if linears[0].site == SITE and "residual" in work.recipe.rounding:
            continue  # its turn comes when the others are done
        together = settled(work, stacked([drafts[target.name] for target in linears]), work.moments(split, linears))
        start = 0
        for target in linears:
            trial = rows_of(together, start, start + target.out_features)
            start += target.out_features
            if closer(work, target, split, drafts[target.name], trial):
                made[target.name] = trial
    return made


def settled(work: Refinement, made: Draft, moments: Tensor) -> Draft:
    """Compensated, then as far down as the recipe's passes go. made: rounded to nearest over its ranges."""
    recipe = work.recipe
    return descend(compensate(made, moments, recipe.damping), made.latent, moments, recipe.damping, recipe.descent)


def corrected(work: Refinement, drafts: dict[str, Draft]) -> dict[str, Draft]:
    """down_proj rounded anew, compensated, from a weight that makes up for the other linears; taken where the layer
    gains by it. A path that no kept sequence takes is compensated alone.
    """
    made, recipe, stored = dict(drafts), work.recipe, work.stored()
    down = [(split, linears[0]) for split, linears in work.sites() if linears[0].site == SITE]
    others = {name: one for name, one in drafts.items() if name not in {target.name for _, target in down}}
    parts = missing_parts(work.block, stored | weights_of(others), work.taught)
    for split, target in down:
        part, was, weight = parts.get(target.path), drafts[target.name], stored[f"{target.name}.weight"]
        change = make_up(part) if part else None
        moments = work.moments(split, [target])
        trial, clips = draft(weight if change is None else weight + change, was.grid), None
        if recipe.clip != "none":
            trial, *clips = CLIPS[recipe.clip](trial, moments, recipe)
        trial = settled(work, trial, moments)
        if part:
            helps = part.error(trial.weight() - weight) < part.error(was.weight() - weight)
        else:
            helps = closer(work, target, split, was, trial)
        if helps:
            made[target.name] = trial
            if clips:
                work.clips[target.name] = tuple(clips)
    return made


def learned(work: Refinement, drafts: dict[str, Draft]) -> dict[str, Draft]:
    job = Learning(
        block=work.block, folded=work.stored(), taught=work.taught, recipe=work.recipe, seed=work.seed
    )  # fmt: skip
    return learn(job, drafts)[0]


ROUNDINGS = {"gptq": compensated, "residual": corrected, "learned": learned}  # all drafts start from "nearest"
