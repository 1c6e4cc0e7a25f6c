"""report: scores, answers and pictures side by side -> report.html, report.md, and the folder to publish.

report.html   report.md   pictures/   README.md   sensitivity.parquet
model/        the packed files (hard links, or copies where the file system has none) with README.md, the model card
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.capture import uncovered
from tasks.config import RunConfig
from tasks.stage import as_state
from tasks.store import MANIFEST, Artifact, Identity, Store

REVISION = 3
MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The artifacts that a report tells of."""

    loaded: Artifact
    captured: Artifact
    packed: Artifact
    reference: Artifact
    scored: Artifact
    searched: list[Artifact]


@task(cache_policy=NO_CACHE)
def report(cfg: RunConfig, measured: Measured) -> Artifact:
    """Write the report from the artifacts alone; nothing is measured here."""
    m = measured
    settings = described(cfg)
    identity = Identity(
        stage="report",
        revision=REVISION,
        upstream={"load": m.loaded.key, "capture": m.captured.key, "pack": m.packed.key}
        | {"baseline": m.reference.key, "evaluate": m.scored.key, "search": [layer.key for layer in m.searched]},
        config=settings,
    )

    def build(out: Path) -> dict:
        from lance_quant.evaluation import report as library

        job = library.ReportJob(
            name=cfg.checkpoint.name,
            recipe=cfg.recipe.name,
            checkpoint=m.loaded.summary,
            capture=m.captured.path,
            layers=[layer.path for layer in m.searched],
            packed=m.packed.path,
            baseline=m.reference.path,
            metrics=m.scored.path,
            settings=settings,
            calibrated_on=cfg.calibration.source,
            evaluated_on=cfg.evaluation.source,
            min_tokens=cfg.calibration.min_tokens,
        )
        summary = asdict(library.write_report(job, out)) | {"uncovered": uncovered(cfg, m.captured)}
        gather(m.packed.path, out / summary["card"], out / MODEL)
        return summary

    return as_state(Store(cfg.artifacts).keep(identity, build))


def described(cfg: RunConfig) -> dict:
    """The settings that shape the result: not where things lie, nor on what they ran."""
    settings = asdict(cfg)
    for place in ("runner", "artifacts"):
        del settings[place]
    for place in ("path", "vit", "vae"):
        del settings["checkpoint"][place]
    for place in ("path", "examples", "memory_gb"):
        del settings["calibration"][place]
    return settings


def gather(packed: Path, card: Path, model: Path) -> None:
    """One folder that can be published as it is."""
    model.mkdir()
    for file in sorted(packed.iterdir()):
        if file.name != MANIFEST:
            _link_or_copy(file, model / file.name)
    shutil.copyfile(card, model / card.name)


def _link_or_copy(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # file systems without hard links, such as exFAT and some network mounts
        shutil.copyfile(file, place)
