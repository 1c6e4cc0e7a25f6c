"""`make_up`: weights moved towards what is missing where their linears stand.

A linear of a rounded model reads something else than the float model's, and what it should add to is off as well. From
what it reads, a ridge regression finds what can be said of

    qkv, gate_up    what it should read: W (x + C x) in place of W x
    o, down         what is missing from the states that it adds to, behind attention and behind the layer

How much of that is trusted is chosen on sequences that it was not fitted to, nothing included. What is then rounded is
compensated by the second moments of what is really read, behind rounded layers and linears. Targets of a rounded prefix
are GPTAQ's (arXiv 2504.02692); there the correction is exact on the calibration rows, noise too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lance_quant.awq.block import Block
from lance_quant.awq.lessons import Lesson
from lance_quant.awq.outputs import OutputMoments, weighed
from lance_quant.checkpoint.layout import NORMS, PATHS, norm_name
from lance_quant.model.decoder import rms_norm

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # shares of the mean second moment
READERS = dict(zip(("qkv", "gate_up"), NORMS, strict=True))  # site -> the norm that it reads
ADDERS = ("o", "down")
HELD_EVERY = 4
ROWS = 4096  # whose outputs are held at once


@dataclass(frozen=True)
class Missing:
    """Of one path's tokens: inputs [n, I] of a site and what is missing [n, K], of its inputs or of the states that it
    adds to (`adds`), all times the root of what each token counts. The first `fitted` of them are fitted to, the
    others, of whole sequences, judged by.
    """

    inputs: Tensor
    missing: Tensor
    fitted: int
    adds: bool

    def change(self, weight: Tensor, found: "Found") -> Tensor:
        """Of a linear's weight [O, I], for what `make_up` has found."""
        return found.change if self.adds else weight @ found.change

    def error(self, weight: Tensor, change: Tensor, outputs: OutputMoments | None = None) -> float:
        """What is still missing from the outputs where a linear's weight [O, I] changes by `change`, over all tokens.

        Both as they act on `inputs`; outputs: what they count, alike where None.
        """
        weight, change, total = weighed(weight, outputs), weighed(change, outputs), 0.0
        for inputs, missing in zip(self.inputs.split(ROWS), self.missing.split(ROWS), strict=True):
            total += _squared((weighed(missing.T, outputs).T if self.adds else missing @ weight.T) - inputs @ change.T)
        return total


@dataclass(frozen=True)
class Found:
    """What is missing as a matrix [K, I] times the inputs, and the inputs' second moments [I, I], float32."""

    change: Tensor
    moments: Tensor


def _squared(x: Tensor) -> float:
    return x.square().sum(dtype=torch.float64).item()


@torch.no_grad()
def missing_parts(
    block: Block, tensors: Mapping[str, Tensor], source: Mapping[str, Tensor], taught: Sequence[Lesson], site: str
) -> dict[str, Missing]:
    """Path -> what is missing at a site with `tensors`, in which its own linears are float ones and those before it
    rounded; empty where nothing before it is. `source`: of the float layer; inputs of a site that reads a norm are in
    its terms, others as folded.
    """
    if site == "qkv" and all(lesson.entering is lesson.batch.states for lesson in taught):
        return {}  # nothing before it is rounded
    sequences = [(lesson, row) for lesson in taught for row in range(len(lesson.counts))]
    places = {path: placed([_tokens(lesson, path) for lesson, _ in sequences]) for path in PATHS}
    made: dict[str, Missing] = {}
    for number, (lesson, row) in enumerate(sequences):
        found = (
            _read(block, source, lesson, row, site, tensors)
            if site in READERS
            else _added(block, lesson, row, site, tensors)
        )
        for path, (inputs, left) in found.items():
            starts, fitted, total = places[path]
            if path not in made:
                room = (inputs.new_empty(total, inputs.shape[1]), left.new_empty(total, left.shape[1]))
                made[path] = Missing(*room, fitted, site in ADDERS)
            here = slice(starts[number], starts[number] + len(inputs))
            made[path].inputs[here], made[path].missing[here] = inputs, left
    return made


def _read(
    block: Block, source: Mapping[str, Tensor], lesson: Lesson, row: int, site: str, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What is read of the states as they are, and what of the float model's lacks, for one sequence."""
    if site == "qkv":
        ours, wanted = lesson.batch.states[row], lesson.entering[row]
    else:
        ours, wanted = block.trace(tensors, lesson.batch.part([row]), []).middle[0], lesson.middle[row]
    root = (lesson.counts[row] * lesson.wanted[row].norm(dim=-1)).sqrt()[:, None]  # normed rows are all of one size
    found = {}
    for path in PATHS:
        at = _at(lesson, path)
        if at.any():
            gain = source[f"{norm_name(block.layer, path, READERS[site])}.weight"]
            inputs, should = (rms_norm(states[at], gain, block.config.rms_norm_eps) for states in (ours, wanted))
            found[path] = inputs * root[at], (should - inputs) * root[at]
    return found


def _added(
    block: Block, lesson: Lesson, row: int, site: str, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What is read, and what the states that are added to lack, for one sequence."""
    traced = block.trace(tensors, lesson.batch.part([row]), [(path, site) for path in PATHS])
    ours, wanted = (traced.middle, lesson.middle) if site == "o" else (traced.out, lesson.wanted)
    root = lesson.counts[row].sqrt()[:, None]
    left = (wanted[row] - ours[0]) * root
    found = {}
    for path in PATHS:
        if (path, site) in traced.rows:
            at = _at(lesson, path)
            found[path] = traced.rows[path, site][0] * root[at], left[at]
    return found


def placed(counts: Sequence[int]) -> tuple[list[int], int, int]:
    """Where the tokens of each sequence go, `counts` of them, those that are judged by behind all others; where these
    begin; how many tokens there are."""
    there = [number for number, count in enumerate(counts) if count]
    held = set(there[HELD_EVERY - 1 :: HELD_EVERY] if len(there) >= HELD_EVERY else there[1:][-1:])
    starts, fitted, total = [0] * len(counts), 0, 0
    for judged in (False, True):
        for number in there:
            if (number in held) == judged:
                starts[number] = total
                total += counts[number]
        fitted = fitted if judged else total
    return starts, fitted, total


def _at(lesson: Lesson, path: str) -> Tensor:
    """bool [n]: the path's tokens."""
    return lesson.batch.latent if path == "gen" else ~lesson.batch.latent


def _tokens(lesson: Lesson, path: str) -> int:
    return int(_at(lesson, path).sum())


def make_up(part: Missing) -> Found | None:
    """None where nothing that was tried helps what was held out."""
    fit, inputs = part.inputs[: part.fitted], part.inputs[part.fitted :]
    left = part.missing[part.fitted :]
    if not len(inputs):
        return None
    moments, cross = fit.T @ fit, fit.T @ part.missing[: part.fitted]
    least, best = _squared(left), None
    for ridge in RIDGES:
        change = _solved(moments, cross, ridge)
        if change is not None and (error := _squared(left - inputs @ change.T)) < least:
            least, best = error, ridge
    if best is None:
        return None
    moments += inputs.T @ inputs
    change = _solved(moments, cross + inputs.T @ left, best)
    return None if change is None else Found(change, moments)


def _solved(moments: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
    """Ridge regression, transposed; None where the damped second moments have no Cholesky factor."""
    damped = moments.clone()
    damped.diagonal().add_(ridge * moments.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if failed else torch.cholesky_solve(cross, factor).T.contiguous()
