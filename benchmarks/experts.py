"""Which expert bears 4 bits less?  python benchmarks/experts.py [checkpoint=tiny_video] [bits=4] [group_size=64]

Rounds the linears of the understanding experts alone, of the generation experts alone, and of both, to nearest and
without any scale (recipe minmax), and compares each model with the bf16 one as the pipeline's evaluation does. Words
are those of full_run. Prints a row a model.
"""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from lance_quant.awq.grid import grid_of, quantize
from lance_quant.checkpoint.layout import PATHS, Checkpoint, open_checkpoint, targets
from lance_quant.devices import choose_device
from lance_quant.errors import LanceQuantError
from lance_quant.evaluation import compare as comparing
from lance_quant.evaluation.baseline import run_baseline
from lance_quant.model.lance import Lance, load_lance
from tasks.config import RunConfig, compose_config

SCORES = {"x2t_exact": "same answers", "kl": "KL", "velocity_relative_l2": "velocity error"}
SCORES |= {"velocity_guided_relative_l2": "guided", "psnr": "PSNR dB"}


def main(words: list[str]) -> None:
    words = words if any(word.startswith("checkpoint=") for word in words) else ["checkpoint=tiny_video", *words]
    cfg = compose_config([*words, "recipe=minmax"])
    checkpoint, device = open_checkpoint(cfg.checkpoint), choose_device("auto")
    print("| bits | group | rounded experts | " + " | ".join(SCORES.values()) + " |", flush=True)
    print("|---" * (len(SCORES) + 3) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        baseline = Path(folder) / "baseline"
        baseline.mkdir()
        run_baseline(checkpoint, cfg.evaluation, baseline, device)
        for paths in (("und",), ("gen",), PATHS):
            out = Path(folder) / "-".join(paths)
            out.mkdir()
            lance = rounded(checkpoint, cfg, paths, device)
            job = comparing.CompareJob(checkpoint=checkpoint, packed=out, baseline=baseline, evaluation=cfg.evaluation)
            with mock.patch.object(comparing, "load_packed_lance", lambda *_, lance=lance: lance):
                metrics = comparing.compare(job, out, device).metrics
            values = " | ".join(f"{metrics[name]:.4g}" if name in metrics else "" for name in SCORES)
            print(f"| {cfg.bits} | {cfg.group_size} | {' and '.join(paths)} | {values} |", flush=True)


def rounded(checkpoint: Checkpoint, cfg: RunConfig, paths: tuple[str, ...], device: str) -> Lance:
    """The bf16 model with the linears of some paths rounded to nearest."""
    lance = load_lance(checkpoint, device)
    grid = grid_of(cfg.recipe, cfg.bits, cfg.group_size)
    for target in targets(checkpoint.config):
        if target.path in paths:
            weight = lance.get_submodule(target.name).weight
            with torch.no_grad():
                weight.copy_(quantize(weight.float(), grid).dequantize())
    return lance


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LanceQuantError as error:
        sys.exit(f"error: {error}")
