"""`compare`: the packed 4-bit model against the bf16 baseline, sample by sample.

answers.parquet   the four text scores of the 4-bit answer against the bf16 one; whether each is the reference
forced.parquet    KL, top-1 agreement and perplexities under teacher forcing on the bf16 answer
velocity.parquet  velocity error at every step of the bf16 trajectory: conditional, and guided as applied
pictures.parquet  final latent error, PSNR and SSIM of the pictures; pictures/<name>.png
metrics.json      the means
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.evaluation.baseline import draw
from lance_quant.evaluation.config import EvaluationConfig
from lance_quant.evaluation.distributions import compare_logits
from lance_quant.evaluation.pictures import picture_scores, tensor_errors
from lance_quant.evaluation.samples import ANSWERS, evaluation_requests, flow_config, load_tensors, picture_file
from lance_quant.evaluation.text import text_scores
from lance_quant.model.inputs import prepare
from lance_quant.model.prompts import decode_answer, load_tokenizer
from lance_quant.model.request import Request
from lance_quant.model.sampler import guide, is_guided, run_flow, start_flow, timesteps
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import answer, forced_logits
from lance_quant.model.vae import load_vae
from lance_quant.progress import Progress
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
    run = _Comparison(job, out, device)
    (out / "pictures").mkdir()
    requests = evaluation_requests(job.checkpoint, job.evaluation)
    for index, request in enumerate(requests):
        sample = prepare(request, run.tokenizer, job.checkpoint.vit_edge)
        (run.question if request.task == "x2t_image" else run.picture)(request, sample)
        if progress is not None:
            progress(index + 1, len(requests), request.name)
    run.write()
    metrics = run.metrics() | {
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
        self.lance = load_packed_lance(job.checkpoint, job.packed, device)
        self.vae = load_vae(job.checkpoint.vae_file, device) if "t2i" in job.evaluation.tasks else None
        self.flow = flow_config(job.evaluation)
        self.baseline = pd.read_parquet(job.baseline / ANSWERS).set_index("name")
        self.tables: dict[str, list[dict]] = {"answers": [], "forced": [], "velocity": [], "pictures": []}

    def question(self, request: Request, sample: Sample) -> None:
        before = self.baseline.loc[request.name, "answer"]
        tokens = answer(self.lance, sample, self.job.evaluation.max_new_tokens).tokens
        after = decode_answer(self.tokenizer, tokens)
        row = {"name": request.name, "prompt": request.prompt, "reference": request.answer}
        row |= {"baseline": before, "int4": after, **asdict(text_scores(before, after))}
        row["reference_exact_baseline"] = text_scores(request.answer, before).exact == 1
        row["reference_exact_int4"] = text_scores(request.answer, after).exact == 1
        self.tables["answers"].append(row)

        kept = load_tensors(self.job.baseline, "logits", request.name)
        logits = forced_logits(self.lance, sample, kept["tokens"].tolist()).cpu()
        scores = compare_logits(kept["logits"], logits, kept["tokens"])
        self.tables["forced"].append(
            {
                "name": request.name,
                "tokens": scores.tokens,
                "perplexity_baseline": scores.perplexity_baseline,
                "perplexity_int4": scores.perplexity_other,
                "kl": scores.kl,
                "top1": scores.top1,
            }
        )

    def picture(self, request: Request, sample: Sample) -> None:
        kept = load_tensors(self.job.baseline, "trajectories", request.name)
        states = kept["states"].to(self.device)
        flow = start_flow(self.lance, sample, states[0], self.flow)
        for step, t in enumerate(timesteps(self.flow)[:-1]):
            velocities = flow.velocities(states[step], t, is_guided(t, self.flow))
            conditional = tensor_errors(kept["velocities"][step], velocities.conditional.cpu())
            guided = tensor_errors(kept["guided"][step], guide(velocities, self.flow).cpu())
            self.tables["velocity"].append(
                {
                    "name": request.name,
                    "step": step,
                    "timestep": float(t),
                    "relative_l2": conditional.relative_l2,
                    "cosine": conditional.cosine,
                    "guided_relative_l2": guided.relative_l2,
                    "guided_cosine": guided.cosine,
                }
            )
        final = run_flow(flow, states[0], self.flow)
        after = draw(self.vae, sample, final)
        after.save(picture_file(self.out, request.name))
        before = Image.open(picture_file(self.job.baseline, request.name))
        self.tables["pictures"].append(
            {
                "name": request.name,
                "prompt": request.prompt,
                "latent_relative_l2": tensor_errors(kept["final"], final.cpu()).relative_l2,
                **asdict(picture_scores(np.asarray(before), np.asarray(after))),
            }
        )

    def write(self) -> None:
        for name, rows in self.tables.items():
            if rows:
                pd.DataFrame(rows).to_parquet(self.out / f"{name}.parquet", index=False)

    def metrics(self) -> dict[str, float]:
        """Means over samples; perplexities and KL over tokens."""
        answers, forced, velocity, pictures = (pd.DataFrame(rows) for rows in self.tables.values())
        out: dict[str, float] = {"samples_x2t": len(answers), "samples_t2i": len(pictures)}
        if len(answers):
            for score in ("exact", "levenshtein", "difflib", "jaccard"):
                out[f"x2t_{score}"] = float(answers[score].mean())
            for model in ("baseline", "int4"):
                out[f"x2t_reference_exact_{model}"] = float(answers[f"reference_exact_{model}"].mean())
            weight = forced.tokens / forced.tokens.sum()
            for model in ("baseline", "int4"):
                out[f"perplexity_{model}"] = math.exp(float((np.log(forced[f"perplexity_{model}"]) * weight).sum()))
            for score in ("kl", "top1"):
                out[score] = float((forced[score] * weight).sum())
        if len(pictures):
            for score in ("relative_l2", "cosine", "guided_relative_l2"):
                out[f"velocity_{score}"] = float(velocity[score].mean())
            for score in ("latent_relative_l2", "psnr", "ssim"):
                out[score] = float(pictures[score].mean())
        return out
