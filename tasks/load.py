"""load: checkpoint folder -> layout, 504 targets, fingerprint. Nothing is copied, and no file is hashed twice."""

from dataclasses import asdict
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from lance_quant.awq.limits import check_group_size
from lance_quant.checkpoint.layout import Checkpoint, open_checkpoint, targets
from tasks.config import RunConfig
from tasks.stage import as_state
from tasks.store import Artifact, Identity, Store

REVISION = 1


@task(cache_policy=NO_CACHE)
def load(cfg: RunConfig) -> Artifact:
    """Check every key, shape and dtype (headers only, so also on a hit) and name the checkpoint by its bytes."""
    from lance_quant.checkpoint.inspect import inspect_checkpoint

    checkpoint = open_run(cfg)
    summary = asdict(inspect_checkpoint(checkpoint, hash_cache=Path(cfg.artifacts).absolute() / "hashes.json"))
    identity = Identity(
        stage="load",
        revision=REVISION,
        files={role: file["sha256"] for role, file in summary["files"].items()},
    )
    for file in summary["files"].values():
        file["path"] = Path(file["path"]).name  # an artifact says what it was made of, not where that lay
    return as_state(Store(cfg.artifacts).keep(identity, lambda out: summary))


def open_run(cfg: RunConfig) -> Checkpoint:
    """The run's checkpoint, once it is there and the group size suits it."""
    checkpoint = open_checkpoint(cfg.checkpoint)
    if not cfg.recipe.group_fallback:
        check_group_size(targets(checkpoint.config), cfg.group_size)
    return checkpoint
