"""The pipeline as a Prefect flow: it reads from top to bottom as the diagram in README.md.

Import it after `flows.server.prepare()`: Prefect reads its environment once.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import httpx
from prefect import flow
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import ThreadPoolTaskRunner

from lance_quant.errors import LanceQuantError
from tasks.capture import capture, require_coverage
from tasks.config import RunConfig
from tasks.evaluate import baseline, evaluate
from tasks.load import load
from tasks.pack import pack
from tasks.report import MODEL, Measured, report
from tasks.search import every_layer, search_layers
from tasks.stage import Devices, Stopped, finished
from tasks.store import Artifact, Store

log = logging.getLogger("lance_quant")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run leaves for the user."""

    html: Path
    model: Path
    headline: str
    metrics: dict


@flow(name="full-run", persist_result=False)
def full_run(cfg: RunConfig) -> Outcome:
    """Load, capture, search, pack, evaluate, report."""
    devices = Devices.of(cfg.runner)

    loaded = load.submit(cfg)
    captured = capture.submit(cfg, loaded, devices)
    checkpoint, seen = in_order(loaded, captured)
    require_coverage(cfg, seen)

    searched = search_layers(cfg, checkpoint.summary["layers"], loaded, captured, devices)
    reference = baseline.submit(cfg, loaded, devices)
    every_layer(searched)
    packed = pack.submit(cfg, loaded, searched)

    scored = evaluate.submit(cfg, loaded, packed, reference, devices)
    measured = Measured(
        loaded=loaded, captured=captured, searched=searched, packed=packed, reference=reference, scored=scored
    )
    written = report.submit(cfg, measured)
    *_, scores, pages = in_order(reference, packed, scored, written)
    return outcome(scores, pages)


def outcome(scores: Artifact, pages: Artifact) -> Outcome:
    """From the artifacts of evaluate and report."""
    return Outcome(
        html=pages.path / pages.summary["html"],
        model=pages.path / MODEL,
        headline=pages.summary["headline"],
        metrics=scores.summary["metrics"],
    )


def in_order(*futures: PrefectFuture) -> list[Artifact]:
    """Results, upstream first: raises what failed, where a later future would only say that it never ran."""
    return [future.result() for future in futures]


def run(cfg: RunConfig) -> Outcome:
    """The flow with as many threads as units of work at a time, for the command and the deployment alike.

    Once the report is there the run has succeeded, whatever becomes of the Prefect server. Raises LanceQuantError where
    the server is lost before.
    """
    hush_bad_input()
    Store(cfg.artifacts).sweep()
    finished.clear()
    workers = len(Devices.of(cfg.runner).names)
    try:
        return full_run.with_options(task_runner=ThreadPoolTaskRunner(max_workers=workers))(cfg)
    except Exception as error:
        if "report" in finished:
            log.warning("Prefect could not close this run (%s), which is complete", type(error).__name__)
            return outcome(finished["evaluate"], finished["report"])
        if isinstance(error, httpx.HTTPError):
            raise LanceQuantError(
                f"the Prefect server at {PREFECT_API_URL.value()} was lost ({type(error).__name__}): finished stages "
                "and layers are kept, run the same command to go on"
            ) from error
        raise


class OneSentence(logging.Filter):
    """Bad input and a stop are logged as their sentence; Prefect would add a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, LanceQuantError | Stopped):
            record.msg, record.args, record.exc_info = str(error), (), None
        return True


def hush_bad_input() -> None:
    """Install `OneSentence` where Prefect logs what flows and tasks raise."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, OneSentence) for known in logger.filters):
            logger.addFilter(OneSentence())
