"""What a scale costs: the error in what a fold's consumers put out. One class for each `RecipeConfig.scoring`.

`Evidence` is what calibration knows of one layer; a score is built once for a fold and then called with each scale. Its
answer, float64, stays on the device, so that no trial waits for the one before.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lance_quant.awq.forms import form_of
from lance_quant.awq.grid import Grid, published_trial, quantize
from lance_quant.awq.topology import ResolvedFold
from lance_quant.calibration.activations import SiteActivations
from lance_quant.checkpoint.layout import Target

PUBLISHED_SEED = 0xC0DE
PUBLISHED_ROWS = 512
ROW_BLOCK = 1024  # rows whose outputs are held at once
TINY = 1e-30  # in place of an output energy of zero


@dataclass(frozen=True)
class SiteRows:
    """Captured inputs of one site: rows bfloat16 or float32 [n, I] on the device, float32 in every product; task int64
    [n], each row's, 0..tasks-1.

    weights: what each task counts; empty: all alike. sample: int64 [n], the calibration sample that each row is of;
    None: every row is one.
    """

    rows: Tensor
    task: Tensor
    tasks: int
    weights: tuple[float, ...] = ()
    sample: Tensor | None = None

    @cached_property
    def moments(self) -> Tensor | None:
        """Second moments of each task [tasks, I, I], where there are more rows than channels: products with them are
        then fewer than with the rows."""
        if len(self.rows) <= self.tasks * self.rows.shape[1]:
            return None
        parts = (self.rows[self.task == task].float() for task in range(self.tasks))
        return torch.stack([part.T @ part for part in parts])

    def energies(self, weight: Tensor) -> Tensor:
        """float64 [tasks]: squared outputs of a linear [O, I], summed over each task's rows."""
        if self.moments is not None:
            return torch.stack([((weight @ of_task) * weight).sum(dtype=torch.float64) for of_task in self.moments])
        blocks = (block.float() for block in self.rows.split(ROW_BLOCK))
        per_row = torch.cat([(block @ weight.T).square().sum(-1) for block in blocks]).double()
        # one sum a task: index_add_ adds in no fixed order on a GPU
        return torch.stack([per_row[self.task == task].sum() for task in range(self.tasks)])

    def shares(self, weight: Tensor) -> Tensor:
        """float64 [tasks]: what a squared output of a linear counts, so that a task's energy has its weight."""
        energy = self.energies(weight)
        counts = torch.tensor(self.weights or (1.0,) * self.tasks, dtype=torch.float64, device=energy.device)
        return counts / (counts.sum() * energy.clamp(min=TINY))

    def weighed(self, share: Tensor) -> Tensor:
        """Second moments [I, I] in which each task counts by its share [tasks]."""
        if self.moments is not None:
            return (share.float()[:, None, None] * self.moments).sum(0)
        rows = self.scaled(share)
        return rows.T @ rows

    def scaled(self, share: Tensor) -> Tensor:
        """Rows float32 whose squares count by their task's share."""
        return self.rows.float() * share[self.task].sqrt().float()[:, None]


@dataclass(frozen=True)
class Evidence:
    """mean_abs: linear name -> mean |x| float32 [I], absent where no token came; rows: (path, site) -> SiteRows."""

    mean_abs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[tuple[str, str], SiteRows] = field(default_factory=dict)

    def rows_of(self, target: Target) -> SiteRows | None:
        return self.rows.get((target.path, target.site))


def evidence(
    sites: dict[tuple[str, str], SiteActivations], targets: list[Target], by_token: bool, device: str
) -> Evidence:
    """From a layer's capture. Mean |x| over the tasks counts tokens alike (`by_token`) or tasks as they weigh in."""
    mean_abs, rows = {}, {}
    for key, site in sites.items():
        seen = [task for task in site.tasks if site.tokens[task] > 0]
        if not seen:
            continue
        weights = [site.tokens[task] if by_token else site.weights.get(task, 1) for task in seen]
        total = sum(site.mean_abs[task].double() * weight for task, weight in zip(seen, weights, strict=True))
        mean = (total / sum(weights)).float().to(device)
        mean_abs |= {target.name: mean for target in targets if (target.path, target.site) == key}
        if len(site.rows):
            index = {task: i for i, task in enumerate(dict.fromkeys(site.row_tasks))}
            task = torch.tensor([index[name] for name in site.row_tasks], device=device)
            weighed = tuple(site.weights.get(name, 1.0) for name in index)
            sample = torch.tensor(site.row_samples, device=device)
            rows[key] = SiteRows(site.rows.to(device), task, len(index), weighed, sample)
    return Evidence(mean_abs, rows)


class OutputError:
    """Relative squared error in one linear's outputs under a change of its weight, the weighted mean over tasks.

    Each task's error is taken relative to the energy of the task's own outputs, so that a task with more rows or larger
    activations counts no more than its weight.
    """

    def __init__(self, weight: Tensor, site: SiteRows):
        share = site.shares(weight)
        self._moments = None if site.moments is None else site.weighed(share)
        self._rows = site.scaled(share) if self._moments is None else None

    def __call__(self, change: Tensor) -> float:
        """change: float32 [O, I], what is added to the weight."""
        return self.unread(change).item()

    def unread(self, change: Tensor) -> Tensor:
        """The same, float64, left on the device: nothing waits for it."""
        if self._moments is not None:
            return ((change @ self._moments) * change).sum(dtype=torch.float64).clamp(min=0)
        blocks = self._rows.split(ROW_BLOCK)
        return sum((block @ change.T).square().sum(dtype=torch.float64) for block in blocks)


def rounding_change(weight: Tensor, columns: Tensor, grid: Grid) -> Tensor:
    """What rounding to nearest adds to a weight [O, I] whose columns a fold multiplied by `columns` [I]."""
    return quantize(weight * columns, grid).dequantize() / columns - weight


class CapturedScore:
    """Sum over the consumers of `OutputError` on captured rows, rounded just as they will be packed."""

    def __init__(self, fold: ResolvedFold, tensors: dict[str, Tensor], known: Evidence, grid: Grid):
        self._fold, self._grid = fold, grid
        self._weights = [tensors[f"{target.name}.weight"] for target in fold.consumers]
        sites = [known.rows_of(target) for target in fold.consumers]
        self._errors = [site and OutputError(weight, site) for weight, site in zip(self._weights, sites, strict=True)]

    def __call__(self, scale: Tensor) -> Tensor:
        columns = self._fold.widen(scale)
        return sum(
            error.unread(form_of(rounding_change, weight)(weight, columns, self._grid))
            for weight, error in zip(self._weights, self._errors, strict=True)
            if error
        )


class SyntheticScore:
    """The published score: mean squared error on 512 Gaussian rows at the captured mean |x|, the same draw every time.

    The draw is that of `torch.manual_seed(0xC0DE)` on the device, from a generator of its own.
    """

    def __init__(self, fold: ResolvedFold, tensors: dict[str, Tensor], known: Evidence, grid: Grid):
        self._fold, self._grid = fold, grid
        self._weights = [tensors[f"{target.name}.weight"] for target in fold.consumers]
        size = mean_activation(fold, known)
        generator = torch.Generator(size.device).manual_seed(PUBLISHED_SEED)
        noise = torch.randn(PUBLISHED_ROWS, len(size), generator=generator, device=size.device)
        self._rows = noise * size
        self._outputs = [self._rows @ weight.T for weight in self._weights]

    def __call__(self, scale: Tensor) -> Tensor:
        columns = self._fold.widen(scale)
        rows = self._rows / columns
        return sum(
            (rows @ published_trial(weight * columns, self._grid).T - output).square().mean().double()
            for weight, output in zip(self._weights, self._outputs, strict=True)
        )


SCORES = {"captured": CapturedScore, "synthetic": SyntheticScore}


def mean_activation(fold: ResolvedFold, known: Evidence) -> Tensor:
    """Mean |x| per consumer column, the mean over the consumers that have statistics, at least 1e-5."""
    seen = [known.mean_abs[target.name] for target in fold.consumers if target.name in known.mean_abs]
    return torch.stack(seen).mean(0).clamp(min=1e-5)
