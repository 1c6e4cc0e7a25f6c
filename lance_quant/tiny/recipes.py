"""How Lance-tiny is trained and measured, in plain values; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from lance_quant.errors import LanceQuantError
from lance_quant.model.request import TASKS


def _above_zero(recipe: object, *names: str) -> None:
    for name in names:
        if getattr(recipe, name) <= 0:
            raise LanceQuantError(f"{name}={getattr(recipe, name)} must be above 0")


@dataclass(kw_only=True)
class AutoencoderRecipe:
    """The tiny VAE on single frames: widths, batch, and what its loss weighs."""

    base_dim: int = 6
    decoder_base_dim: int = 8
    batch: int = 128
    steps: int = 13_000
    peak: float = 2e-3
    kl: float = 5e-5
    noise: float = 0.1  # extra latent noise while training, in units of the normalised latent
    start: str = ""  # a VAE file of the same widths to go on from
    seed: int = 11

    def __post_init__(self) -> None:
        _above_zero(self, "base_dim", "decoder_base_dim", "batch", "steps", "peak")


@dataclass(kw_only=True)
class ClipRecipe:
    """What of the tiny VAE only later frames meet. edge: pixels of the square that is cut from clips, 16 n."""

    batch: int = 32
    edge: int = 128
    steps: int = 6000
    peak: float = 2e-3
    kl: float = 5e-5
    moments: float = 0.05  # weighs how far later latents are from zero mean and unit variance
    noise: float = 0.1
    start: str = ""  # the VAE file to start from; empty: the one in `out`
    decoder_only: bool = False  # latents stay as they are, and so does a Lance that was trained on them
    seed: int = 13

    def __post_init__(self) -> None:
        _above_zero(self, "batch", "edge", "steps", "peak")


@dataclass(kw_only=True)
class LanceRecipe:
    """Vision tower and decoder. batch: samples of a task and step, before the table of tasks weighs it; pictures,
    clips: scenes of either medium in the pools."""

    batch: int = 128
    pictures: int = 80_000
    clips: int = 40_000
    steps: int = 60_000
    peak: float = 1.5e-3
    drop_prompt: float = 0.1
    time_shift: float = 2.0
    start: str = ""  # a folder of checkpoints (export.FOLDERS) whose weights to start from
    compile: bool = True  # on a GPU
    workers: int = 0  # 0: as many as there are cores
    look_seconds: float = 75.0  # between two looks at held-out scenes
    looks: int = 256
    look_steps: int = 30  # of the sampler
    seed: int = 17

    def __post_init__(self) -> None:
        _above_zero(self, "batch", "pictures", "clips", "steps", "peak", "looks", "look_steps", "time_shift")


@dataclass(kw_only=True)
class ExportRecipe:
    """The averaged weights as checkpoints. state: the folder that holds `lance_state`; empty: the one in `out`."""

    state: str = ""


@dataclass(kw_only=True)
class MeasureRecipe:
    """Which held-out scenes are measured and how pictures and clips are drawn. tasks: with commas between, all where
    empty; a measurement of some is printed, not written."""

    scenes: int = 512
    tasks: str = ""
    steps: int = 30
    shift: float = 3.5
    guidance: float = 4.0
    seed: int = 2
    workers: int = 1

    def __post_init__(self) -> None:
        _above_zero(self, "scenes", "steps")
        if unknown := [task for task in self.named if task not in TASKS]:
            raise LanceQuantError(f"tasks={self.tasks}: {unknown[0]} is unknown, take some of {', '.join(TASKS)}")

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(task.strip() for task in self.tasks.split(",")) if self.tasks else TASKS
