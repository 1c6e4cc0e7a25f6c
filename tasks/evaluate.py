"""baseline: bf16 answers and pictures, once for all recipes. evaluate: the packed model against them."""

from dataclasses import asdict
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from lance_quant.calibration import BUNDLED_REVISION
from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.evaluation.config import evaluated_tasks
from tasks.config import RunConfig, read_fields, sample_fields
from tasks.stage import Devices, Progress, as_state
from tasks.store import Artifact, Identity, Store

BASELINE_REVISION = 4
REVISION = 3


@task(cache_policy=NO_CACHE)
def baseline(cfg: RunConfig, loaded: Artifact, devices: Devices) -> Artifact:
    """Depends on the checkpoint and the evaluation settings only, so that a sweep shares it."""
    identity = Identity(
        stage="baseline",
        revision=BASELINE_REVISION,
        upstream={"load": loaded.key},
        config=measured_fields(cfg, loaded),
    )

    def build(out: Path) -> dict:
        from lance_quant.evaluation import baseline as library

        checkpoint = open_checkpoint(cfg.checkpoint)
        with devices.lease(checkpoint.config.hidden_size) as device:
            return asdict(library.run_baseline(checkpoint, cfg.evaluation, out, device, Progress("baseline")))

    return as_state(Store(cfg.artifacts).keep(identity, build))


@task(cache_policy=NO_CACHE)
def evaluate(cfg: RunConfig, loaded: Artifact, packed: Artifact, reference: Artifact, devices: Devices) -> Artifact:
    """Run the packed model on the baseline's answers and trajectories."""
    identity = Identity(
        stage="evaluate",
        revision=REVISION,
        upstream={"load": loaded.key, "pack": packed.key, "baseline": reference.key},
        config=measured_fields(cfg, loaded),
    )

    def build(out: Path) -> dict:
        from lance_quant.evaluation import compare as library

        checkpoint = open_checkpoint(cfg.checkpoint)
        with devices.lease(checkpoint.config.hidden_size) as device:
            job = library.CompareJob(
                checkpoint=checkpoint,
                packed=packed.path,
                baseline=reference.path,
                evaluation=cfg.evaluation,
            )
            return asdict(library.compare(job, out, device, Progress("evaluate")))

    return as_state(Store(cfg.artifacts).keep(identity, build))


def measured_fields(cfg: RunConfig, loaded: Artifact) -> dict:
    """What shapes samples and scores; `tasks: auto` counts as the tasks that it stands for."""
    settings = read_fields(cfg.evaluation) | sample_fields(cfg.checkpoint)
    settings["tasks"] = evaluated_tasks(cfg.evaluation, loaded.summary["layout"])
    if cfg.evaluation.source == "bundled":
        settings |= {"bundled": BUNDLED_REVISION, "clip_frames": cfg.checkpoint.frames}
    return settings
