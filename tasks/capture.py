"""capture: checkpoint and calibration samples -> what each input site of each layer sees, and gradients, as Parquet."""

from dataclasses import asdict
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from lance_quant.calibration import BUNDLED_REVISION
from lance_quant.calibration.config import TEXT, calibrated_tasks, weights_of
from lance_quant.checkpoint.layout import PATHS, open_checkpoint, targets
from lance_quant.errors import LanceQuantError
from tasks.config import RunConfig, read_fields, sample_fields
from tasks.stage import Devices, Progress, as_state, log
from tasks.store import Artifact, Identity, Store

REVISION = 7
NAMED = 3


@task(cache_policy=NO_CACHE)
def capture(cfg: RunConfig, loaded: Artifact, devices: Devices) -> Artifact:
    """One capture for every group size, bit width and recipe: none of them is in the key.

    Nor is what counts as covered, how much memory was used, and where the user's own samples lie: their content is.
    """
    from lance_quant.calibration.samples import fingerprint

    opened = open_checkpoint(cfg.checkpoint)
    tasks = calibrated_tasks(cfg.calibration, opened.layout)
    settings = read_fields(cfg.calibration, "min_tokens", "memory_gb", "path", "examples", "weights")
    identity = Identity(
        stage="capture",
        revision=REVISION,
        upstream={"load": loaded.key},
        config=settings
        | {"tasks": tasks, "weights": weights_of(cfg.calibration, tasks)}
        | sample_fields(cfg.checkpoint)
        | ({"bundled": BUNDLED_REVISION} if cfg.calibration.source == "bundled" else {}),
        files=fingerprint(opened, cfg.calibration),
    )

    def build(out: Path) -> dict:
        from lance_quant.calibration import capture as library

        with devices.lease(opened.config.hidden_size) as device:
            return asdict(library.capture(opened, cfg.calibration, out, device, Progress("capture")))

    return as_state(Store(cfg.artifacts).keep(identity, build))


def tokens_seen(captured: Artifact, layout: str) -> dict[str, int]:
    """Path -> tokens over all tasks: every linear of a path sees the same ones."""
    paths = ("und",) if layout == "text" else PATHS  # a text model's generation twins receive no token
    tokens = captured.summary["tokens"].values()
    return {path: sum(of_task[path] for of_task in tokens) for path in paths}


def uncovered(cfg: RunConfig, captured: Artifact) -> list[str]:
    """Linears that saw fewer than `min_tokens` tokens."""
    opened = open_checkpoint(cfg.checkpoint)
    few = [path for path, seen in tokens_seen(captured, opened.layout).items() if seen < cfg.calibration.min_tokens]
    return [target.name for target in targets(opened.config) if target.path in few]


def require_coverage(cfg: RunConfig, captured: Artifact) -> None:
    """Name the linears that saw too few tokens; only `allow_uncovered=true` lets a run go on with them. Name the tasks
    too that kept no whole sequence, where others did."""
    kept = captured.summary.get("sequences", {})
    without = [task for task, count in kept.items() if not count]
    if any(kept.values()) and without:
        log.warning(
            "no whole sequence of %s fits calibration.sequence_tokens=%d",
            ", ".join(without),
            cfg.calibration.sequence_tokens,
        )
    names = uncovered(cfg, captured)
    for name in names:
        log.warning("%s saw fewer than %d tokens in calibration", name, cfg.calibration.min_tokens)
    if names and not cfg.allow_uncovered:
        some = ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")
        raise LanceQuantError(
            f"{len(names)} linears saw fewer than calibration.min_tokens={cfg.calibration.min_tokens} tokens "
            f"({some}): {more_tokens(cfg, captured)} or go on with allow_uncovered=true"
        )


def more_tokens(cfg: RunConfig, captured: Artifact) -> str:
    """What brings uncovered linears their tokens: more samples do nothing for a path that none of them takes."""
    if all(tokens_seen(captured, open_checkpoint(cfg.checkpoint).layout).values()):
        return "raise calibration.samples"
    if cfg.calibration.source == TEXT:
        return "plain text never reaches what draws, so calibrate on what does (calibration=bundled)"
    return "no task of calibration.tasks draws, so add one that does (t2i)"
