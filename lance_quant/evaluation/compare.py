"""`compare`: the packed 4-bit model against the bf16 baseline, sample by sample.

answers.parquet   the four text scores of the 4-bit answer against the bf16 one; whether each is the reference
forced.parquet    KL, top-1 agreement and perplexities under teacher forcing on the bf16 answer
velocity.parquet  velocity error at the compared steps of the bf16 trajectory: conditional, and guided as applied
pictures.parquet  final latent error, PSNR and SSIM of pictures and clips, whether each shows what was asked for;
                  pictures/<name>.png, frames/<name>.safetensors as in the baseline
metrics.parquet   the means, task by task and over each path
metrics.json      the same, the means of a task as <task>/<score>
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.evaluation.baseline import drawn_rows
from lance_quant.evaluation.config import EvaluationConfig
from lance_quant.evaluation.distributions import compare_logits
from lance_quant.evaluation.judge import shows_what_was_asked
from lance_quant.evaluation.means import flat, means
from lance_quant.evaluation.pictures import clip_scores, tensor_errors
from lance_quant.evaluation.samples import (
    ANSWERS,
    drawing_vae,
    evaluation_requests,
    flow_config,
    load_frames,
    load_tensors,
    save_frames,
)
from lance_quant.evaluation.text import text_scores
from lance_quant.model.inputs import prepare
from lance_quant.model.prompts import decode_answer, load_tokenizer
from lance_quant.model.request import UNDERSTANDING, Request
from lance_quant.model.sampler import guide, is_guided, run_flow, start_flow, timesteps
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import answer, forced_logits
from lance_quant.progress import Progress
from lance_quant.runtime.accelerate import accelerate
from lance_quant.runtime.lance import load_packed_lance


@dataclass(frozen=True, kw_only=True)
class CompareJob:
    """packed, baseline: folders of the pack and baseline artifacts."""

    checkpoint: Checkpoint
    packed: Path
    baseline: Path
    evaluation: EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class CompareSummary:
    """metrics: the content of metrics.json."""

    metrics: dict[str, float]


@torch.inference_mode()
def compare(job: CompareJob, out: Path, device: str, progress: Progress | None = None) -> CompareSummary:
    """Run every evaluation sample through the 4-bit model; write the files of this module's docstring into `out`."""
    started = time.monotonic()
    (out / "pictures").mkdir()
    tables: dict[str, pd.DataFrame] = {}
    if requests := evaluation_requests(job.checkpoint, job.evaluation):  # a text model serves no task
        run = _Comparison(job, out, device)
        for index, request in enumerate(requests):
            sample = prepare(request, run.tokenizer, job.checkpoint.edges(request.task), run.vae)
            (run.question if request.task in UNDERSTANDING else run.drawing)(request, sample)
            if progress is not None:
                progress(index + 1, len(requests), request.name)
        tables = {name: pd.DataFrame(rows) for name, rows in run.tables.items() if rows}
    table = means(tables)
    for name, rows in (tables | {"metrics": table}).items():
        rows.to_parquet(out / f"{name}.parquet", index=False)
    metrics = flat(table) | {
        "bytes_source": job.checkpoint.model_file.stat().st_size,
        "bytes_packed": sum(file.stat().st_size for file in job.packed.glob("*.safetensors")),
        "seconds": round(time.monotonic() - started, 2),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return CompareSummary(metrics=metrics)


class _Comparison:
    """Tables of scores, a row a sample (velocity: a row a step)."""

    def __init__(self, job: CompareJob, out: Path, device: str):
        self.job, self.out, self.device = job, out, device
        self.tokenizer = load_tokenizer(job.checkpoint.folder)
        self.lance = accelerate(load_packed_lance(job.checkpoint, job.packed, device))
        self.vae = drawing_vae(job.checkpoint, job.evaluation, device)
        self.flow = flow_config(job.evaluation)
        self.baseline = pd.read_parquet(job.baseline / ANSWERS).set_index("name")
        self.tables: dict[str, list[dict]] = {"answers": [], "forced": [], "velocity": [], "pictures": []}

    def question(self, request: Request, sample: Sample) -> None:
        before = self.baseline.loc[request.name, "answer"]
        tokens = answer(self.lance, sample, self.job.evaluation.max_new_tokens).tokens
        after = decode_answer(self.tokenizer, tokens)
        row = {"name": request.name, "task": request.task, "prompt": request.prompt, "reference": request.answer}
        row |= {"baseline": before, "int4": after, **asdict(text_scores(before, after))}
        known = self.job.evaluation.source == "scenes" and request.answer.strip() != ""  # elsewhere wording is free
        for model, text in (("baseline", before), ("int4", after)):
            row[f"reference_exact_{model}"] = text_scores(request.answer, text).exact == 1 if known else None
        self.tables["answers"].append(row)

        kept = load_tensors(self.job.baseline, "logits", request.name)
        logits = forced_logits(self.lance, sample, kept["tokens"].tolist())
        scores = compare_logits(kept["logits"].to(logits.device), logits, kept["tokens"])
        self.tables["forced"].append(
            {
                "name": request.name,
                "task": request.task,
                "tokens": scores.tokens,
                "perplexity_baseline": scores.perplexity_baseline,
                "perplexity_int4": scores.perplexity_other,
                "kl": scores.kl,
                "top1": scores.top1,
            }
        )

    def drawing(self, request: Request, sample: Sample) -> None:
        kept = load_tensors(self.job.baseline, "trajectories", request.name)
        start = kept["start"].to(self.device)
        flow = start_flow(self.lance, sample, start, self.flow)
        self.lead(request, sample, flow, kept)
        final = run_flow(flow, start, self.flow)
        before = load_frames(self.job.baseline, request.name)
        after = self.vae.decode_frames(sample.drawn_latents(final)).numpy()
        save_frames(self.out, request.name, after)
        drawn = final[sample.denoised_rows()].cpu()
        row = {"name": request.name, "task": request.task, "prompt": request.prompt, "frames": len(after)}
        row |= {"latent_relative_l2": tensor_errors(kept["final"], drawn).relative_l2}
        drawn_from = 1 if request.task == "i2v" else 0  # the first frame is given, and alike in both
        row |= asdict(clip_scores(before[drawn_from:], after[drawn_from:]))
        for model, frames in (("baseline", before), ("int4", after)):
            row[f"correct_{model}"] = shows_what_was_asked(request, frames, self.job.evaluation.source)
        self.tables["pictures"].append(row)

    def lead(self, request: Request, sample: Sample, flow, kept: dict[str, torch.Tensor]) -> None:
        """Velocities at the kept states of the bf16 trajectory, so that errors do not add up over steps."""
        drawn = drawn_rows(flow, sample).to(self.device)
        times, seen = timesteps(self.flow), []
        for step, state in zip(kept["steps"].tolist(), kept["states"].to(self.device), strict=True):
            t = times[step]
            velocities = flow.velocities(state, t, is_guided(t, self.flow))
            seen.append((step, float(t), velocities.conditional[drawn], guide(velocities, self.flow)[drawn]))
        for place, (step, t, conditional, guided) in enumerate(seen):
            plain = tensor_errors(kept["velocities"][place], conditional.cpu())
            applied = tensor_errors(kept["guided"][place], guided.cpu())
            self.tables["velocity"].append(
                {
                    "name": request.name,
                    "task": request.task,
                    "step": step,
                    "timestep": t,
                    "relative_l2": plain.relative_l2,
                    "cosine": plain.cosine,
                    "guided_relative_l2": applied.relative_l2,
                    "guided_cosine": applied.cosine,
                }
            )
