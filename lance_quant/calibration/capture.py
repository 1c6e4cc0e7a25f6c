"""`capture`: run the calibration samples through the bf16 model and write what every linear saw, as Parquet.

Questions are one teacher-forced forward. Pictures are noised straight to a few of the sampler's timesteps, one guided
forward each, over the same cached context that generation uses.
"""

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lance_quant.calibration.config import CalibrationConfig
from lance_quant.calibration.recorder import Recorder
from lance_quant.checkpoint.layout import PATHS, Checkpoint
from lance_quant.model.inputs import prepare
from lance_quant.model.lance import Lance, load_lance
from lance_quant.model.pixels import vae_pixels
from lance_quant.model.prompts import IM_END, encode, load_tokenizer
from lance_quant.model.request import Request
from lance_quant.model.sampler import CachedFlow, FlowConfig, UncachedFlow, initial_state, is_guided, timesteps
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import context_spans, forced_logits
from lance_quant.model.vae import load_vae
from lance_quant.progress import Progress
from lance_quant.tiny.requests import scene_requests


@dataclass(frozen=True, kw_only=True)
class CaptureSummary:
    """tokens: task -> path -> tokens that each linear of the path saw; rows: kept per site."""

    samples: int
    tokens: dict[str, dict[str, int]]
    rows: int
    bytes: int
    seconds: float


@torch.inference_mode()
def capture(
    checkpoint: Checkpoint, cfg: CalibrationConfig, out: Path, device: str, progress: Progress | None = None
) -> CaptureSummary:
    """Write the capture artifact (schema: `activations.py`) into `out`."""
    started = time.monotonic()
    lance = load_lance(checkpoint, device)
    requests = scene_requests(cfg.tasks, cfg.samples, checkpoint.image_edge, seed=cfg.seed, unseen=False)
    with Recorder(lance, list(cfg.tasks), cfg.rows_per_site, cfg.seed) as recorder:
        run = _Run(checkpoint, cfg, lance, recorder, device)
        for index, request in enumerate(requests):
            run.sample(index, request)
            if progress is not None:
                progress(index + 1, len(requests), request.name)
        recorder.write(out)
    return CaptureSummary(
        samples=len(requests),
        tokens={task: {path: recorder.tokens(task, path) for path in PATHS} for task in cfg.tasks},
        rows=cfg.rows_per_site,
        bytes=sum(file.stat().st_size for file in out.rglob("*.parquet")),
        seconds=round(time.monotonic() - started, 2),
    )


class _Run:
    """What every sample of a capture shares."""

    def __init__(self, checkpoint: Checkpoint, cfg: CalibrationConfig, lance: Lance, recorder: Recorder, device: str):
        self.checkpoint, self.cfg, self.lance, self.recorder = checkpoint, cfg, lance, recorder
        self.tokenizer = load_tokenizer(checkpoint.folder)
        self.vae = load_vae(checkpoint.vae_file, device, torch.float32) if "t2i" in cfg.tasks else None
        self.flow = FlowConfig()
        self.kept = dict.fromkeys(cfg.tasks, 0)

    def sample(self, index: int, request: Request) -> None:
        sample = prepare(request, self.tokenizer, self.checkpoint.vit_edge)
        if request.task == "x2t_image":
            self._question(index, request, sample)
        else:
            self._picture(index, request, sample)

    def _keeps(self, task: str) -> bool:
        """Whether this sample is one of the few whose hidden states are kept."""
        self.kept[task] += 1
        return self.kept[task] <= self.cfg.sequences

    def _question(self, index: int, request: Request, sample: Sample) -> None:
        tokens = encode(self.tokenizer, request.answer + IM_END)
        self.recorder.begin(request.task, index)
        if not self._keeps(request.task):
            forced_logits(self.lance, sample, tokens)
            return
        spans = context_spans(sample, sample.context_length)
        spans[-1] = (spans[-1][0], sample.context_length + len(tokens) - 1, spans[-1][2])
        with self.recorder.keep_sequence(spans, request.task, float("nan")):
            forced_logits(self.lance, sample, tokens)

    def _picture(self, index: int, request: Request, sample: Sample) -> None:
        clean = self.vae.encode(vae_pixels([request.image], self.checkpoint.image_edge)).flatten(0, 2)
        noise = initial_state(sample, self.cfg.seed + index, clean.shape[1], torch.float32, clean.device)
        grid = timesteps(self.flow)
        noised = {}
        for step in chosen_steps(self.flow.steps, self.cfg.timesteps, self.cfg.seed + index):
            t = float(grid[step])
            noised[step] = ((1 - t) * clean + t * noise).to(self.lance.dtype)
        first = next(iter(noised))
        self.recorder.begin(request.task, index, float(grid[first]))
        flow = CachedFlow(self.lance, sample, noised[first], self.flow)
        for step, state in noised.items():
            self.recorder.begin(request.task, index, float(grid[step]))
            flow.velocities(state, grid[step], is_guided(grid[step], self.flow))
        self.recorder.pause()
        if self._keeps(request.task):
            whole = UncachedFlow(self.lance, sample, noised[first], replace(self.flow, cached=False))
            with self.recorder.keep_sequence(sample.spans(), request.task, float(grid[first])):
                whole.velocities(noised[first], grid[first], guided=False)


def chosen_steps(steps: int, count: int, seed: int) -> list[int]:
    """`count` of the sampler's steps, one drawn from each of equally long stretches; all where count >= steps."""
    if count >= steps:
        return list(range(steps))
    rng = random.Random(seed)
    edges = [round(index * steps / count) for index in range(count + 1)]
    return [rng.randrange(start, end) for start, end in zip(edges, edges[1:], strict=False)]
