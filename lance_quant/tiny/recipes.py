"""How Lance-tiny is trained and measured, in plain values; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from lance_quant.errors import LanceQuantError


def _above_zero(recipe: object, *names: str) -> None:
    for name in names:
        if getattr(recipe, name) <= 0:
            raise LanceQuantError(f"{name}={getattr(recipe, name)} must be above 0")


@dataclass(kw_only=True)
class AutoencoderRecipe:
    """The tiny VAE: widths, batches of single frames and of clips, and what its loss weighs."""

    base_dim: int = 6
    decoder_base_dim: int = 8
    batch: int = 128
    clip_batch: int = 16
    clip_every: int = 16
    steps: int = 13_000
    peak: float = 2e-3
    kl: float = 5e-5
    noise: float = 0.1  # extra latent noise while training, in units of the normalised latent
    start: str = ""  # a VAE file of the same widths to go on from
    seed: int = 11

    def __post_init__(self) -> None:
        _above_zero(self, "base_dim", "decoder_base_dim", "batch", "clip_batch", "steps", "peak")


@dataclass(kw_only=True)
class LanceRecipe:
    """Vision tower and decoder. Weights of a task: 0 leaves it out."""

    batch: int = 256
    draw_batch: int = 512
    scenes: int = 300_000
    steps: int = 35_000
    peak: float = 2e-3
    ask_weight: float = 1.0
    draw_weight: float = 1.0
    drop_caption: float = 0.1
    time_shift: float = 2.0
    compile: bool = True  # on a GPU
    workers: int = 0  # 0: as many as there are cores
    look_seconds: float = 75.0  # between two looks at held-out scenes
    looks: int = 256
    seed: int = 17

    def __post_init__(self) -> None:
        _above_zero(self, "batch", "draw_batch", "scenes", "steps", "peak", "looks", "time_shift")


@dataclass(kw_only=True)
class MeasureRecipe:
    """Which held-out scenes are measured and how pictures are drawn."""

    scenes: int = 512
    steps: int = 30
    shift: float = 3.5
    guidance: float = 4.0
    seed: int = 2
    workers: int = 1

    def __post_init__(self) -> None:
        _above_zero(self, "scenes", "steps")
