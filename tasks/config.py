"""`RunConfig`: one dataclass tree is Hydra's schema, the flow's parameter and the source of every key.

`resolve` turns Hydra's composed config into it strictly: a key that the tree does not know is an error, `+x=1` too.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import lance_quant
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.limits import check_packable
from lance_quant.calibration.config import TEXT, CalibrationConfig
from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.errors import LanceQuantError
from lance_quant.evaluation.config import EvaluationConfig
from lance_quant.tiny import SCENES_REVISION

CONF = Path(__file__).resolve().parents[1] / "conf"
CHANGED = " (changed)"
SMALL_WIDTH = 1024  # hidden size up to which a second CPU thread only waits


@dataclass(kw_only=True)
class RunnerConfig:
    """Where the work runs. devices: "auto" (every CUDA device, else the CPU) or a list such as [cuda:0,cuda:1].

    workers: units of work at a time, 0 for one a device; more share the devices in turn.
    """

    name: str = "local"
    devices: Any = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        named = (
            isinstance(self.devices, list | tuple) and self.devices and all(isinstance(d, str) for d in self.devices)
        )
        if self.devices != "auto" and not named:
            raise LanceQuantError(f"runner.devices={self.devices} must be auto or a list such as [cuda:0,cuda:1]")
        if self.workers < 0:
            raise LanceQuantError(f"runner.workers={self.workers} must be 0 (one a device) or more")


@dataclass(kw_only=True)
class RunConfig:
    """A whole run. `seed` reaches calibration, search and evaluation through conf/."""

    checkpoint: CheckpointConfig
    calibration: CalibrationConfig
    recipe: RecipeConfig
    evaluation: EvaluationConfig
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    group_size: int = 64
    bits: int = 4
    seed: int = 0
    allow_uncovered: bool = False
    artifacts: str = "artifacts"

    def __post_init__(self) -> None:
        for part in ("checkpoint", "calibration", "recipe", "evaluation", "runner"):
            if getattr(self, part) is None:
                raise LanceQuantError(f"{part}=null leaves the run without {part} settings: name one of conf/{part}/")
        if self.group_size < 1:
            raise LanceQuantError(f"group_size={self.group_size} must be at least 1")
        check_packable(self.bits)
        if not 0 <= self.seed < 2**32:
            raise LanceQuantError(f"seed={self.seed} must lie between 0 and 2**32 - 1")
        self.recipe.name = honest_name(self.recipe)
        self._check_calibration()
        if not self.artifacts:
            raise LanceQuantError("artifacts must name a folder, for example artifacts=artifacts")

    def _check_calibration(self) -> None:
        """That the capture holds what the recipe looks at, and that no task is asked for in vain."""
        recipe, calibration = self.recipe, self.calibration
        for name, enough in (("sequences", 2), ("sequence_tokens", 32000)):
            if recipe.needs_sequences and not getattr(calibration, name):
                raise LanceQuantError(
                    f"recipe {recipe.name} runs kept sequences and calibration.{name}=0 keeps none: "
                    f"set it to {enough}, or take recipe=awq"
                )
        if recipe.gradients and not calibration.gradient_tokens:
            raise LanceQuantError(
                f"recipe {recipe.name} weighs errors by gradients and calibration.gradient_tokens=0 keeps none: "
                "set it to 32000, or recipe.gradients=false"
            )
        if calibration.source == TEXT and calibration.tasks != "auto" and list(calibration.tasks) != [TEXT]:
            raise LanceQuantError(
                f"calibration.tasks={list(calibration.tasks)} with calibration.source=text, which has no task but "
                "text: leave it at auto"
            )


def register() -> None:
    """Make the schema and the `${package:...}` paths known to Hydra; once a process, before it composes."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
    OmegaConf.register_new_resolver("package", package_path, replace=True)


def package_path(path: str) -> str:
    """`lance_quant/...` inside the installed package, whatever the working directory."""
    return str(Path(lance_quant.__file__).resolve().parents[1] / path)


def resolve(composed: DictConfig) -> RunConfig:
    """The typed config of a composed one; unknown keys, wrong types and ranges raise."""
    return strict(RunConfig, composed)


def strict(schema: type, composed: DictConfig) -> Any:
    """A composed config as `schema`, a dataclass tree: merged into the bare schema, which refuses what it lacks."""
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))


def compose_config(overrides: list[str]) -> RunConfig:
    """What `python -m flows.full_run OVERRIDES` runs, where there is no command line."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("config", overrides))


def read_fields(config: Any, *without: str) -> dict:
    """A config's fields for a key: all of them but its `name` and those in `without`."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("name", *without)}


def sample_fields(config: CheckpointConfig) -> dict[str, int]:
    """What shapes samples beside a stage's own settings: picture sizes, and how scenes are drawn."""
    edges = ("image_edge", "vit_edge", "video_edge", "video_vit_edge")
    return {name: getattr(config, name) for name in edges} | {"scenes": SCENES_REVISION}


def honest_name(recipe: RecipeConfig) -> str:
    """The recipe's name if it is the one of conf/recipe/ in every field, else marked: reports and metadata say it."""
    file = CONF / "recipe" / f"{recipe.name}.yaml"
    if file.is_file() and OmegaConf.to_container(OmegaConf.load(file)) == asdict(recipe):
        return recipe.name
    return recipe.name if recipe.name.endswith(CHANGED) else recipe.name + CHANGED
