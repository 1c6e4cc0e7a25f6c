"""Run any request on any checkpoint, bf16 or packed: loaded once, many requests.

    generator = Generator(open_checkpoint(cfg), weights=None, device="cuda")
    generator.run(Request(task="t2i", name="circle", prompt="a red circle", height=768, width=768)).frames

The loops are `model/sampler.py` and `model/understanding.py`, the same that evaluation and calibration run.
"""

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from lance_quant.checkpoint.layout import LAYOUT_TASKS, Checkpoint
from lance_quant.devices import current
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import SPATIAL_DOWNSAMPLE
from lance_quant.model.inputs import drawn_size, given_frames, prepare
from lance_quant.model.lance import Lance, load_lance
from lance_quant.model.pixels import SAMPLED_FPS
from lance_quant.model.prompts import decode_answer, load_tokenizer
from lance_quant.model.request import GENERATION, GIVEN, TASKS, UNDERSTANDING, Request
from lance_quant.model.sampler import FlowConfig, initial_state, run_flow, start_flow
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import answer
from lance_quant.model.vae import WanVAE, load_vae, vae_dtype
from lance_quant.progress import Progress
from lance_quant.runtime.accelerate import accelerate, check_choice
from lance_quant.runtime.lance import load_packed_lance
from lance_quant.runtime.selection import Int4Config


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How requests are run. flow: the sampler; its `cached` goes for answers too. seed: of the noise a drawing starts
    from, the same for every request of a run, as upstream (Lance spec sec. 17)."""

    flow: FlowConfig = field(default_factory=FlowConfig)
    seed: int = 42
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise LanceQuantError(f"seed={self.seed} must lie between 0 and 2**32 - 1")
        if self.max_new_tokens < 1:
            raise LanceQuantError(f"max_new_tokens={self.max_new_tokens} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a request: an answer, or frames uint8 [T, H, W, 3].

    raw: the answer as decoded, its stop token included; text: without it and stripped (Lance spec sec. 18).
    seconds: of each part of the work in order, loading left out; rate: seconds a step, or tokens a second behind the
    first. peak_bytes: most GPU memory that tensors held, None on a CPU.
    """

    frames: np.ndarray | None = None
    tokens: tuple[int, ...] = ()
    text: str = ""
    raw: str = ""
    seconds: dict[str, float]
    rate: dict[str, float]
    peak_bytes: int | None


class Generator:
    """A checkpoint and what to run it with. Tokenizer, model and VAE are each loaded when the first request needs it,
    so that a request that lacks its picture is refused before gigabytes are read.

    weights: a packed folder, or None for the checkpoint's own in bf16. device: as `choose_device` gives it.
    accelerate: one of `accelerate.CHOICES`. int4: how packed weights multiply.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Path | None,
        device: str,
        accelerate: str = "auto",
        int4: Int4Config | None = None,
    ):
        check_choice(accelerate)
        if weights is None and int4 is not None:
            raise LanceQuantError("int4 is of packed weights, and these are bf16: give weights=FOLDER, or leave it out")
        self.checkpoint, self.weights, self.device, self.accelerate = checkpoint, weights, device, accelerate
        self.int4 = int4

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.checkpoint.folder)

    @cached_property
    def lance(self) -> Lance:
        if self.weights is None:
            lance = load_lance(self.checkpoint, self.device)
        else:
            lance = load_packed_lance(self.checkpoint, self.weights, self.device, self.int4)
        return accelerate(lance, self.accelerate)

    @cached_property
    def vae(self) -> WanVAE:
        return load_vae(self.checkpoint.vae_file, self.device, vae_dtype(self.device))

    @torch.inference_mode()
    def run(self, request: Request, cfg: GenerationConfig | None = None, progress: Progress | None = None) -> Result:
        """Answer or draw. progress(done, total, what) after each step, or each token of at most as many as asked for.

        The same request, seed and device give the same bytes. Raises LanceQuantError where the checkpoint does not
        serve the task or the request lacks something.
        """
        cfg = cfg or GenerationConfig()
        check_request(self.checkpoint, request)
        with current(self.device):
            return self._run(request, cfg, progress)

    def _run(self, request: Request, cfg: GenerationConfig, progress: Progress | None) -> Result:
        watch = _Watch(self.device)
        vae = self.vae if request.task in GENERATION else None
        watch.start()
        sample = prepare(request, self.tokenizer, self.checkpoint.edges(request.task), vae)
        watch.lap("prepare")
        lance = self.lance
        watch.start()
        work = self._answer if request.task in UNDERSTANDING else self._draw
        return work(lance, sample, cfg, watch, lambda done, total: progress and progress(done, total, request.name))

    def _answer(self, lance: Lance, sample: Sample, cfg: GenerationConfig, watch: "_Watch", tell) -> Result:
        def on_token(count: int, token: int) -> None:
            if count == 1:
                watch.lap("first token")
            tell(count, cfg.max_new_tokens)

        tokens = answer(lance, sample, cfg.max_new_tokens, cached=cfg.flow.cached, on_token=on_token).tokens
        seconds = watch.lap("further tokens")
        return Result(
            tokens=tuple(tokens),
            text=decode_answer(self.tokenizer, tokens),
            raw=self.tokenizer.decode(tokens, skip_special_tokens=False),
            rate={"tokens_per_second": (len(tokens) - 1) / seconds} if len(tokens) > 1 else {},
            seconds=watch.laps,
            peak_bytes=watch.peak_bytes(),
        )

    def _draw(self, lance: Lance, sample: Sample, cfg: GenerationConfig, watch: "_Watch", tell) -> Result:
        channels = self.checkpoint.config.latent_channels
        state = initial_state(sample, cfg.seed, channels, lance.dtype, self.device)
        flow = start_flow(lance, sample, state, cfg.flow)
        watch.lap("context")
        final = run_flow(flow, state, cfg.flow, lambda step, *_: tell(step + 1, cfg.flow.steps))
        seconds = watch.lap("steps")
        del flow  # the kept context; the decoder needs the room
        frames = self.vae.decode_frames(sample.drawn_latents(final)).numpy()
        watch.lap("decode")
        return Result(
            frames=frames,
            rate={"seconds_per_step": seconds / cfg.flow.steps},
            seconds=watch.laps,
            peak_bytes=watch.peak_bytes(),
        )


def check_request(checkpoint: Checkpoint, request: Request) -> None:
    """Is it a task that the checkpoint serves, with what it needs? Loads nothing. Raises LanceQuantError."""
    check_task(checkpoint, request.task)
    given_frames(request)
    if request.task in GENERATION:
        check_size(checkpoint, request)


def check_task(checkpoint: Checkpoint, task: str) -> None:
    """Raises LanceQuantError for a task that the checkpoint's layout does not serve, with the choice that does."""
    if task not in TASKS:
        raise LanceQuantError(f"task '{task}' is unknown: take one of {', '.join(TASKS)}")
    served = LAYOUT_TASKS[checkpoint.layout]
    if task not in served:
        choice = "tiny_video" if checkpoint.name.startswith("tiny") else "video"
        raise LanceQuantError(
            f"task {task} is not one of the {checkpoint.layout} model in {checkpoint.folder}, which serves "
            f"{', '.join(served) or 'none'}: take checkpoint={choice}"
        )


def check_size(checkpoint: Checkpoint, request: Request) -> None:
    """Raises LanceQuantError for a drawing beyond the model's position table, and says how to come within it."""
    frames, height, width = drawn_size(request, checkpoint.edges(request.task))
    given, most = GIVEN.get(request.task), checkpoint.config.max_num_frames
    if frames > most:
        clip, asked, mend = "draws", request.frames, f"take frames={most} or less"
        if given == "video":  # sampled when it was read, at SAMPLED_FPS whatever its own rate
            clip, asked = "gives a clip of", len(request.video)
            mend = f"give a clip of at most {most} frames, {most / SAMPLED_FPS:.2g} seconds"
        raise LanceQuantError(
            f"'{request.name}' {clip} {asked} frames at {SAMPLED_FPS} a second, beyond this model's {most}: {mend}"
        )
    side = checkpoint.config.max_latent_size * SPATIAL_DOWNSAMPLE
    if max(height, width) > side:
        mend = "take a lower resolution=..." + (f", or {given}=... of another shape" if given else ", height or width")
        raise LanceQuantError(
            f"'{request.name}' draws {width} x {height} pixels, beyond this model's {side} a side: {mend}"
        )


class _Watch:
    """Seconds between laps, the GPU's queue waited for at each; the peak of its memory since the watch was made."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.laps: dict[str, float] = {}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def start(self) -> None:
        self.since = self._now()

    def lap(self, name: str) -> float:
        now = self._now()
        self.laps[name], self.since = now - self.since, now
        return self.laps[name]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
