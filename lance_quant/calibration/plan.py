"""`Plan`: how much each forward counts, which of its tokens are kept as rows, and which forwards run together.

All of it is known from token counts before anything runs, so that neither the device's memory nor its speed has a say
in the result.

balance "tasks": a *unit* is what counts alike within a task: for the generation path the latents of one call, for the
understanding path all that one branch of a sample reads (its context, and the ends of its blocks). "tokens": a task
is one unit.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lance_quant.calibration.config import CalibrationConfig, weights_of
from lance_quant.calibration.jobs import CONDITIONAL, Forward, Job
from lance_quant.checkpoint.layout import PATHS
from lance_quant.errors import LanceQuantError


@dataclass(frozen=True)
class Share:
    """What of one path's tokens of one forward is recorded.

    weight: of each token in its task's means; tokens: int64, those kept as rows, at rows `first` and on.
    """

    weight: float
    tokens: np.ndarray
    first: int


@dataclass
class Plan:
    """forwards: of all jobs, in order. shares: (place in `forwards`, path) -> Share. rows: path -> kept in all.

    row_task, row_sample, row_timestep: path -> of each row. tokens, weights: task -> path -> seen, and what it counts.
    """

    forwards: list[Forward]
    shares: dict[tuple[int, str], Share] = field(default_factory=dict)
    row_tasks: dict[str, list[str]] = field(default_factory=dict)
    row_samples: dict[str, list[int]] = field(default_factory=dict)
    row_timesteps: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)

    def rows(self, path: str) -> int:
        return len(self.row_tasks[path])


def make_plan(jobs: Sequence[Job], tasks: Sequence[str], cfg: CalibrationConfig) -> Plan:
    """Weights and rows of every forward, drawn from the seed on the host."""
    plan = Plan([forward for job in jobs for forward in job.forwards()])
    weights = weights_of(cfg, tasks)
    for side, path in enumerate(PATHS):
        seen = {task: sum(f.count(path) for f in plan.forwards if f.task == task) for task in tasks}
        reached = [task for task in tasks if seen[task]]
        for task in tasks:
            plan.tokens.setdefault(task, {})[path] = seen[task]
            counted = seen[task] if cfg.balance == "tokens" else weights[task]
            plan.weights.setdefault(task, {})[path] = float(counted)
        total = sum(weights[task] for task in reached)
        plan.row_tasks[path], plan.row_samples[path], plan.row_timesteps[path] = [], [], []
        for task in reached:
            rows = max(1, int(cfg.rows_per_site * weights[task] / total))
            draw = np.random.default_rng([cfg.seed, side, list(tasks).index(task)])
            _share(plan, task, path, _units(plan, task, path, cfg.balance), rows, draw)
    return plan


def _units(plan: Plan, task: str, path: str, balance: str) -> list[list[int]]:
    """Places of the forwards that count together, those without tokens left out."""
    units = defaultdict(list)
    for place, forward in enumerate(plan.forwards):
        if forward.task == task and forward.count(path):
            if balance == "tokens":
                key = ()
            elif path == "und":
                key = (forward.job, forward.branch)
            else:
                key = (forward.job, forward.branch, forward.step)
            units[key].append(place)
    return list(units.values())


def _share(plan: Plan, task: str, path: str, units: list[list[int]], rows: int, draw: np.random.Generator) -> None:
    counts = {place: plan.forwards[place].count(path) for unit in units for place in unit}
    sizes = [sum(counts[place] for place in unit) for unit in units]
    kept, weight = {}, {}
    for unit, size, quota in zip(units, sizes, quotas(sizes, rows), strict=True):
        chosen = np.sort(draw.choice(size, quota, replace=False))
        start = 0
        for place in unit:
            end = start + counts[place]
            kept[place] = chosen[(chosen >= start) & (chosen < end)] - start
            weight[place] = 1 / (len(units) * size)
            start = end
    for place in sorted(kept):
        forward = plan.forwards[place]
        plan.shares[place, path] = Share(weight[place], kept[place].astype(np.int64), plan.rows(path))
        plan.row_tasks[path] += [task] * len(kept[place])
        plan.row_samples[path] += [forward.job] * len(kept[place])
        plan.row_timesteps[path] += [forward.timestep(path)] * len(kept[place])


def quotas(sizes: Sequence[int], total: int) -> list[int]:
    """`total` split evenly over units that hold `sizes`, none above its size; what is left over goes evenly spread."""
    sizes = np.array(sizes)
    out = np.zeros(len(sizes), dtype=np.int64)
    left = min(total, int(sizes.sum()))
    while left:
        open_ = np.flatnonzero(out < sizes)
        each = left // len(open_)
        if each == 0:
            open_ = open_[np.arange(left) * len(open_) // left]
            each = 1
        more = np.minimum(each, sizes[open_] - out[open_])
        out[open_] += more
        left -= int(more.sum())
    return out.tolist()


@dataclass(frozen=True)
class KeptSequence:
    """A sample whose hidden states are kept: its context and, of a picture or clip, the block at one timestep."""

    job: int
    places: tuple[int, ...]
    tokens: int


def kept_sequences(plan: Plan, tasks: Sequence[str], count: int, most: int) -> list[KeptSequence]:
    """Up to `count` samples a task within `most` tokens in all: the shortest first, task after task.

    What is drawn is seen at another timestep in each sample of a task, since what a layer gets at the end of a drawing
    is far from what it gets in the middle: the first in the middle, then wherever the gaps are widest.
    """
    by_task = defaultdict(list)
    by_job = defaultdict(list)
    for place, forward in enumerate(plan.forwards):
        if forward.branch == CONDITIONAL:
            by_job[forward.job].append(place)
    for places in by_job.values():
        by_task[plan.forwards[places[0]].task].append(places)
    for samples in by_task.values():
        samples.sort(key=lambda places: _kept(plan, places, 0.0).tokens)
    out, left = [], most
    for turn in range(min(count, max(map(len, by_task.values()), default=0))):
        share = van_der_corput(turn + 1)
        candidates = [_kept(plan, by_task[task][turn], share) for task in tasks if turn < len(by_task[task])]
        for one in sorted(candidates, key=lambda one: one.tokens):
            if one.tokens <= left:
                out.append(one)
                left -= one.tokens
    return sorted(out, key=lambda one: one.job)


def van_der_corput(number: int) -> float:
    """1/2, 1/4, 3/4, 1/8, 5/8, 3/8, 7/8, ... for 1, 2, 3, ...: evenly spread wherever it is cut off."""
    value, step = 0.0, 0.5
    while number:
        value += step * (number & 1)
        number, step = number >> 1, step / 2
    return value


def _kept(plan: Plan, places: Sequence[int], share: float) -> KeptSequence:
    """A sample's forwards, of those of its block the one at that share of them."""
    forwards = {place: plan.forwards[place] for place in places}
    blocks = [place for place in places if forwards[place].step is not None]
    whole = [place for place in places if forwards[place].step is None]
    if blocks:
        whole.append(blocks[int(share * len(blocks))])
    tokens = sum(forwards[place].end - forwards[place].start for place in whole)
    return KeptSequence(forwards[places[0]].job, tuple(whole), tokens)


@dataclass(frozen=True)
class Pass:
    """Jobs that go through the layers together, in one wave."""

    wave: int
    jobs: tuple[int, ...]


def make_passes(jobs: Sequence[Job], sizes: Sequence[int], room: int) -> list[Pass]:
    """Consecutive jobs whose hidden states, `sizes` bytes each, fit `room`; one at least. Waves one after another.

    Raises LanceQuantError where no room is left at all.
    """
    if room <= 0:
        raise LanceQuantError("the device's memory does not hold one layer and its inputs: raise calibration.memory_gb")
    out = []
    for wave in range(max(job.waves for job in jobs)):
        group, used = [], 0
        for place, job in enumerate(jobs):
            if job.waves <= wave:
                continue
            if group and used + sizes[place] > room:
                out.append(Pass(wave, tuple(group)))
                group, used = [], 0
            group.append(place)
            used += sizes[place]
        out.append(Pass(wave, tuple(group)))
    return out
