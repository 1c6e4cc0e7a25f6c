"""What a run found, read back from its artifacts: the one source of report.html, report.md and the model card."""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from lance_quant.evaluation.rendering import decibel


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    """Where the artifacts of one run lie, and what they are called."""

    name: str  # of the checkpoint, e.g. "image"
    recipe: str
    checkpoint: dict  # CheckpointSummary as a dict: layout, tensors, parameters, bytes, targets, fingerprint, files
    layers: list[Path]  # search artifacts in layer order
    packed: Path
    baseline: Path
    metrics: Path
    capture: Path | None = None
    settings: dict = field(default_factory=dict)  # the resolved configuration, nested or flat
    min_tokens: int = 256  # a linear that saw fewer counts as not covered


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the scores table: where its mean stands in metrics.json and its samples in a Parquet file."""

    key: str
    task: str  # "x2t" | "t2i"
    title: str
    meaning: str
    kind: str  # how the number is written: percent | ratio | small | plain | decibel
    best: str
    table: str = ""
    column: str = ""
    worst: str = "min"  # which end of the column is the worst sample


SCORES = (
    Score(key="x2t_exact", task="x2t", title="Identical answers", kind="percent", best="100 %",
          meaning="Share of answers that are the bf16 answer, character for character."),
    Score(key="x2t_levenshtein", task="x2t", title="Character similarity", kind="ratio", best="1",
          meaning="1 minus the edits that turn one answer into the other, per character (Levenshtein).",
          table="answers", column="levenshtein"),
    Score(key="x2t_difflib", task="x2t", title="Sequence similarity", kind="ratio", best="1",
          meaning="Share of the text that lies in common runs of characters (difflib ratio).",
          table="answers", column="difflib"),
    Score(key="x2t_jaccard", task="x2t", title="Word overlap", kind="ratio", best="1",
          meaning="Words used by both answers, of the words used by either (Jaccard).",
          table="answers", column="jaccard"),
    Score(key="top1", task="x2t", title="Same next token", kind="percent", best="100 %",
          meaning="How often both models put the same token first, when both are led along the bf16 answer.",
          table="forced", column="top1"),
    Score(key="kl", task="x2t", title="KL divergence", kind="small", best="0",
          meaning="Information lost per token, in nats, between the two next-token distributions.",
          table="forced", column="kl", worst="max"),
    Score(key="perplexity_baseline", task="x2t", title="Perplexity, bf16", kind="plain", best="1",
          meaning="How many tokens bf16 hesitates between, on its own answers.",
          table="forced", column="perplexity_baseline", worst="max"),
    Score(key="perplexity_int4", task="x2t", title="Perplexity, {label}", kind="plain", best="as bf16",
          meaning="The same for the quantized model, on the same bf16 answers.",
          table="forced", column="perplexity_int4", worst="max"),
    Score(key="velocity_relative_l2", task="t2i", title="Velocity error", kind="small", best="0",
          meaning="Size of the error of one denoising step's output, relative to it, on the bf16 trajectory.",
          table="velocity", column="relative_l2", worst="max"),
    Score(key="velocity_guided_relative_l2", task="t2i", title="Velocity error, guided", kind="small", best="0",
          meaning="The same after classifier-free guidance, which enlarges small differences.",
          table="velocity", column="guided_relative_l2", worst="max"),
    Score(key="velocity_cosine", task="t2i", title="Velocity direction", kind="plain", best="1",
          meaning="Cosine between the two outputs of one denoising step: 1 is the same direction.",
          table="velocity", column="cosine"),
    Score(key="latent_relative_l2", task="t2i", title="Final latent error", kind="small", best="0",
          meaning="Relative error of the finished latent, each model on its own trajectory from the same noise.",
          table="pictures", column="latent_relative_l2", worst="max"),
    Score(key="psnr", task="t2i", title="Picture PSNR", kind="decibel", best="100 dB",
          meaning="Pixel difference of the decoded pictures, in decibels; 100 dB stands for identical.",
          table="pictures", column="psnr"),
    Score(key="ssim", task="t2i", title="Picture SSIM", kind="ratio", best="1",
          meaning="Likeness of local structure as the eye weighs it.",
          table="pictures", column="ssim"),
)  # fmt: skip

COLUMNS = {
    "answers": "name prompt reference baseline int4 exact levenshtein difflib jaccard "
    "reference_exact_baseline reference_exact_int4",
    "forced": "name tokens perplexity_baseline perplexity_int4 kl top1",
    "velocity": "name step timestep relative_l2 cosine guided_relative_l2 guided_cosine",
    "pictures": "name prompt latent_relative_l2 psnr ssim",
    "losses": "layer path fold family alpha loss chosen",
    "linears": "layer path name scheme group_size bits error_before error_after error_kind",
    "coverage": "task path layer site tokens",
}


class Findings:
    """Tables and totals of one `ReportJob`, in a fixed order.

    A table whose task was not evaluated (or whose stage kept none) is empty, with its columns.
    """

    def __init__(self, job: ReportJob):
        self.job = job
        self.meta = json.loads((job.packed / "awq_meta.json").read_text())
        self.metrics = json.loads((job.metrics / "metrics.json").read_text())
        # furthest apart first: a reader should not have to look for what went wrong
        self.answers = table("answers", [job.metrics]).sort_values(["levenshtein", "name"], ignore_index=True)
        self.pictures = table("pictures", [job.metrics]).sort_values(["psnr", "name"], ignore_index=True)
        self.forced = table("forced", [job.metrics]).sort_values("name", ignore_index=True)
        self.velocity = table("velocity", [job.metrics]).sort_values(["name", "step"], ignore_index=True)
        self.losses = table("losses", job.layers).sort_values(
            ["fold", "layer", "path", "family", "alpha"], ascending=[True, True, False, True, True], ignore_index=True
        )
        self.linears = table("linears", job.layers).sort_values(
            ["error_after", "name"], ascending=[False, True], ignore_index=True
        )
        self.coverage = table("coverage", [job.capture] if job.capture else [])

    @property
    def bits(self) -> int:
        return self.meta["n_bit"]

    @property
    def group_size(self) -> int:
        return self.meta["group_size"]

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    @property
    def bytes_source(self) -> int:
        return int(self.metrics["bytes_source"])

    @property
    def bytes_bf16(self) -> int:
        """The source's tensors at two bytes a value: the part of the saving that needs no quantization."""
        return 2 * int(self.job.checkpoint["parameters"])

    @property
    def bytes_packed(self) -> int:
        return int(self.metrics["bytes_packed"])

    @property
    def factor(self) -> float:
        return self.bytes_source / self.bytes_packed

    @cached_property
    def schemes(self) -> list[tuple[str, int]]:
        """Quantized linears per scheme, the most frequent first."""
        counts = Counter(entry["scheme"] for entry in self.meta["per_weight"].values())
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

    @cached_property
    def scores(self) -> list[dict]:
        """Rows of the scores table: the `Score`, its mean, and the worst sample's value and name where there is one."""
        rows = []
        for score in SCORES:
            mean = self.metrics.get(score.key)
            if mean is None or mean != mean or not self.metrics.get(f"samples_{score.task}", 0):
                continue
            samples = getattr(self, score.table) if score.table else pd.DataFrame()
            worst = None
            if len(samples):
                column = samples[score.column]
                row = samples.loc[column.idxmin() if score.worst == "min" else column.idxmax()]
                worst = (float(row[score.column]), row["name"])
            rows.append({"score": score, "title": score.title.format(label=self.label), "mean": mean, "worst": worst})
        return rows

    @cached_property
    def right(self) -> dict | None:
        """How many answers equal the reference answer, before and after; None where the samples have no reference."""
        known = self.answers[self.answers["reference"].fillna("").str.strip() != ""]
        if not len(known):
            return None
        before, after = known["reference_exact_baseline"].astype(bool), known["reference_exact_int4"].astype(bool)
        return {
            "of": len(known),
            "before": int(before.sum()),
            "after": int(after.sum()),
            "lost": int((before & ~after).sum()),
            "gained": int((~before & after).sum()),
        }

    @cached_property
    def same(self) -> int:
        return int(self.answers["exact"].astype(bool).sum())

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        parts = []
        if len(self.answers):
            parts.append(f"{self.same} of {len(self.answers)} answers identical to bf16")
        if len(self.pictures):
            parts.append(f"pictures {decibel(self.metrics['psnr'])} from bf16")
        parts.append(f"{self.factor:.2f} times smaller")
        return f"{self.bits} bits at group size {self.group_size}: {', '.join(parts)}."

    @cached_property
    def alphas(self) -> pd.DataFrame:
        """The chosen point of every curve; `first` is the loss at the first alpha of its curve."""
        curves = self.losses.groupby(["fold", "layer", "path", "family"], sort=False)["loss"]
        chosen = self.losses.assign(first=curves.transform("first"))[self.losses["chosen"].astype(bool)]
        return chosen.drop(columns="chosen").reset_index(drop=True)

    @cached_property
    def coverage_rows(self) -> list[dict]:
        """Per path and site: tokens of each task and of all in the layer that saw fewest, and whether they suffice."""
        rows = []
        per_layer = self.coverage.pivot_table(
            index=["path", "site", "layer"], columns="task", values="tokens", aggfunc="sum", fill_value=0
        )
        for (path, site), part in per_layer.groupby(level=["path", "site"]):
            total = part.sum(axis=1)
            at = total.idxmin()
            rows.append(
                {
                    "path": path,
                    "site": site,
                    "tasks": {task: int(part.loc[at, task]) for task in part.columns},
                    "total": int(total[at]),
                    "layer": int(at[2]),
                    "enough": bool(total[at] >= self.job.min_tokens),
                }
            )
        return sorted(rows, key=lambda row: ("und gen".find(row["path"]), SITE_ORDER.find(row["site"]), row["site"]))

    @property
    def settings(self) -> list[tuple[str, str]]:
        return flatten(self.job.settings)


SITE_ORDER = "qkv o gate_up down"


def table(name: str, folders: list[Path]) -> pd.DataFrame:
    """<name>.parquet of all folders under one another; empty with its columns where no folder keeps one."""
    parts = [pd.read_parquet(folder / f"{name}.parquet") for folder in folders if (folder / f"{name}.parquet").exists()]
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS[name].split())


def flatten(settings: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) in their own order."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            rows.append((f"{prefix}{key}", ", ".join(map(str, value))))
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def packed_files(job: ReportJob) -> list[tuple[str, int]]:
    """Name and bytes of the native layout's files; the artifact's own manifest is none of them."""
    return [(path.name, path.stat().st_size) for path in sorted(job.packed.glob("awq_*"))]
