"""`CalibrationConfig`: which samples the capture runs, how they weigh in, and how much of what it sees is kept."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lance_quant.checkpoint.layout import LAYOUT_TASKS, check_known, check_task_list, served_tasks
from lance_quant.errors import LanceQuantError
from lance_quant.model.request import TASKS

SOURCES = ("scenes", "bundled", "published", "text")
BALANCES = ("tasks", "tokens")
TEXT = "text"  # the task of plain text: understanding alone, no prompt around it


@dataclass(kw_only=True)
class CalibrationConfig:
    """source: "scenes" (drawn, as Lance-tiny knows them), "bundled" (our own set for real checkpoints), "published"
    (Lance's example files in the folder `examples`), "text" (the plain text files that `path` names).

    tasks: "auto" (all that the checkpoint's layout serves) or a list. samples: per task, at most.
    timesteps: noise levels that a known picture or clip is seen at, one from each equal stretch of the sampler's steps.
    sampler_steps: where it is not known, the sampler makes that many steps of its own.
    unconditional: share of a sample's guided timesteps that run without the caption too.
    text_tokens: length of a piece of plain text.

    balance: "tasks" (tasks count as in `weights`, 1 where unnamed; the forwards of a task alike) or "tokens" (every
    token alike). rows_per_site: rows kept of a site over all tasks (1024 rows of the published model are 2.5 GB).
    sequences: whole sequences per task whose hidden states are kept, sequence_tokens: of all of them together at most;
    gradient_tokens: of about how many of them gradients are kept too, spread over the tasks; 0: none.
    min_tokens: what a linear must see to count as covered. memory_gb: device memory to stay within, 0 for what is free;
    the result does not depend on it.
    """

    name: str = "scenes"
    source: str = "scenes"
    tasks: Any = "auto"
    samples: int = 16
    timesteps: int = 8
    sampler_steps: int = 2
    unconditional: float = 0.25
    text_tokens: int = 512
    path: Any = ""
    examples: str = ""
    balance: str = "tasks"
    weights: dict[str, float] = field(default_factory=dict)
    rows_per_site: int = 1024
    sequences: int = 2
    sequence_tokens: int = 10000
    gradient_tokens: int = 32000
    min_tokens: int = 256
    memory_gb: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("source", SOURCES), ("balance", BALANCES)):
            if getattr(self, name) not in known:
                raise LanceQuantError(
                    f"calibration.{name}='{getattr(self, name)}' is unknown: take one of {', '.join(known)}"
                )
        self._check_tasks()
        self._check_ranges()

    def _check_tasks(self) -> None:
        check_task_list("calibration.tasks", self.tasks, (*TASKS, TEXT))
        check_known("calibration.weights", self.weights, (*TASKS, TEXT))
        for task, weight in self.weights.items():
            if weight <= 0:
                raise LanceQuantError(
                    f"calibration.weights.{task}={weight} must be positive: leave the task out instead"
                )

    def _check_ranges(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise LanceQuantError(f"calibration.seed={self.seed} must lie between 0 and 2**32 - 1")
        if not 0 <= self.unconditional <= 1:
            raise LanceQuantError(f"calibration.unconditional={self.unconditional} must lie between 0 and 1")
        least = {"samples": 1, "timesteps": 1, "sampler_steps": 1, "text_tokens": 2, "rows_per_site": 1}
        least |= {"sequences": 0, "sequence_tokens": 0, "gradient_tokens": 0, "min_tokens": 0, "memory_gb": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise LanceQuantError(f"calibration.{name}={getattr(self, name)} must be at least {value}")


def weights_of(cfg: CalibrationConfig, tasks: Iterable[str]) -> dict[str, float]:
    """What each task counts under balance "tasks"."""
    return {task: float(cfg.weights.get(task, 1.0)) for task in tasks}


def calibrated_tasks(cfg: CalibrationConfig, layout: str) -> list[str]:
    """The tasks to run on a checkpoint of a layout. Raises LanceQuantError for one that it does not serve."""
    if cfg.source == TEXT:
        return [TEXT]
    if not LAYOUT_TASKS[layout]:
        raise LanceQuantError(f"a {layout} checkpoint sees no pictures: take calibration=text calibration.path=...")
    return served_tasks("calibration.tasks", cfg.tasks, layout)
