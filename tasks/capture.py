"""capture: checkpoint and calibration samples -> what each input site of each layer and path sees, as Parquet."""

from dataclasses import asdict
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.errors import LanceQuantError
from tasks.config import RunConfig, pixel_edges, read_fields
from tasks.stage import Devices, Progress, as_state, log
from tasks.store import Artifact, Identity, Store

REVISION = 1
NAMED = 3


@task(cache_policy=NO_CACHE)
def capture(cfg: RunConfig, loaded: Artifact, devices: Devices) -> Artifact:
    """One pass for every group size, bit width and recipe: none of them is in the key."""
    identity = Identity(
        stage="capture",
        revision=REVISION,
        upstream={"load": loaded.key},
        config=read_fields(cfg.calibration) | pixel_edges(cfg.checkpoint),
    )

    def build(out: Path) -> dict:
        from lance_quant.calibration import capture as library

        checkpoint = open_checkpoint(cfg.checkpoint)
        with devices.lease(checkpoint.config.hidden_size) as device:
            return asdict(library.capture(checkpoint, cfg.calibration, out, device, Progress("capture")))

    return as_state(Store(cfg.artifacts).keep(identity, build))


def require_coverage(cfg: RunConfig, captured: Artifact) -> None:
    """Name the linears that saw too few tokens; only `allow_uncovered=true` lets a run go on with them."""
    uncovered = captured.summary["uncovered"]
    for name in uncovered:
        log.warning("%s saw fewer than %d tokens in calibration", name, cfg.calibration.min_tokens)
    if uncovered and not cfg.allow_uncovered:
        some = ", ".join(uncovered[:NAMED]) + (" ..." if len(uncovered) > NAMED else "")
        raise LanceQuantError(
            f"{len(uncovered)} linears saw fewer than calibration.min_tokens={cfg.calibration.min_tokens} tokens "
            f"({some}): raise calibration.samples or go on with allow_uncovered=true"
        )
