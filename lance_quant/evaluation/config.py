"""`EvaluationConfig`: which held-out samples are compared, and how long answers, clips and trajectories are."""

from dataclasses import dataclass
from typing import Any

from lance_quant.checkpoint.layout import LAYOUT_TASKS, check_task_list, served_tasks
from lance_quant.errors import LanceQuantError

SOURCES = ("scenes", "bundled")


@dataclass(kw_only=True)
class EvaluationConfig:
    """tasks: "auto" (all that the checkpoint's layout serves) or a list. samples: per task.

    source: "scenes" that Lance-tiny never trained on, or the "bundled" photographs, charts, texts and clips that
    calibration leaves out. frames: of a clip at most, 5, 9, 13 ...; 0 leaves clips as they are. velocity_steps: at how
    many steps of the bf16 trajectory, evenly spread, velocities are compared; 0 for all. steps, timestep_shift,
    guidance: of the sampler, whose defaults are upstream's launcher's (Lance spec sec. 18).
    """

    name: str = "default"
    source: str = "scenes"
    tasks: Any = "auto"
    samples: int = 16
    max_new_tokens: int = 64
    frames: int = 0
    steps: int = 30
    velocity_steps: int = 0
    timestep_shift: float = 3.5
    guidance: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise LanceQuantError(f"evaluation.source={self.source} is unknown: take one of {', '.join(SOURCES)}")
        check_task_list("evaluation.tasks", self.tasks)
        if not 0 <= self.seed < 2**32:
            raise LanceQuantError(f"evaluation.seed={self.seed} must lie between 0 and 2**32 - 1")
        for name in ("samples", "max_new_tokens", "steps"):
            if getattr(self, name) < 1:
                raise LanceQuantError(f"evaluation.{name}={getattr(self, name)} must be at least 1")
        if self.frames and (self.frames < 5 or self.frames % 4 != 1):
            raise LanceQuantError(
                f"evaluation.frames={self.frames} must be 5, 9, 13 ..., or 0 to leave clips as they are"
            )
        if self.velocity_steps < 0:
            raise LanceQuantError(f"evaluation.velocity_steps={self.velocity_steps} must be 0, for all steps, or more")
        if self.timestep_shift <= 0:
            raise LanceQuantError(f"evaluation.timestep_shift={self.timestep_shift} must be positive")


def evaluated_tasks(cfg: EvaluationConfig, layout: str) -> list[str]:
    """The tasks to run on a checkpoint of a layout, in the order of TASKS.

    Raises LanceQuantError for one that it does not serve.
    """
    wanted = served_tasks("evaluation.tasks", cfg.tasks, layout)
    return [task for task in LAYOUT_TASKS[layout] if task in wanted]
