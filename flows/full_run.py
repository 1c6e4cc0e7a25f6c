"""Quantize a Lance checkpoint to 4 bits and measure how close it came.

    python -m flows.full_run                                      # the trained checkpoint that ships
    python -m flows.full_run checkpoint=image checkpoint.path=/models/Lance_3B recipe=published group_size=64
    python -m flows.full_run -m recipe=minmax,published,awq       # a sweep; stages in common are done once

The same command goes on where a run was stopped. Every key: docs/configuration.md.
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flows import server
from flows.command import interruptible, one_sentence, run_command
from tasks.config import CONF, RunConfig, register, resolve

KEY_SCORES = {
    "x2t_exact": "identical answers",
    "kl": "KL",
    "top1": "top-1",
    "velocity_relative_l2": "velocity error",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "drawn_correct_int4": "drawn as asked",
}
TASK_SCORES = {"exact": "identical", "psnr": "dB"}  # what is told of a task, by its kind


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    with one_sentence():
        cfg = resolve(composed)
        server.prepare()
        child = server.start(Path(HydraConfig.get().runtime.output_dir) / "server.log")

        # while the server starts; Prefect reads its address when it is imported
        from flows.pipeline import run
        from tasks.load import open_run
        from tasks.stage import Devices, stop

        open_run(cfg)
        Devices.of(cfg.runner)
        if child:
            child.wait()
        with interruptible(stop):
            tell(cfg, run(cfg))


def tell(cfg: RunConfig, outcome) -> None:
    """The last lines of a run: how close it came, and where things are."""
    scores = [f"{title} {outcome.metrics[key]:.4g}" for key, title in KEY_SCORES.items() if key in outcome.metrics]
    print(f"\n{cfg.checkpoint.name}, recipe {cfg.recipe.name}, {cfg.bits} bits, group size {cfg.group_size}")
    print(outcome.headline)
    print(f"scores   {', '.join(scores)}")
    if tasks := task_scores(outcome.metrics):
        print(f"tasks    {', '.join(tasks)}")
    print(f"report   {outcome.html}")
    print(f"model    {outcome.model}", flush=True)


def task_scores(metrics: dict) -> list[str]:
    """One score a task: `x2t_image 0.938 identical`, `t2v 31.2 dB`."""
    parts = [(*key.partition("/"), value) for key, value in metrics.items()]
    return [f"{task} {value:.3g} {TASK_SCORES[score]}" for task, _, score, value in parts if score in TASK_SCORES]


if __name__ == "__main__":
    register()
    run_command(main)
