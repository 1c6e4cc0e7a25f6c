"""`Bench`: what the stages of full_size.py share."""

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from make_full_size import FOLDERS
from meter import Meter

from lance_quant.checkpoint.layout import Checkpoint, open_checkpoint
from lance_quant.devices import choose_device
from lance_quant.errors import LanceQuantError
from lance_quant.runtime.generate import Generator
from tasks.config import RunConfig, compose_config

GB = 1e9
TINY = (
    "checkpoint.image_edge=64 checkpoint.vit_edge=56 checkpoint.video_edge=64 checkpoint.video_vit_edge=56 "
    "checkpoint.frames=5 calibration.samples=1 calibration.timesteps=2 calibration.rows_per_site=64 "
    "calibration.sequences=1 evaluation.samples=1 evaluation.steps=2 evaluation.max_new_tokens=4 allow_uncovered=true"
).split()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """stage: names, comma-separated. folder: the checkpoint's parts are in it. artifacts: of the run, in `folder` where
    empty. overrides: more of them for full_run, between spaces. limit_s: after which nothing new is begun."""

    variant: str = "image"
    folder: str = ""
    stage: str = "make,load,forward,generate,run,pack"
    scale: str = "real"
    artifacts: str = ""
    overrides: str = ""
    out: str = ""
    device: str = "auto"
    limit_s: int = 560

    def __post_init__(self) -> None:
        if not self.folder:
            raise LanceQuantError("folder=FOLDER is missing: where the checkpoint is, or goes")


@dataclass
class Bench:
    """What the stages share: settings, the clock, the model once it is loaded, rows for the table."""

    settings: Settings
    started: float = field(default_factory=time.monotonic)
    rows: list[tuple[str, str]] = field(default_factory=list)

    @property
    def tiny(self) -> bool:
        return self.settings.scale == "tiny"

    @property
    def left(self) -> float:
        return self.settings.limit_s - (time.monotonic() - self.started)

    @cached_property
    def artifacts(self) -> Path:
        return Path(self.settings.artifacts or Path(self.settings.folder) / f"artifacts_{self.settings.variant}")

    @cached_property
    def overrides(self) -> list[str]:
        path = Path(self.settings.folder).absolute() / FOLDERS[self.settings.variant]
        words = [f"checkpoint={self.settings.variant}", f"checkpoint.path={path}", "evaluation=full_size"]
        words += [f"artifacts={self.artifacts.absolute()}", *(TINY if self.tiny else ())]
        return words + self.settings.overrides.split()

    @cached_property
    def config(self) -> RunConfig:
        return compose_config(self.overrides)

    @cached_property
    def device(self) -> str:
        return choose_device(self.settings.device)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.config.checkpoint)

    @cached_property
    def generator(self) -> Generator:
        return Generator(self.checkpoint, None, self.device)

    def forget(self) -> None:
        """Free the model, where one is loaded."""
        self.__dict__.pop("generator", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def tell(self, what: str, value: str) -> None:
        self.rows.append((what, value))


def gigabytes(size: int | None) -> str:
    return "none" if size is None else f"{size / GB:.2f} GB"


@contextlib.contextmanager
def held_to(limit_gb: float) -> Iterator[None]:
    """PyTorch may take that much GPU memory and no more, so that what does not fit fails."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit_gb * GB / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def wait() -> float:
    """The time once the GPU has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def host(meter: Meter) -> dict:
    return {
        "host_bytes": meter.host_bytes,
        "pinned_bytes": meter.pinned_bytes,
        "gpu_bytes": meter.gpu_bytes,
        "gpu_reserved_bytes": meter.gpu_reserved_bytes,
    }
