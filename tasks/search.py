"""search: one layer (both paths) -> its codes, scales, folded norms and loss curves. One task run a layer."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import UnfinishedRun
from prefect.futures import PrefectFuture

from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.errors import LanceQuantError
from tasks.config import RunConfig, read_fields
from tasks.stage import Devices, Stopped, as_state
from tasks.store import Artifact, Identity, Store

REVISION = 6


def may_pass(task: Any, run: Any, state: Any) -> bool:
    """Try again after a fault of a device, not after bad input or a request to stop."""
    return not isinstance(state.result(raise_on_failure=False), LanceQuantError | Stopped)


@task(
    cache_policy=NO_CACHE,
    task_run_name="search-{layer}",
    retries=1,
    retry_delay_seconds=1,
    retry_condition_fn=may_pass,
)
def search(
    cfg: RunConfig,
    layer: int,
    loaded: Artifact,
    captured: Artifact,
    devices: Devices,
    before: Artifact | None = None,
) -> Artifact:
    """A recipe that looks at no activations is not tied to a capture. before: the layer before, of sequential ones."""
    from_capture = cfg.recipe.needs_capture
    upstream = {"load": loaded.key} | ({"capture": captured.key} if from_capture else {})
    identity = Identity(
        stage="search",
        revision=REVISION,
        upstream=upstream | ({"before": before.key} if before else {}),
        config={"layer": layer, "recipe": read_fields(cfg.recipe), "group_size": cfg.group_size}
        | {"bits": cfg.bits, "seed": cfg.seed},
    )

    def build(out: Path) -> dict:
        from lance_quant.awq import search as library

        checkpoint = open_checkpoint(cfg.checkpoint)
        with devices.lease(checkpoint.config.hidden_size) as device:
            job = library.LayerJob(
                checkpoint=checkpoint,
                layer=layer,
                capture=captured.path if from_capture else None,
                recipe=cfg.recipe,
                group_size=cfg.group_size,
                bits=cfg.bits,
                seed=cfg.seed,
                before=before.path if before else None,
            )
            return asdict(library.search_layer(job, out, device))

    return as_state(Store(cfg.artifacts).keep(identity, build))


def search_layers(
    cfg: RunConfig, layers: int, loaded: PrefectFuture, captured: PrefectFuture, devices: Devices
) -> list[PrefectFuture]:
    """Every layer's search: side by side, or one after another where the recipe is sequential."""
    searched: list[PrefectFuture] = []
    for layer in range(layers):
        before = searched[-1] if searched and cfg.recipe.sequential else None
        searched.append(search.submit(cfg, layer, loaded, captured, devices, before))
    return searched


class LayersFailed(LanceQuantError):
    """Some layers of the search failed; the others are kept."""


def result_of(future: PrefectFuture) -> Artifact | BaseException:
    """What a finished task returned or raised; UnfinishedRun of one that waited for another that failed."""
    try:
        return future.result(raise_on_failure=False)
    except UnfinishedRun as never:
        return never


def every_layer(futures: Sequence[PrefectFuture]) -> list[Artifact]:
    """Wait for all layers, then raise once for those that failed; bad input, which no second try mends, as it is."""
    for future in futures:
        future.wait()
    results = [result_of(future) for future in futures]
    # later layers of a sequential recipe never ran
    failed = {
        layer: result
        for layer, result in enumerate(results)
        if isinstance(result, BaseException) and not isinstance(result, UnfinishedRun)
    }
    if failed:
        first = next(iter(failed.values()))
        if all(isinstance(fault, LanceQuantError) for fault in failed.values()):
            raise first
        kept = "those before are" if any(isinstance(one, UnfinishedRun) for one in results) else "the others are"
        raise LayersFailed(
            f"search failed in {'layers' if len(failed) > 1 else 'layer'} {', '.join(map(str, failed))} of "
            f"{len(results)} ({type(first).__name__}: {first}): {kept} kept, the same command goes on from there"
        )
    return results
