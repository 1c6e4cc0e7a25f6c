"""A `Job` is one calibration sample, prepared: what runs through the layers for it, and at which timesteps.

A question or a text is one forward over everything, its answer included. A picture or clip is what the cached sampler
does: its context split by split, once for each branch, and then the block that is drawn at each timestep (Lance spec
sec. 13). Where the result is known its latents are noised straight to the timestep; else the sampler makes steps of its
own, one in each *wave*, from the velocity of the wave before.
"""

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from lance_quant.calibration.config import TEXT, CalibrationConfig
from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import SPATIAL_DOWNSAMPLE, TEMPORAL_DOWNSAMPLE
from lance_quant.model.inputs import prepare
from lance_quant.model.pixels import open_image
from lance_quant.model.positions import CAPTION
from lance_quant.model.positions import TEXT as PLAIN
from lance_quant.model.prompts import IM_END, encode
from lance_quant.model.request import UNDERSTANDING, Request
from lance_quant.model.sampler import FlowConfig, initial_state, is_guided, timesteps
from lance_quant.model.sequence import Sample
from lance_quant.model.vae import WanVAE
from lance_quant.seeds import seed_of

CONDITIONAL, UNCONDITIONAL = 0, 1
NO_TIME = float("nan")


@dataclass(frozen=True)
class Step:
    """A timestep that the block is seen at. wave: 0, or where the state before it must have been computed."""

    index: int
    t: float
    unconditional: bool
    wave: int


@dataclass(frozen=True)
class Forward:
    """One call of the decoder. step: None for the context; start, end: its tokens; und, gen: how many of each path."""

    job: int
    task: str
    branch: int
    step: Step | None
    start: int
    end: int
    und: int
    gen: int

    @property
    def wave(self) -> int:
        return 0 if self.step is None else self.step.wave

    def count(self, path: str) -> int:
        return self.und if path == "und" else self.gen

    def timestep(self, path: str) -> float:
        """Of its rows of a path: NaN for text, 0 for clean latents."""
        if self.step is not None:
            return self.step.t
        return 0.0 if path == "gen" else NO_TIME


@dataclass
class Job:
    """state: latents [n_vae, 48] float32, clean rows put in, noise in the others; goal: those that should come out
    [rows, 48], None where unknown. seen: the vision tower's tokens on the CPU, once it has looked.
    """

    index: int
    sample: Sample
    flow: FlowConfig
    steps: tuple[Step, ...] = ()
    state: torch.Tensor | None = None
    goal: torch.Tensor | None = None
    seen: torch.Tensor | None = None

    @property
    def target(self) -> tuple[int, int]:
        """Tokens of the block that is drawn; of a question, none behind the end."""
        for start, end, mode in self.sample.spans():
            if mode == "noise":
                return start, end
        return len(self.sample.ids), len(self.sample.ids)

    @property
    def waves(self) -> int:
        return 1 + max((step.wave for step in self.steps), default=0)

    def context(self, branch: int) -> list[tuple[int, int, str]]:
        """The splits before the block, without the caption for the unconditional branch."""
        spans = [span for span in self.sample.spans() if span[0] < self.target[0]]
        if branch == UNCONDITIONAL:
            spans = [span for span in spans if self.sample.modality[span[0]] != CAPTION]
        return spans

    def branches(self) -> list[tuple[int, list[Step]]]:
        """Each branch that runs, with its timesteps."""
        without = [step for step in self.steps if step.unconditional]
        return [(CONDITIONAL, list(self.steps))] + ([(UNCONDITIONAL, without)] if without else [])

    def forwards(self) -> list[Forward]:
        """Every call of all waves, in the order in which they run within a wave."""
        latent = self.sample.latent_mask()
        task = self.sample.task

        def forward(branch: int, step: Step | None, start: int, end: int) -> Forward:
            gen = int(latent[start:end].sum())
            return Forward(self.index, task, branch, step, start, end, end - start - gen, gen)

        if not self.steps:
            return [forward(CONDITIONAL, None, 0, len(self.sample.ids))]
        out = []
        for branch, steps in self.branches():
            out += [forward(branch, None, start, end) for start, end, _ in self.context(branch)]
            out += [forward(branch, step, *self.target) for step in steps]
        return out


def text_job(index: int, ids: list[int]) -> Job:
    """Plain text, no template around it."""
    none = torch.empty(0, dtype=torch.int64)
    sample = Sample(
        task=TEXT,
        ids=torch.tensor(ids),
        split_lens=(len(ids),),
        split_modes=("causal",),
        modality=torch.full((len(ids),), PLAIN),
        grids=(),
        vit_indexes=none,
        vae_indexes=none,
        mse_indexes=none,
        context_length=len(ids),
    )
    return Job(index, sample, FlowConfig())


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What turns requests into jobs. vae: None where no task draws."""

    checkpoint: Checkpoint
    cfg: CalibrationConfig
    tokenizer: Tokenizer
    vae: WanVAE | None

    def job(self, index: int, request: Request) -> Job:
        """Pixels prepared and latents encoded, all on the CPU. Raises LanceQuantError as `prepare` does."""
        cfg = self.cfg
        sample = prepare(request, self.tokenizer, self.checkpoint.edges(request.task), self.vae)
        if sample.vit_patches is not None:  # the tower casts them anyway; waiting in float32 they would fill the host
            sample = replace(sample, vit_patches=sample.vit_patches.to(torch.bfloat16))
        if request.task in UNDERSTANDING:
            return Job(index, _answered(sample, encode(self.tokenizer, request.answer + IM_END)), FlowConfig())
        clean = tuple(None if latents is None else latents.cpu() for latents in sample.clean_latents)
        sample = replace(sample, clean_latents=clean)
        goal = _goal(request, sample, self.vae)
        flow = FlowConfig() if goal is not None else FlowConfig(steps=cfg.sampler_steps)
        seed = seed_of(cfg.seed, index)
        state = initial_state(sample, seed, self.checkpoint.config.latent_channels, torch.float32)
        steps = _steps(flow, cfg, seed) if goal is not None else _own_steps(flow)
        return Job(index, sample, flow, steps, state, goal)


def _answered(sample: Sample, answer: list[int]) -> Sample:
    """The question with its answer behind; the last token is only ever put out, never read."""
    more = answer[:-1]
    lens = list(sample.split_lens)
    lens[-1] += len(more)
    return replace(
        sample,
        ids=torch.cat((sample.ids, torch.tensor(more, dtype=torch.int64))),
        modality=torch.cat((sample.modality, torch.full((len(more),), PLAIN))),
        split_lens=tuple(lens),
    )


def _goal(request: Request, sample: Sample, vae: WanVAE) -> torch.Tensor | None:
    """Latents [t*h*w, 48] of what should come out, on the CPU; None where the request does not know it."""
    if not request.target:
        return None
    t, h, w = sample.latent_grids[-1]
    frames = 1 + TEMPORAL_DOWNSAMPLE * (t - 1)
    if len(request.target) < frames:
        raise LanceQuantError(
            f"'{request.name}' draws {frames} frames and its target has {len(request.target)}: give as many"
        )
    size = (SPATIAL_DOWNSAMPLE * w, SPATIAL_DOWNSAMPLE * h)  # the block's own, which a bucket need not be
    fitted = [ImageOps.fit(open_image(frame), size, Image.Resampling.BICUBIC) for frame in request.target[:frames]]
    return vae.encode(_pixels(fitted)).flatten(0, 2).cpu()


def _pixels(frames: list[Image.Image]) -> torch.Tensor:
    """[3, T, H, W] in [-1, 1], as they are."""
    stacked = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))
    return stacked.permute(3, 0, 1, 2).float() / 127.5 - 1


def chosen_steps(steps: int, count: int, seed: int) -> list[int]:
    """`count` of the sampler's steps, one drawn from each of equally long stretches; all where count >= steps."""
    if count >= steps:
        return list(range(steps))
    rng = random.Random(seed)
    edges = [round(index * steps / count) for index in range(count + 1)]
    return [rng.randrange(start, end) for start, end in zip(edges, edges[1:], strict=False)]


def _steps(flow: FlowConfig, cfg: CalibrationConfig, seed: int) -> tuple[Step, ...]:
    """Timesteps that a known result is noised to, and which of the guided ones run without the caption too."""
    grid = timesteps(flow)
    chosen = chosen_steps(flow.steps, cfg.timesteps, seed)
    guided = [step for step in chosen if is_guided(grid[step], flow)]
    without = set(random.Random(seed).sample(guided, round(cfg.unconditional * len(guided))))
    return tuple(Step(step, float(grid[step]), step in without, 0) for step in chosen)


def _own_steps(flow: FlowConfig) -> tuple[Step, ...]:
    """The sampler's own: each needs the state that the one before leaves."""
    grid = timesteps(flow)
    return tuple(Step(step, float(grid[step]), is_guided(grid[step], flow), step) for step in range(flow.steps))
