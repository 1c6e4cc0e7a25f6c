"""load: checkpoint folder -> layout, 504 targets, fingerprint. Nothing is copied, and no file is hashed twice."""

from dataclasses import asdict
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.limits import check_group_size
from lance_quant.checkpoint.layout import Checkpoint, Target, open_checkpoint, targets
from lance_quant.evaluation.config import evaluated_tasks
from lance_quant.model.config import LanceConfig
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

    def build(out: Path) -> dict:
        from lance_quant.model.vae import check_vae

        if checkpoint.vae_file is not None:
            check_vae(checkpoint.vae_file)  # on a miss only: it imports diffusers, and the file's hash is in the key
        return summary

    return as_state(Store(cfg.artifacts).keep(identity, build))


def open_run(cfg: RunConfig) -> Checkpoint:
    """The run's checkpoint, once it is there and the other settings suit it. Raises LanceQuantError."""
    checkpoint = open_checkpoint(cfg.checkpoint)
    check_group_size(fixed_groups(cfg.recipe, checkpoint.config), cfg.group_size)
    evaluated_tasks(cfg.evaluation, checkpoint.layout)
    return checkpoint


def fixed_groups(recipe: RecipeConfig, config: LanceConfig) -> list[Target]:
    """The linears that take the group size as it is: with `group_fallback` those behind a searched fold only."""
    if not recipe.group_fallback:
        return targets(config)
    from lance_quant.awq.topology import resolve

    return [target for fold in resolve(config, 0, recipe.folds) for target in fold.consumers]
