"""`refine`: from folded weights to drafts, one ingredient after another: clip, compensation, residual, learning.

Each takes the drafts of the one before. Sites that calibration did not reach stay rounded to nearest.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lance_quant.awq.block import Block
from lance_quant.awq.clip import CLIPS
from lance_quant.awq.compensate import Compensation
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.descend import descend
from lance_quant.awq.grid import quantize
from lance_quant.awq.learn import Learning, learn, weights_of
from lance_quant.awq.lessons import Lesson, first_lessons, whole_loss
from lance_quant.awq.moments import Split, second_moments
from lance_quant.awq.outputs import OutputMoments, in_turn, weighed
from lance_quant.awq.residual import Found, Missing, make_up, missing_parts
from lance_quant.awq.rounding import Draft, draft, stacked, unstacked
from lance_quant.awq.score import OutputError
from lance_quant.checkpoint.layout import SITES, Target

LOSS_TOKENS = 4096  # of a layer's kept sequences, for the table of ingredients


@dataclass
class Refinement:
    """A folded layer on its way to codes.

    source, folded: source key -> float32; columns: linear -> what folds multiplied its columns by [I], rows: its rows
    [O]; splits: (path, site) -> captured inputs; block, taught: None and empty without kept sequences. outputs: linear
    -> what errors of its outputs count, absent where no gradient tells. clips: linear -> mean shares of its ends that
    are kept; losses: ingredient -> of the whole layer on its kept sequences.
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
    outputs: dict[str, OutputMoments] = field(default_factory=dict)
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
        """A folded weight, or a change of one, as it acts in the unfolded layer."""
        return weight / self.columns[target.name] * self.rows[target.name][:, None]

    def refolded(self, target: Target, weight: Tensor) -> Tensor:
        """The other way."""
        return weight * self.columns[target.name] / self.rows[target.name][:, None]


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


def closer(
    work: Refinement, target: Target, split: Split, was: Draft, trial: Draft, outputs: OutputMoments | None = None
) -> bool:
    """Whether a linear's outputs on the rows that choices are made by are closer to the float ones. outputs: what they
    count, alike where None."""
    error = judged(work.weight(target), split, outputs)
    before, after = (error(work.unfolded(target, one.weight()) - work.weight(target)) for one in (was, trial))
    return after < before


def judged(weight: Tensor, split: Split, outputs: OutputMoments | None) -> Callable[[Tensor], float]:
    """Change of a weight [O, I], unfolded -> relative squared error of the linear's outputs on the rows that choices
    are made by, as they count."""
    error = OutputError(weighed(weight, outputs), split.judge)
    return lambda change: error(weighed(change, outputs))


def compensated(work: Refinement, drafts: dict[str, Draft]) -> dict[str, Draft]:
    """Linears of a site together; one whose outputs are no closer by it stays as it was."""
    made = dict(drafts)
    for split, linears in work.sites():
        again = "residual" in work.recipe.rounding and linears[0].site in (*work.recipe.residual_sites, SITES[-1])
        if again and linears[0].site == SITES[-1]:
            continue  # its turn comes when the others are done
        outputs = {} if again else work.outputs  # which are worth their time where it is for good
        trials = settled(
            work, linears, [drafts[target.name] for target in linears], work.moments(split, linears), outputs
        )
        for target, trial in zip(linears, trials, strict=True):
            if closer(work, target, split, drafts[target.name], trial, outputs.get(target.name)):
                made[target.name] = trial
    return made


def settled(
    work: Refinement, linears: list[Target], drafts: list[Draft], moments: Tensor, outputs: dict[str, OutputMoments]
) -> list[Draft]:
    """Linears of a site, rounded to nearest over their ranges: compensated, then as far down as the recipe's passes go;
    all rows at a time, or in turn where it is known what their errors count."""
    recipe, compensation = work.recipe, Compensation(moments, work.recipe.damping)

    def settle(made: Draft) -> Draft:
        return descend(compensation(made), made.latent, moments, recipe.damping, recipe.descent)

    by_name = {target.name: made for target, made in zip(linears, drafts, strict=True)}
    told = {name: made for name, made in by_name.items() if name in outputs}
    alike = {name: made for name, made in by_name.items() if name not in outputs}
    counts = [outputs[name].folded(work.rows[name]) for name in told]
    by_name |= zip(told, in_turn(list(told.values()), counts, settle), strict=True)
    if alike:
        together = settle(stacked(list(alike.values())))
        by_name |= zip(alike, unstacked(together, [len(made.latent) for made in alike.values()]), strict=True)
    return list(by_name.values())


def corrected(work: Refinement, drafts: dict[str, Draft]) -> dict[str, Draft]:
    """Site by site in the order of a layer, down_proj in any case: it has not been compensated yet."""
    for site in SITES:
        if site in work.recipe.residual_sites or site == SITES[-1]:
            drafts = drafts | corrected_at(work, drafts, site)
    return drafts


def corrected_at(work: Refinement, drafts: dict[str, Draft], site: str) -> dict[str, Draft]:
    """The linears of a site rounded anew, compensated, from weights that make up for what is missing there; each one
    taken where less is missing by it. Where nothing was found missing they are compensated alone.
    """
    made, parts = {}, {}
    if site in work.recipe.residual_sites:
        before = {target.name: drafts[target.name] for target in work.targets if comes_before(target, site)}
        parts = missing_parts(work.block, work.stored() | weights_of(before), work.source, work.taught, site)
    for split, linears in work.sites():
        if linears[0].site != site:
            continue
        part = parts.pop(linears[0].path, None)
        found = make_up(part) if part else None
        if found is None and site != SITES[-1] and not work.outputs:
            continue
        moments, trials, clips = read_moments(work, split, linears, part, found), [], {}
        for target in linears:
            weight, was = work.folded[f"{target.name}.weight"], drafts[target.name]
            trial = draft(weight if found is None else weight + moved(work, target, part, found), was.grid)
            if work.recipe.clip != "none":
                trial, *clips[target.name] = CLIPS[work.recipe.clip](trial, moments, work.recipe)
            trials.append(trial)
        trials = settled(work, linears, trials, moments, work.outputs)
        for target, trial in zip(linears, trials, strict=True):
            if less_missing(work, target, split, None if found is None else part, drafts[target.name], trial):
                made[target.name] = trial
                if target.name in clips:
                    work.clips[target.name] = tuple(clips[target.name])
    return made


def comes_before(target: Target, site: str) -> bool:
    return SITES.index(target.site) < SITES.index(site)


def read_moments(
    work: Refinement, split: Split, linears: list[Target], part: Missing | None, found: Found | None
) -> Tensor:
    """Of what the linears of a site read, as folded: in kept sequences where something was found missing there."""
    if found is None:
        return work.moments(split, linears)
    columns = work.columns[linears[0].name]
    return found.moments if part.adds else found.moments / columns / columns[:, None]


def moved(work: Refinement, target: Target, part: Missing, found: Found) -> Tensor:
    """The change of a folded weight for what was found missing: readers are looked at in the source's terms."""
    change = part.change(work.weight(target), found)
    return change if part.adds else work.refolded(target, change)


def less_missing(
    work: Refinement, target: Target, split: Split, part: Missing | None, was: Draft, trial: Draft
) -> bool:
    """Whether a linear is better off by a trial; part: None where nothing was found that it could make up for."""
    outputs = work.outputs.get(target.name)
    if part is None:
        return closer(work, target, split, was, trial, outputs)
    folded = work.folded[f"{target.name}.weight"]
    changes = (one.weight() - folded for one in (was, trial))
    if not part.adds:
        changes = (work.unfolded(target, change) for change in changes)
    before, after = (part.error(work.weight(target), change, outputs) for change in changes)
    return after < before


def learned(work: Refinement, drafts: dict[str, Draft]) -> dict[str, Draft]:
    job = Learning(
        block=work.block, folded=work.stored(), taught=work.taught, recipe=work.recipe, seed=work.seed
    )  # fmt: skip
    return learn(job, drafts)[0]


ROUNDINGS = {"gptq": compensated, "residual": corrected, "learned": learned}  # all drafts start from "nearest"
