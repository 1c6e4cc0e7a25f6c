"""`CalibrationConfig`: which samples the capture runs, and how much of what it sees is kept."""

from dataclasses import dataclass, field

from lance_quant.errors import LanceQuantError

TASKS = ("x2t_image", "t2i")


@dataclass(kw_only=True)
class CalibrationConfig:
    """samples: per task. timesteps: noise levels a generated picture is seen at, spread over the sampler's own.

    rows_per_site: reservoir of a site over all tasks (1024 rows of the published model are 2.5 GB). sequences: whole
    sequences whose hidden states are kept, per task. min_tokens: what a linear must see to count as covered.
    """

    name: str = "scenes"
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    samples: int = 32
    timesteps: int = 8
    rows_per_site: int = 1024
    sequences: int = 2
    min_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise LanceQuantError(f"calibration.tasks has no '{task}'; choose from {', '.join(TASKS)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise LanceQuantError(f"calibration.tasks={self.tasks} must name each task once, of {', '.join(TASKS)}")
        if not 0 <= self.seed < 2**32:
            raise LanceQuantError(f"calibration.seed={self.seed} must lie between 0 and 2**32 - 1")
        least = {"samples": 1, "timesteps": 1, "rows_per_site": 1, "sequences": 0, "min_tokens": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise LanceQuantError(f"calibration.{name}={getattr(self, name)} must be at least {value}")
