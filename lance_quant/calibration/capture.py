"""`capture`: run the calibration samples through the bf16 model and write what every linear saw, as Parquet.

1. prepare  every sample becomes a job: the VAE encodes, then the vision tower looks, each loaded for that alone
2. plan     from token counts: what each forward weighs, which rows are kept, which jobs go together
3. pass     embed the jobs of a pass, stream the layers over them, write each layer at once
4. back     what kept sequences' states do to what the model puts out, from the last layer to the first (`gradients.py`)

The whole model is never there. Device memory holds two layers, the hidden states of a pass and the working memory of
its largest forward; `calibration.memory_gb` bounds it (an 8 GB card: 7.5), and the bytes written do not depend on it.
The way back needs two layers in float32 and one sequence, whatever is allowed.
"""

import gc
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lance_quant.calibration.config import TEXT, CalibrationConfig, calibrated_tasks
from lance_quant.calibration.forwards import Embedding, Piece, cache_for, move_on, positions_of, run_layer
from lance_quant.calibration.gradients import write_gradients
from lance_quant.calibration.jobs import Job, Preparation, text_job
from lance_quant.calibration.plan import KeptSequence, Pass, Plan, kept_sequences, make_passes, make_plan
from lance_quant.calibration.recorder import Recorder
from lance_quant.calibration.samples import calibration_requests, most_samples, text_pieces
from lance_quant.calibration.sequences import LOGITS, SEQUENCES_FILE, VELOCITY
from lance_quant.calibration.streaming import (
    DTYPE,
    bare_decoder,
    load_adapters,
    load_eyes,
    one_layer,
    stream_layers,
)
from lance_quant.checkpoint.layout import PATHS, SITES, Checkpoint, layer_targets
from lance_quant.model.config import LanceConfig
from lance_quant.model.lance import Lance
from lance_quant.model.prompts import load_tokenizer
from lance_quant.model.request import GENERATION
from lance_quant.model.sequence import Sample
from lance_quant.model.vae import load_vae
from lance_quant.progress import Progress

BYTES = DTYPE.itemsize
FREE_SHARE = 0.8  # of the memory that is free, what a pass may plan with


@dataclass(frozen=True, kw_only=True)
class CaptureSummary:
    """tokens: task -> path -> tokens that each linear of the path saw; rows: path -> kept per site.

    forwards: decoder calls that were recorded; passes: times that the weights were read; sequences: task -> how many
    are kept whole; gradients: of how many of them gradients are kept.
    """

    samples: int
    tokens: dict[str, dict[str, int]]
    rows: dict[str, int]
    forwards: int
    passes: int
    sequences: dict[str, int]
    gradients: int = 0
    bytes: int = 0
    seconds: float = 0.0


def capture(
    checkpoint: Checkpoint, cfg: CalibrationConfig, out: Path, device: str, progress: Progress | None = None
) -> CaptureSummary:
    """Write the capture artifact (schema: `activations.py`) into `out`."""
    started, out = time.monotonic(), Path(out)
    tell = progress or (lambda done, total, what: None)
    summary = run_samples(checkpoint, cfg, out, device, tell)
    let_go(device)
    kept = []
    if cfg.gradient_tokens and any(summary.sequences.values()):
        kept = write_gradients(checkpoint, out, cfg.gradient_tokens, cfg.seed, device, tell)
    return replace(
        summary,
        gradients=len(kept),
        bytes=sum(file.stat().st_size for file in out.rglob("*.parquet")),
        seconds=round(time.monotonic() - started, 2),
    )


@torch.inference_mode()
def run_samples(
    checkpoint: Checkpoint, cfg: CalibrationConfig, out: Path, device: str, tell: Progress
) -> CaptureSummary:
    """All of it but the gradients."""
    config = checkpoint.config
    tasks = calibrated_tasks(cfg, checkpoint.layout)
    jobs = prepare_jobs(checkpoint, cfg, device, tell)
    let_go(device)
    look(jobs, checkpoint, device, tell)
    let_go(device)
    plan = make_plan(jobs, tasks, cfg)
    kept = kept_sequences(plan, tasks, cfg.sequences, cfg.sequence_tokens)
    sizes = [job_bytes(job, config) for job in jobs]
    passes = make_passes(jobs, sizes, room(plan, cfg, config, device))
    with Recorder(plan, config, kept, len(passes), out, device) as recorder:
        for number, one in enumerate(passes):
            run_pass(_Run(checkpoint, jobs, plan, recorder, device), one, number, len(passes), tell)
        recorder.close()
    if kept:
        write_sequences(kept, jobs, plan, config, out)
    return CaptureSummary(
        samples=len(jobs),
        tokens=plan.tokens,
        rows={path: plan.rows(path) for path in PATHS},
        forwards=len(plan.forwards),
        passes=len(passes),
        sequences={task: sum(jobs[one.job].sample.task == task for one in kept) for task in tasks},
    )


def let_go(device: str) -> None:
    """Give the last phase's memory back, so that the next one finds it."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def prepare_jobs(checkpoint: Checkpoint, cfg: CalibrationConfig, device: str, tell: Progress) -> list[Job]:
    """Every sample with its latents encoded, on the CPU. The VAE is loaded where a task draws, and gone afterwards."""
    tokenizer = load_tokenizer(checkpoint.folder)
    if cfg.source == TEXT:
        return [text_job(index, ids) for index, ids in enumerate(text_pieces(tokenizer, cfg))]
    vae, tasks = None, calibrated_tasks(cfg, checkpoint.layout)
    if set(tasks) & set(GENERATION):
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32  # on a GPU as upstream
        vae = load_vae(checkpoint.vae_file, device, dtype)
    preparation = Preparation(checkpoint=checkpoint, cfg=cfg, tokenizer=tokenizer, vae=vae)
    jobs, expected = [], most_samples(cfg, tasks)
    for index, request in enumerate(calibration_requests(checkpoint, cfg)):
        jobs.append(preparation.job(index, request))
        tell(index + 1, max(expected, index + 1), f"samples prepared, {request.name}")
    return jobs


def look(jobs: Sequence[Job], checkpoint: Checkpoint, device: str, tell: Progress) -> None:
    """The vision tower's tokens of every job that has patches, which are dropped."""
    curious = [job for job in jobs if job.sample.vit_patches is not None]
    if not curious:
        return
    eyes = load_eyes(checkpoint, device)
    for done, job in enumerate(curious):
        job.seen = eyes.look(job.sample.vit_patches, job.sample.vit_grids).cpu()
        job.sample = replace(job.sample, vit_patches=None)
        tell(done + 1, len(curious), "pictures and clips looked at")


def job_bytes(job: Job, config: LanceConfig) -> int:
    """Hidden states and rotary tables of the wave that has the most of them."""
    tokens = defaultdict(int)
    for forward in job.forwards():
        waves = range(job.waves) if forward.step is None else [forward.wave]
        for wave in waves:
            tokens[wave] += forward.end - forward.start
    return max(tokens.values()) * BYTES * (config.hidden_size + 2 * config.head_dim)


def room(plan: Plan, cfg: CalibrationConfig, config: LanceConfig, device: str) -> int:
    """Bytes for the hidden states of a pass: what may be used less layers, rows and the largest forward's own needs."""
    width = {(target.path, target.site): target.in_features for target in layer_targets(config, 0)}
    rows = sum(plan.rows(path) * width[path, site] * BYTES for path in PATHS for site in SITES)
    layer = sum(target.out_features * target.in_features for target in layer_targets(config, 0)) * BYTES
    longest = max(forward.end - forward.start for forward in plan.forwards)
    working = longest * BYTES * (16 * config.hidden_size + 4 * config.intermediate_size)
    embedding = config.vocab_size * config.hidden_size * BYTES + longest * BYTES * 4 * config.hidden_size
    usable = int(cfg.memory_gb * 1e9) if cfg.memory_gb else int(FREE_SHARE * free_bytes(device))
    return usable - max(rows + 2 * layer + working, embedding)


def free_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class _Run:
    """What all passes share."""

    checkpoint: Checkpoint
    jobs: Sequence[Job]
    plan: Plan
    recorder: Recorder
    device: str

    def places(self) -> dict[int, list]:
        """Job -> its forwards with their places in the plan."""
        out = defaultdict(list)
        for place, forward in enumerate(self.plan.forwards):
            out[forward.job].append((place, forward))
        return out


def run_pass(run: _Run, one: Pass, number: int, of: int, tell: Progress) -> None:
    """Embed, stream the layers, and let the samplers of unknown results take their step."""
    config = run.checkpoint.config
    let_go(run.device)
    jobs = [run.jobs[index] for index in one.jobs]
    cache = cache_for(jobs, one_layer(config), run.device, DTYPE)
    pieces = embed(run, jobs, one.wave, cache)
    let_go(run.device)
    run.recorder.start([piece.place for piece in pieces if piece.recorded])
    layers = config.num_hidden_layers
    tokens = sum(piece.hidden.shape[1] for piece in pieces)
    for index, layer in stream_layers(run.checkpoint, run.device):
        run.recorder.listen(index, layer)
        run_layer(layer, pieces, cache, run.recorder)
        run.recorder.finish(index)
        tell(number * layers + index + 1, of * layers, f"layers, {tokens} tokens in {len(pieces)} forwards")
    unknown = [job for job in jobs if job.goal is None and job.waves > one.wave + 1]
    if unknown:
        move_on(load_adapters(run.checkpoint, run.device), unknown, pieces)


def embed(run: _Run, jobs: Sequence[Job], wave: int, cache) -> list[Piece]:
    lance: Lance = load_adapters(run.checkpoint, run.device)
    embedding = Embedding(lance, bare_decoder(run.checkpoint.config), cache)
    places = run.places()
    return [piece for job in jobs for piece in embedding.job(job, places[job.index], wave)]


def write_sequences(
    kept: Sequence[KeptSequence], jobs: Sequence[Job], plan: Plan, config: LanceConfig, out: Path
) -> None:
    """`sequences.parquet`: what each token of the kept sequences is."""
    tables = []
    for number, sequence in enumerate(kept):
        sample = jobs[sequence.job].sample
        positions = positions_of(jobs[sequence.job], config.video_token_id)[0]
        forwards = [plan.forwards[place] for place in sequence.places]
        end = forwards[-1].end
        split = np.repeat(np.arange(len(sample.split_lens)), sample.split_lens)[:end]
        step = forwards[-1].step
        tables.append(
            {
                "sequence": np.full(end, number, dtype=np.int32),
                "sample": np.full(end, sequence.job, dtype=np.int32),
                "task": np.full(end, sample.task, dtype=object),
                "timestep": np.full(end, np.nan if step is None else step.t, dtype=np.float32),
                "token": np.arange(end, dtype=np.int32),
                **{axis: row[:end].numpy().astype(np.int32) for axis, row in zip("thw", positions, strict=True)},
                "split": split.astype(np.int32),
                "mode": np.array([sample.split_modes[index] for index in split], dtype=object),
                "expert": np.where(sample.latent_mask()[:end].numpy(), "gen", "und").astype(object),
                "output": outputs_of(sample, split),
            }
        )
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    pq.write_table(pa.table(columns), out / SEQUENCES_FILE)


def outputs_of(sample: Sample, split: np.ndarray) -> np.ndarray:
    """What is asked of each token: the velocity of what is denoised, or else the logits of the last split."""
    asked = np.full(len(split), "", dtype=object)
    moving = sample.mse_indexes.numpy()
    moving = moving[moving < len(split)]
    if len(moving):
        asked[moving] = VELOCITY
    else:
        asked[split == split[-1]] = LOGITS
    return asked
