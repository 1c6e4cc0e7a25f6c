"""What a run found, read back from its artifacts: the one source of report.html, report.md and the model card."""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from lance_quant.checkpoint.layout import PATHS, SITES
from lance_quant.evaluation.means import ALL
from lance_quant.evaluation.names import PATH_TITLES, SCORES, TASK_COLUMNS, TASK_NAMES, counted
from lance_quant.evaluation.rendering import decibel
from lance_quant.evaluation.sensitivity import sensitivity
from lance_quant.model.request import TASKS


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
    calibrated_on: str = "scenes"  # sources of the samples, of names.SOURCE_NAMES
    evaluated_on: str = "scenes"
    min_tokens: int = 256  # a linear that saw fewer counts as not covered


COLUMNS = {
    "answers": "name task prompt reference baseline int4 exact levenshtein difflib jaccard "
    "reference_exact_baseline reference_exact_int4",
    "forced": "name task tokens perplexity_baseline perplexity_int4 kl top1",
    "velocity": "name task step timestep relative_l2 cosine guided_relative_l2 guided_cosine",
    "pictures": "name task prompt frames latent_relative_l2 psnr ssim correct_baseline correct_int4",
    "metrics": "task path score samples value",
    "losses": "layer path fold family alpha loss chosen",
    "ingredients": "layer path name ingredient error_kind error share weighed weighed_share",
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
        self.means = table("metrics", [job.metrics])
        # furthest apart first: a reader should not have to look for what went wrong
        self.answers = table("answers", [job.metrics]).sort_values(["levenshtein", "name"], ignore_index=True)
        self.pictures = table("pictures", [job.metrics]).sort_values(["psnr", "name"], ignore_index=True)
        self.forced = table("forced", [job.metrics]).sort_values("name", ignore_index=True)
        self.velocity = table("velocity", [job.metrics]).sort_values(["name", "step"], ignore_index=True)
        self.losses = table("losses", job.layers).sort_values(
            ["fold", "layer", "path", "family", "alpha"], ascending=[True, True, False, True, True], ignore_index=True
        )
        self.sensitivity = sensitivity(job.layers, job.recipe)
        self.ingredients = table("ingredients", job.layers)
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
            if mean is None or mean != mean or not self.metrics[f"samples_{score.path}"]:
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
    def by_task(self) -> list[dict]:
        """Per path the table with a row a task: headings, kinds, and rows of values, None where there is no such score.

        A column that no task has is left out; the last row is over all tasks where there are several.
        """
        out = []
        for path, part in self.means.groupby("path", sort=False):
            values = {(row.task, row.score): row.value for row in part.itertuples()}
            samples = part.groupby("task", sort=False)["samples"].max()
            columns = [column for column in TASK_COLUMNS[path] if (ALL, column[0]) in values]
            tasks = [task for task in TASKS if task in samples]
            tasks += [ALL] if len(tasks) > 1 else []
            rows = [
                {
                    "task": task,
                    "title": TASK_NAMES[task].title if task in TASK_NAMES else "All",
                    "samples": int(samples[task]),
                    "values": [values.get((task, score)) for score, _, _ in columns],
                }
                for task in tasks
            ]
            heads = [heading.format(label=self.label) for _, heading, _ in columns]
            kinds = [kind for _, _, kind in columns]
            out.append({"path": path, "title": PATH_TITLES[path], "heads": heads, "kinds": kinds, "rows": rows})
        return out

    @cached_property
    def samples(self) -> dict[str, int]:
        """Samples a task, in the order of TASKS."""
        counts = self.means[self.means["task"] != ALL].groupby("task")["samples"].max()
        return {task: int(counts[task]) for task in TASKS if task in counts}

    @property
    def measured_on(self) -> str:
        """`16 questions about pictures, 16 edited clips`."""
        return ", ".join(counted(task, count) for task, count in self.samples.items())

    @cached_property
    def right(self) -> dict | None:
        """How many answers equal the reference answer, before and after; None where the samples have no reference."""
        return judged(self.answers, "reference_exact")

    @cached_property
    def as_asked(self) -> dict | None:
        """How many pictures and clips show what was asked for, before and after; None where none can be judged."""
        return judged(self.pictures, "correct")

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
            clips = self.pictures["frames"] > 1
            drawn = "clips" if clips.all() else "pictures and clips" if clips.any() else "pictures"
            parts.append(f"{drawn} {decibel(self.metrics['psnr'])} from bf16")
        parts.append(f"{self.factor:.2f} times smaller")
        return f"{self.bits} bits at group size {self.group_size}: {', '.join(parts)}."

    @cached_property
    def alphas(self) -> pd.DataFrame:
        """The chosen point of every curve; `first` is the loss at the first alpha of its curve."""
        curves = self.losses.groupby(["fold", "layer", "path", "family"], sort=False)["loss"]
        chosen = self.losses.assign(first=curves.transform("first"))[self.losses["chosen"].astype(bool)]
        return chosen.drop(columns="chosen").reset_index(drop=True)

    @cached_property
    def linears(self) -> list[dict]:
        """Rows of the sensitivity table, the largest error first; `before`, `after`: weighed where gradients tell."""
        rows = []
        for row in self.sensitivity.to_pylist():
            kind = "error" if row["weighed_after"] is None else "weighed"
            rows.append(row | {"of": kind, "before": row[f"{kind}_before"], "after": row[f"{kind}_after"]})
        return sorted(rows, key=lambda row: (-row["after"], row["layer"], row["name"]))

    @property
    def weighs(self) -> bool:
        return any(row["of"] == "weighed" for row in self.linears)

    @cached_property
    def bought(self) -> dict | None:
        """What each ingredient took off plain rounding's error: names, and rows of mean shares, one a path and site,
        then one of the layers' outputs where kept sequences were run. None where the recipe has no ingredient.

        Shares are of weighed errors where gradients tell; `left`: what all of them left.
        """
        steps = self.ingredients[self.ingredients["ingredient"] != "minmax"]
        if not len(steps):
            return None
        names = list(steps["ingredient"].unique())
        sites = {row["name"]: row["site"] for row in self.linears} | {"layer": "layer"}
        shares = steps["weighed_share"].astype(float).fillna(steps["share"].astype(float))
        steps = steps.assign(site=steps["name"].map(sites), share=shares)
        means = steps.pivot_table(index=["path", "site"], columns="ingredient", values="share", aggfunc="mean")[names]
        keys = [*((path, site) for path in PATHS for site in SITES), ("both", "layer")]
        found = [(*key, means.loc[key]) for key in keys if key in means.index]
        rows = [{"path": p, "site": s, "shares": rounded(part), "left": 1 - part.sum()} for p, s, part in found]
        return {"ingredients": names, "rows": rows}

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
        return sorted(rows, key=lambda row: (PATHS.index(row["path"]), SITES.index(row["site"])))

    @property
    def settings(self) -> list[tuple[str, str]]:
        return flatten(self.job.settings)


def rounded(shares: pd.Series) -> list[float]:
    return [round(float(share), 3) + 0.0 for share in shares]  # no "-0.0 %"


def judged(rows: pd.DataFrame, column: str) -> dict | None:
    """Counts of samples that are right in bf16 and quantized, lost and gained between; None where none was judged."""
    known = rows.dropna(subset=[f"{column}_baseline", f"{column}_int4"])
    if not len(known):
        return None
    before, after = known[f"{column}_baseline"].astype(bool), known[f"{column}_int4"].astype(bool)
    return {
        "of": len(known),
        "before": int(before.sum()),
        "after": int(after.sum()),
        "lost": int((before & ~after).sum()),
        "gained": int((~before & after).sum()),
    }


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
