"""`run_baseline`: what bf16 answers and draws on held-out samples, kept so that every recipe is measured against it.

answers.parquet                  name, task, prompt, reference, answer, tokens
images/<name>.png                pictures asked about
logits/<name>.safetensors        tokens int64 [n], logits bf16 [n, vocab] under teacher forcing on the own answer
trajectories/<name>.safetensors  states, velocities (conditional) and guided [steps, n, 48], final [n, 48]
pictures/<name>.png              pictures drawn
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.evaluation.config import EvaluationConfig
from lance_quant.evaluation.samples import (
    ANSWERS,
    evaluation_requests,
    flow_config,
    image_file,
    picture_file,
    save_tensors,
)
from lance_quant.model.inputs import prepare
from lance_quant.model.lance import load_lance
from lance_quant.model.prompts import decode_answer, load_tokenizer
from lance_quant.model.sampler import guide, initial_state, run_flow, start_flow
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import answer, forced_logits
from lance_quant.model.vae import WanVAE, load_vae, to_uint8
from lance_quant.progress import Progress


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
    tokenizer = load_tokenizer(checkpoint.folder)
    lance = load_lance(checkpoint, device)
    vae = load_vae(checkpoint.vae_file, device) if "t2i" in cfg.tasks else None
    flow_cfg = flow_config(cfg)
    for folder in ("images", "pictures"):
        (out / folder).mkdir()
    rows = []
    for index, request in enumerate(requests):
        sample = prepare(request, tokenizer, checkpoint.vit_edge)
        row = {"name": request.name, "task": request.task, "prompt": request.prompt, "reference": request.answer}
        if request.task == "x2t_image":
            request.image.save(image_file(out, request.name))
            tokens = answer(lance, sample, cfg.max_new_tokens).tokens
            logits = forced_logits(lance, sample, tokens)
            save_tensors(out, "logits", request.name, tokens=torch.tensor(tokens), logits=logits.to(torch.bfloat16))
            row |= {"answer": decode_answer(tokenizer, tokens), "tokens": len(tokens)}
        else:
            channels = checkpoint.config.latent_channels
            state = initial_state(sample, noise_seed(cfg, index), channels, lance.dtype, device)
            seen = {"states": [], "velocities": [], "guided": []}

            def keep(step, t, state, velocities, seen=seen):
                seen["states"].append(state.clone())
                seen["velocities"].append(velocities.conditional)
                seen["guided"].append(guide(velocities, flow_cfg))

            final = run_flow(start_flow(lance, sample, state, flow_cfg), state, flow_cfg, keep)
            kept = {name: torch.stack(values) for name, values in seen.items()}
            save_tensors(out, "trajectories", request.name, **kept, final=final)
            draw(vae, sample, final).save(picture_file(out, request.name))
            row |= {"answer": "", "tokens": 0}
        rows.append(row)
        if progress is not None:
            progress(index + 1, len(requests), request.name)
    pq.write_table(pa.Table.from_pylist(rows), out / ANSWERS)
    return BaselineSummary(
        samples={task: sum(row["task"] == task for row in rows) for task in cfg.tasks},
        seconds=round(time.monotonic() - started, 2),
    )


def noise_seed(cfg: EvaluationConfig, index: int) -> int:
    """Each sample starts from noise of its own."""
    return cfg.seed * 1_000_003 + index


def draw(vae: WanVAE, sample: Sample, final: torch.Tensor) -> Image.Image:
    """The picture of a final sampler state [n, 48]: its last block, first frame."""
    grid = sample.latent_grids[-1]
    latents = final[-grid[0] * grid[1] * grid[2] :].unflatten(0, grid)
    return Image.fromarray(to_uint8(vae.decode(latents))[0].cpu().numpy())
