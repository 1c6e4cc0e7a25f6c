"""`means`: the tables of a comparison -> one row a task and score, and a row over each path's samples.

    means({"answers": ..., "forced": ..., "velocity": ..., "pictures": ...})      task, path, score, samples, value

Understanding and generation are never mixed. Perplexities, KL and top-1 are over tokens, all else over samples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from lance_quant.model.request import TASKS, UNDERSTANDING

ALL = "all"  # stands for every task of a path
Tables = dict[str, pd.DataFrame]


class Mean(NamedTuple):
    """One score: its name within a task, the name of its mean over the path in metrics.json, where it comes from."""

    score: str
    overall: str
    table: str
    column: str
    average: Callable[[pd.DataFrame, str], float]


def by_sample(rows: pd.DataFrame, column: str) -> float:
    """nan where no sample has the score."""
    return float(rows[column].astype(float).mean())


def by_token(rows: pd.DataFrame, column: str) -> float:
    return float((rows[column] * rows["tokens"]).sum() / rows["tokens"].sum())


def geometric(rows: pd.DataFrame, column: str) -> float:
    return math.exp(float((np.log(rows[column]) * rows["tokens"]).sum() / rows["tokens"].sum()))


PATH_MEANS = {
    "understanding": (
        Mean("exact", "x2t_exact", "answers", "exact", by_sample),
        Mean("levenshtein", "x2t_levenshtein", "answers", "levenshtein", by_sample),
        Mean("difflib", "x2t_difflib", "answers", "difflib", by_sample),
        Mean("jaccard", "x2t_jaccard", "answers", "jaccard", by_sample),
        Mean("correct_baseline", "x2t_reference_exact_baseline", "answers", "reference_exact_baseline", by_sample),
        Mean("correct_int4", "x2t_reference_exact_int4", "answers", "reference_exact_int4", by_sample),
        Mean("perplexity_baseline", "perplexity_baseline", "forced", "perplexity_baseline", geometric),
        Mean("perplexity_int4", "perplexity_int4", "forced", "perplexity_int4", geometric),
        Mean("kl", "kl", "forced", "kl", by_token),
        Mean("top1", "top1", "forced", "top1", by_token),
    ),
    "generation": (
        Mean("velocity_relative_l2", "velocity_relative_l2", "velocity", "relative_l2", by_sample),
        Mean("velocity_cosine", "velocity_cosine", "velocity", "cosine", by_sample),
        Mean("velocity_guided_relative_l2", "velocity_guided_relative_l2", "velocity", "guided_relative_l2", by_sample),
        Mean("latent_relative_l2", "latent_relative_l2", "pictures", "latent_relative_l2", by_sample),
        Mean("psnr", "psnr", "pictures", "psnr", by_sample),
        Mean("ssim", "ssim", "pictures", "ssim", by_sample),
        Mean("correct_baseline", "drawn_correct_baseline", "pictures", "correct_baseline", by_sample),
        Mean("correct_int4", "drawn_correct_int4", "pictures", "correct_int4", by_sample),
    ),
}
SAMPLES = {"understanding": "answers", "generation": "pictures"}  # the table with a row a sample


def means(tables: Tables) -> pd.DataFrame:
    """Columns task ("all" over a path), path, score, samples, value; scores that no sample has are left out."""
    rows = []
    for path, wanted in PATH_MEANS.items():
        if SAMPLES[path] not in tables:
            continue
        tasks = [task for task in TASKS if (path == "understanding") == (task in UNDERSTANDING)]
        for task in (ALL, *tasks):
            of = {name: part if task == ALL else part[part["task"] == task] for name, part in tables.items()}
            if not len(of[SAMPLES[path]]):
                continue
            for mean in wanted:
                scored = of[mean.table].dropna(subset=[mean.column])
                if len(scored):
                    samples = int(scored["name"].nunique())
                    value = mean.average(scored, mean.column)
                    rows.append({"task": task, "path": path, "score": mean.score, "samples": samples, "value": value})
    return pd.DataFrame(rows, columns=["task", "path", "score", "samples", "value"])


def flat(table: pd.DataFrame) -> dict[str, float]:
    """The table as metrics.json holds it: overall names as in PATH_MEANS, a task's as <task>/<score>, and counts."""
    overall = {(path, mean.score): mean.overall for path, wanted in PATH_MEANS.items() for mean in wanted}
    out: dict[str, float] = {}
    for path in PATH_MEANS:
        part = table[(table["path"] == path) & (table["task"] == ALL)]
        out[f"samples_{path}"] = int(part["samples"].max()) if len(part) else 0
    for row in table.itertuples():
        name = overall[row.path, row.score] if row.task == ALL else f"{row.task}/{row.score}"
        out[name] = row.value
    for task, part in table[table["task"] != ALL].groupby("task", sort=False):
        out[f"{task}/samples"] = int(part["samples"].max())
    return out
