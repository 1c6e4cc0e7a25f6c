"""Recipes side by side on one checkpoint:  python benchmarks/recipes.py [recipe=minmax,published,awq] [bits=4,3]

Runs the sweep through the pipeline (what is common is done once; what is there is reused) and prints a table, a row a
combination. Any other setting is passed on: `checkpoint=tiny evaluation.samples=64 artifacts=...`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

SWEPT = {"recipe": "minmax,published,awq", "group_size": "64,128", "bits": "4,3", "evaluation.samples": "64"}
SCORES = {
    "x2t_exact": "same answers",
    "x2t_reference_exact_int4": "right answers",
    "kl": "KL",
    "top1": "top-1",
    "velocity_relative_l2": "velocity error",
    "velocity_guided_relative_l2": "guided",
    "latent_relative_l2": "latent error",
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "bytes_packed": "bytes",
}
HEADLINE = re.compile(r"^\S+, recipe (?P<recipe>\S+), (?P<bits>\d) bits, group size (?P<group_size>\d+)$")
REPORT = re.compile(r"^report\s+(?P<path>\S.*)$")


def main(arguments: list[str]) -> None:
    settings = SWEPT | dict(word.split("=", 1) for word in arguments)
    command = [sys.executable, "-m", "flows.full_run", "-m", *(f"{name}={value}" for name, value in settings.items())]
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
    print(table(runs))


def metrics_of(report: Path) -> dict[str, float]:
    """The scores that a report artifact tells of."""
    upstream = json.loads((report / "manifest.json").read_text())["upstream"]
    return json.loads((report.parents[1] / "evaluate" / upstream["evaluate"] / "metrics.json").read_text())


def table(runs: list[dict]) -> str:
    """Markdown, most bits and smallest groups first."""
    lines = ["| bits | group | recipe | " + " | ".join(SCORES.values()) + " |", "|---" * (3 + len(SCORES)) + "|"]
    for run in sorted(runs, key=lambda run: (-int(run["bits"]), int(run["group_size"]))):
        values = " | ".join(f"{run['metrics'][name]:.4g}" if name != "bytes_packed" else str(run["metrics"][name])
                            for name in SCORES)  # fmt: skip
        lines.append(f"| {run['bits']} | {run['group_size']} | {run['recipe']} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
