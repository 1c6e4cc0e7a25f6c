"""Recipes side by side on one checkpoint:  python benchmarks/recipes.py [recipe=published,best] [bits=4,3]

Runs the sweep through the pipeline (what is common is done once; what is there is reused) and prints two tables, a row
a combination: scores of understanding (und) and generation (gen), +- their standard errors over samples, then one score
a task, KL for questions and guided velocity error for what is drawn. recipe= takes rows of `ablation.py` too. Any other
setting is passed on: `checkpoint=tiny_video evaluation.samples=64`.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
from ablation import ABLATION, overrides_of

SWEPT = {"recipe": "minmax,published,awq,fast,best", "group_size": "64,128", "bits": "4,3", "evaluation.samples": "64"}
SCORES = {
    "x2t_exact": "und same answers",
    "x2t_reference_exact_int4": "und right answers",
    "kl": "und KL",
    "kl_error": "+-",
    "top1": "und top-1",
    "velocity_relative_l2": "gen velocity error",
    "velocity_relative_l2_error": "+-",
    "velocity_guided_relative_l2": "gen guided",
    "latent_relative_l2": "gen latent error",
    "psnr": "gen PSNR dB",
    "ssim": "gen SSIM",
    "drawn_correct_int4": "gen as asked",
    "bytes_packed": "bytes",
}
TASK_SCORES = {"kl": "KL", "velocity_guided_relative_l2": "guided"}
HEADLINE = re.compile(
    r"^\S+, recipe (?P<recipe>\S+)( \(changed\))?, (?P<bits>\d) bits, group size (?P<group_size>\d+)$"
)
REPORT = re.compile(r"^report\s+(?P<path>\S.*)$")


def main(arguments: list[str]) -> None:
    settings = SWEPT | dict(word.split("=", 1) for word in arguments)
    labels = settings.pop("recipe").split(",")
    further = [f"{name}={value}" for name, value in settings.items()]
    shipped = [label for label in labels if label not in ABLATION]
    sweeps = [[f"recipe={','.join(shipped)}"]] if shipped else []
    sweeps += [overrides_of(label) for label in labels if label in ABLATION]
    runs = [run for sweep in sweeps for run in swept([*sweep, *further])]
    runs.sort(key=lambda run: (-int(run["bits"]), int(run["group_size"])))
    print(table(runs, SCORES))
    print(table(runs, task_columns(runs)))


def swept(words: list[str]) -> list[dict]:
    """The runs of one sweep, in order. Ends the script with its exit status where it fails."""
    command = [sys.executable, "-m", "flows.full_run", "-m", *words]
    print(" ".join(command[1:]), flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    runs: list[dict] = []
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := HEADLINE.match(line):
            runs.append(found.groupdict())
        elif found := REPORT.match(line):
            runs[-1]["metrics"] = metrics_of(Path(found["path"]).parent)
    if process.wait():
        sys.exit(process.returncode)
    return runs


def task_columns(runs: list[dict]) -> dict[str, str]:
    """Name of a task's score in metrics.json -> heading."""
    parts = {name: name.partition("/") for name in runs[0]["metrics"]}
    return {name: f"{task} {TASK_SCORES[score]}" for name, (task, _, score) in parts.items() if score in TASK_SCORES}


def metrics_of(report: Path) -> dict[str, float]:
    """The scores that a report artifact tells of, and standard errors of two of them."""
    upstream = json.loads((report / "manifest.json").read_text())["upstream"]
    folder = report.parents[1] / "evaluate" / upstream["evaluate"]
    return json.loads((folder / "metrics.json").read_text()) | errors_of(folder)


def errors_of(folder: Path) -> dict[str, float]:
    """Standard errors over samples: of the KL, a mean over tokens, and of the velocity error."""
    found = {}
    if (folder / "forced.parquet").is_file():
        samples = pd.read_parquet(folder / "forced.parquet")
        found["kl_error"] = error_of(samples["kl"], samples["tokens"])
    if (folder / "velocity.parquet").is_file():
        samples = pd.read_parquet(folder / "velocity.parquet").groupby("name")["relative_l2"].mean()
        found["velocity_relative_l2_error"] = error_of(samples, pd.Series(1.0, samples.index))
    return found


def error_of(values: pd.Series, weights: pd.Series) -> float:
    """Of a weighted mean."""
    share, count = weights / weights.sum(), len(values)
    off = values - (values * share).sum()
    return math.sqrt((share**2 * off**2).sum() * count / max(1, count - 1))


def table(runs: list[dict], columns: dict[str, str]) -> str:
    """Markdown, a row a run; columns that a run lacks are left out."""
    columns = {name: title for name, title in columns.items() if all(name in run["metrics"] for run in runs)}
    lines = ["| bits | group | recipe | " + " | ".join(columns.values()) + " |", "|---" * (3 + len(columns)) + "|"]
    for run in runs:
        values = " | ".join(written(run["metrics"][name]) for name in columns)
        lines.append(f"| {run['bits']} | {run['group_size']} | {run['recipe']} | {values} |")
    return "\n".join([*lines, ""])


def written(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    main(sys.argv[1:])
