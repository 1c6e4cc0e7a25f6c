"""`run_baseline`: what bf16 answers and draws on held-out samples, kept so that every recipe is measured against it.

answers.parquet                  name, task, prompt, reference, answer, tokens
images/<name>.png                what was asked about or given to start from; of a clip up to five frames side by side
logits/<name>.safetensors        tokens int64 [n], logits bf16 [n, vocab] under teacher forcing on the own answer
trajectories/<name>.safetensors  start [n_vae, 48]; at the compared steps int64 [s]: states [s, n_vae, 48], velocities
                                 (conditional) and guided [s, n, 48] of the n latents drawn; final [n, 48]
pictures/<name>.png              pictures drawn; of a clip up to five frames side by side
frames/<name>.safetensors        frames uint8 [T, H, W, 3] of a clip drawn
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.evaluation.config import EvaluationConfig, evaluated_tasks
from lance_quant.evaluation.samples import (
    ANSWERS,
    drawing_vae,
    evaluation_requests,
    flow_config,
    given_picture,
    image_file,
    noise_seed,
    save_frames,
    save_tensors,
    velocity_steps,
)
from lance_quant.model.inputs import prepare
from lance_quant.model.lance import load_lance
from lance_quant.model.prompts import decode_answer, load_tokenizer
from lance_quant.model.request import UNDERSTANDING
from lance_quant.model.sampler import Flow, Velocities, guide, initial_state, run_flow, start_flow
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import answer, forced_logits
from lance_quant.progress import Progress
from lance_quant.runtime.accelerate import accelerate

COLUMNS = ["name", "task", "prompt", "reference", "answer", "tokens"]  # of answers.parquet


@dataclass(frozen=True, kw_only=True)
class BaselineSummary:
    samples: dict[str, int]
    seconds: float


@torch.inference_mode()
def run_baseline(
    checkpoint: Checkpoint, cfg: EvaluationConfig, out: Path, device: str, progress: Progress | None = None
) -> BaselineSummary:
    """Run every evaluation sample through the bf16 model; write the files of this module's docstring into `out`."""
    started = time.monotonic()
    requests = evaluation_requests(checkpoint, cfg)
    for folder in ("images", "pictures"):
        (out / folder).mkdir()
    rows: list[dict] = []
    if requests:  # a text model serves no task
        tokenizer = load_tokenizer(checkpoint.folder)
        lance = accelerate(load_lance(checkpoint, device))
        vae = drawing_vae(checkpoint, cfg, device)
    for index, request in enumerate(requests):
        sample = prepare(request, tokenizer, checkpoint.edges(request.task), vae)
        if (given := given_picture(request)) is not None:
            given.save(image_file(out, request.name))
        row = {"name": request.name, "task": request.task, "prompt": request.prompt, "reference": request.answer}
        if request.task in UNDERSTANDING:
            tokens = answer(lance, sample, cfg.max_new_tokens).tokens
            logits = forced_logits(lance, sample, tokens)
            save_tensors(out, "logits", request.name, tokens=torch.tensor(tokens), logits=logits.to(torch.bfloat16))
            row |= {"answer": decode_answer(tokenizer, tokens), "tokens": len(tokens)}
        else:
            channels = checkpoint.config.latent_channels
            start = initial_state(sample, noise_seed(cfg, index), channels, lance.dtype, device)
            flow = start_flow(lance, sample, start, flow_config(cfg))
            final, kept = led(flow, sample, start, cfg)
            save_tensors(out, "trajectories", request.name, start=start, **kept, final=final[sample.denoised_rows()])
            save_frames(out, request.name, vae.decode_frames(sample.drawn_latents(final)).numpy())
            row |= {"answer": "", "tokens": 0}
        rows.append(row)
        if progress is not None:
            progress(index + 1, len(requests), request.name)
    pd.DataFrame(rows, columns=COLUMNS).to_parquet(out / ANSWERS, index=False)
    tasks = evaluated_tasks(cfg, checkpoint.layout)
    return BaselineSummary(
        samples={task: sum(row["task"] == task for row in rows) for task in tasks},
        seconds=round(time.monotonic() - started, 2),
    )


def led(
    flow: Flow, sample: Sample, start: torch.Tensor, cfg: EvaluationConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The final state [n_vae, 48] of a trajectory, and what is kept of its compared steps."""
    steps, settings = velocity_steps(cfg), flow_config(cfg)
    drawn = drawn_rows(flow, sample).to(start.device)
    seen: dict[str, list[torch.Tensor]] = {"states": [], "velocities": [], "guided": []}

    def keep(step: int, t: torch.Tensor, state: torch.Tensor, velocities: Velocities) -> None:
        if step in steps:
            seen["states"].append(state.clone())
            seen["velocities"].append(velocities.conditional[drawn])
            seen["guided"].append(guide(velocities, settings)[drawn])

    final = run_flow(flow, start, settings, keep)
    return final, {"steps": torch.tensor(steps)} | {name: torch.stack(values) for name, values in seen.items()}


def drawn_rows(flow: Flow, sample: Sample) -> torch.Tensor:
    """Which of a flow's velocities are of latents drawn, int64: the first frame of i2v is given."""
    return torch.isin(flow.rows, sample.denoised_rows()).nonzero().squeeze(1)
