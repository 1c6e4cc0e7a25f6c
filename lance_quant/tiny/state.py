"""Training state in pieces: a folder of weights, their average and Adam's moments, a file each, and `info.json`.

Random numbers of a step are drawn from (seed, step), so that it does not matter where a run was stopped. Progress
of the schedule is the larger of step / steps and seconds / budget: whichever bound rules ends the run with its
decay complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lance_quant.seeds import seed_of

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE_EVERY = 4  # steps
SETTLE_EVERY = 10  # steps between two waits for the device, so that the clock stays true
WARM_UP = 3  # eager steps before a capture


@dataclass(kw_only=True)
class Schedule:
    """Warm-up, plateau, decay to zero over the last `decay` share of the run (WSD)."""

    steps: int
    minutes: float  # budget of the whole run, over all its calls
    peak: float
    warmup: int = 300
    decay: float = 0.35

    def rate(self, step: int, seconds: float) -> float:
        return self.peak * min(1.0, (step + 1) / self.warmup) * self.cooling(self.progress(step, seconds))

    def progress(self, step: int, seconds: float) -> float:
        return min(1.0, max(step / self.steps, seconds / (60 * self.minutes)))

    def cooling(self, progress: float) -> float:
        if progress < 1 - self.decay:
            return 1.0
        left = (1 - progress) / self.decay
        return max(0.005, math.sin(left * math.pi / 2) ** 2)


class TrainingRun:
    """A model with its average and its AdamW, and where it stands.

    1. `TrainingRun(...)`, then `resume()`: reads the state that `folder` holds, if any.
    2. `start()`: the clock of this call runs.
    3. Per step `begin_step()`, a `Step` on the caller's random draws, `end_step()`.
    4. `over` says when the call's or the run's time has come; `save()` writes the state, whole or not at all.
    """

    def __init__(
        self, model: nn.Module, schedule: Schedule, *, folder: Path, name: str, seed: int, decay: float = 0.01
    ):
        self.model, self.schedule, self.folder, self.name, self.seed = model, schedule, folder, name, seed
        self.parameters = dict(model.named_parameters())
        self.average = {key: value.detach().clone() for key, value in self.parameters.items()}
        self.device = next(iter(self.parameters.values())).device
        self.cuda = self.device.type == "cuda"
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        vectors = [p for p in self.parameters.values() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=torch.zeros((), device=self.device) if self.cuda else 0.0,
            betas=(0.9, 0.98),
            eps=1e-10,
            fused=self.cuda,
            capturable=self.cuda,
        )
        self._random = torch.Generator(self.device)
        self.step, self.seconds, self._since, self._deadline = 0, 0.0, time.monotonic(), math.inf

    def start(self, minutes: float) -> None:
        """Start the clock of this call, which ends after `minutes`."""
        self._since = time.monotonic()
        self._deadline = self._since + 60 * minutes

    @property
    def elapsed(self) -> float:
        """Seconds trained, over all calls."""
        return self.seconds + time.monotonic() - self._since

    @property
    def finished(self) -> bool:
        return self.schedule.progress(self.step, self.elapsed) >= 1

    @property
    def over(self) -> bool:
        return self.finished or time.monotonic() >= self._deadline

    def begin_step(self) -> torch.Generator:
        """Set the learning rate; returns the random numbers of this step."""
        self.set_rate(self.schedule.rate(self.step, self.elapsed))
        return self._random.manual_seed(seed_of(self.seed, self.step))

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if self.cuda:  # a recorded step reads its rate from the device
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def end_step(self) -> None:
        self.step += 1
        if self.step % AVERAGE_EVERY == 0:
            keep = min(0.9995, (1 + self.step) / (20 + self.step)) ** AVERAGE_EVERY
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - keep)
        if self.cuda and self.step % SETTLE_EVERY == 0:
            torch.cuda.synchronize()

    def save(self) -> None:
        """Write the state, whole or not at all. A finished run needs no moments."""
        parts = {"model": {key: value.detach() for key, value in self.parameters.items()}, "average": self.average}
        for moment in () if self.finished else MOMENTS:  # none where no task has reached the weight yet
            kept = {key: self.optimizer.state[value].get(moment) for key, value in self.parameters.items()}
            parts[moment] = {key: value for key, value in kept.items() if value is not None}
        info = {"step": self.step, "seconds": self.elapsed, "seed": self.seed, "finished": self.finished}
        draft, place = self.folder / f"{self.name}.draft", self.folder / self.name
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for name, tensors in parts.items():
            tensors = {key: value.contiguous().cpu() for key, value in tensors.items()}
            save_file(tensors, draft / f"{name}.safetensors")
        (draft / "info.json").write_text(json.dumps(info, indent=1) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(draft, place)

    def resume(self) -> bool:
        place = self.folder / self.name
        if not (place / "info.json").exists():
            return False
        info = json.loads((place / "info.json").read_text())
        files = {path.stem: load_file(path, device=str(self.device)) for path in place.glob("*.safetensors")}
        with torch.no_grad():
            for key, value in self.parameters.items():
                value.copy_(files["model"][key])
                self.average[key].copy_(files["average"][key])
                if key in files.get(MOMENTS[0], {}):
                    step = torch.tensor(float(info["step"]), device=self.device)
                    self.optimizer.state[value] = {"step": step, **{name: files[name][key] for name in MOMENTS}}
        self.step, self.seconds = info["step"], info["seconds"]
        return True

    def load_average(self) -> None:
        """Put the averaged weights into the model: what is measured and shipped."""
        with torch.no_grad():
            for key, value in self.parameters.items():
                value.copy_(self.average[key])


class Step:
    """One training step on the losses of its inputs: forward, backward, clipping, AdamW.

    On a GPU the first call records all of it as one CUDA graph, since a model this small would wait for kernel
    launches; later calls copy their inputs, which keep their shapes, and replay it. Losses must copy nothing from the
    host.
    """

    def __init__(self, run: TrainingRun, losses: Callable[..., dict[str, torch.Tensor]], *, graph: bool = True):
        self.run, self.losses, self.graph = run, losses, graph and run.cuda
        self._inputs: list[torch.Tensor] = []
        self._found: dict[str, torch.Tensor] = {}
        self._record: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses, detached; on a GPU the next call overwrites them."""
        if not self.graph:
            return self._eager(inputs)
        if self._record is None:
            self._capture(inputs)
        torch._foreach_copy_(self._inputs, list(inputs))
        self._record.replay()
        return self._found

    def _eager(self, inputs) -> dict[str, torch.Tensor]:
        self.run.optimizer.zero_grad(set_to_none=True)
        return self._whole(inputs)

    def _whole(self, inputs) -> dict[str, torch.Tensor]:
        found = self.losses(*inputs)
        sum(found.values()).backward()
        torch.nn.utils.clip_grad_norm_(list(self.run.parameters.values()), 1.0, foreach=True)
        self.run.optimizer.step()
        return {name: loss.detach() for name, loss in found.items()}

    def _capture(self, inputs) -> None:
        self.run.set_rate(0.0)  # warming up moves no weight
        self._inputs = [value.clone() for value in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._eager(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.run.optimizer.zero_grad(set_to_none=True)
        self._record = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._record):
            self._found = self._whole(self._inputs)
        self.run.set_rate(self.run.schedule.rate(self.run.step, self.run.elapsed))
