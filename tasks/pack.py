"""pack: the searched layers -> one folder in the native layout, streamed layer by layer."""

from dataclasses import asdict
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from lance_quant.calibration.config import calibrated_tasks
from lance_quant.checkpoint.layout import open_checkpoint
from tasks.config import RunConfig
from tasks.stage import Progress, as_state
from tasks.store import Artifact, Identity, Store

REVISION = 1


@task(cache_policy=NO_CACHE)
def pack(cfg: RunConfig, loaded: Artifact, searched: list[Artifact]) -> Artifact:
    """The recipe goes into the key by name too: the packed metadata says it."""
    calibrated = calibrated_tasks(cfg.calibration, loaded.summary["layout"]) if cfg.recipe.needs_capture else []
    identity = Identity(
        stage="pack",
        revision=REVISION,
        upstream={"load": loaded.key, "search": [layer.key for layer in searched]},
        config={"recipe": asdict(cfg.recipe), "group_size": cfg.group_size, "bits": cfg.bits}
        | {"tasks_calibrated": calibrated},
    )

    def build(out: Path) -> dict:
        from lance_quant.awq import pack as library

        job = library.PackJob(
            checkpoint=open_checkpoint(cfg.checkpoint),
            layers=[layer.path for layer in searched],
            recipe=cfg.recipe,
            group_size=cfg.group_size,
            bits=cfg.bits,
            tasks_calibrated=calibrated,
        )
        return asdict(library.pack(job, out, Progress("pack")))

    return as_state(Store(cfg.artifacts).keep(identity, build))
