"""`EvaluationConfig`: which held-out samples are compared, and how long answers and trajectories are."""

from dataclasses import dataclass, field

from lance_quant.errors import LanceQuantError

TASKS = ("x2t_image", "t2i")


@dataclass(kw_only=True)
class EvaluationConfig:
    """samples: per task, of scenes that Lance-tiny never trained on. steps, timestep_shift, guidance: of the sampler.

    The sampler's defaults are upstream's launcher's (Lance spec sec. 18).
    """

    name: str = "default"
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    samples: int = 16
    max_new_tokens: int = 64
    steps: int = 30
    timestep_shift: float = 3.5
    guidance: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise LanceQuantError(f"evaluation.tasks has no '{task}'; choose from {', '.join(TASKS)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise LanceQuantError(f"evaluation.tasks={self.tasks} must name each task once, of {', '.join(TASKS)}")
        if not 0 <= self.seed < 2**32:
            raise LanceQuantError(f"evaluation.seed={self.seed} must lie between 0 and 2**32 - 1")
        for name in ("samples", "max_new_tokens", "steps"):
            if getattr(self, name) < 1:
                raise LanceQuantError(f"evaluation.{name}={getattr(self, name)} must be at least 1")
        if self.timestep_shift <= 0:
            raise LanceQuantError(f"evaluation.timestep_shift={self.timestep_shift} must be positive")
