"""One run as a page: report.html (self-contained), report.md with its pictures/, README.md (the model card).

    write_report(ReportJob(name="tiny", recipe="awq", checkpoint=..., layers=..., ...), Path("artifacts/report/<key>"))

The bytes depend on the artifacts and the settings alone: no time of day, no random ids, fixed order.
"""

import base64
import io
import shutil
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lance_quant.evaluation.card import write_card
from lance_quant.evaluation.charts import Line, line_chart, loss_panel
from lance_quant.evaluation.findings import Findings, ReportJob, packed_files
from lance_quant.evaluation.rendering import TEMPLATES, render

THUMBNAIL, PICTURE = 192, 512  # longest edge of an embedded input and of an embedded result, pixels
SHOWN_ANSWERS, SHOWN_PICTURES = 24, 24  # in report.html, furthest apart first; report.md lists all
GAIN = 8  # of the difference pictures
WORST = 10  # linears listed


@dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """File names inside the report's folder, and the result in one sentence."""

    html: str
    markdown: str
    card: str
    headline: str
    answers: int
    pictures: int
    bytes: int  # of report.html


def write_report(job: ReportJob, out: Path) -> ReportSummary:
    """Writes report.html, report.md, pictures/ and README.md into the existing folder `out`.

    Tasks that were not evaluated leave their sections out.
    """
    found = Findings(job)
    copy_pictures(found, out / "pictures")
    view = common_view(found)
    (out / "report.md").write_text(render("report.md.j2", view), encoding="utf-8")
    page = render("report.html.j2", {**view, **html_view(found)})
    (out / "report.html").write_text(page, encoding="utf-8")
    write_card(job, out / "README.md")
    return ReportSummary(
        html="report.html",
        markdown="report.md",
        card="README.md",
        headline=found.headline,
        answers=len(found.answers),
        pictures=len(found.pictures),
        bytes=len(page.encode()),
    )


def common_view(found: Findings) -> dict:
    """What both reports show."""
    return {
        "found": found,
        "job": found.job,
        "metrics": found.metrics,
        "answers": records(found.answers),
        "pictures": records(found.pictures),
        "forced": {row["name"]: row for row in records(found.forced)},
        "velocity": records(velocity_by_step(found)),
        "alphas": records(found.alphas),
        "linears": records(found.linears.head(WORST)),
        "files": packed_files(found.job),
    }


def html_view(found: Findings) -> dict:
    """What only the page shows: embedded pictures and charts."""
    job = found.job
    return {
        "style": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "thumbnails": {
            name: embedded(Image.open(path), THUMBNAIL)
            for name in found.answers["name"][:SHOWN_ANSWERS]
            if (path := job.baseline / "images" / f"{name}.png").exists()
        },
        "differences": {row["name"]: word_difference(row["baseline"], row["int4"]) for row in records(found.answers)},
        "triples": {name: triple(found, name) for name in found.pictures["name"][:SHOWN_PICTURES]},
        "shown_answers": SHOWN_ANSWERS,
        "gain": GAIN,
        "velocity_chart": velocity_chart(found, "relative_l2", "relative L2 error"),
        "cosine_chart": velocity_chart(found, "cosine", "1 − cosine"),
        "loss_panels": loss_panels(found),
    }


def copy_pictures(found: Findings, folder: Path) -> None:
    """Inputs and results under names that report.md links: <name>.input.png, <name>.bf16.png, <name>.int4.png."""
    folder.mkdir()
    for name in found.answers["name"]:
        if (source := found.job.baseline / "images" / f"{name}.png").exists():
            shutil.copyfile(source, folder / f"{name}.input.png")
    for name in found.pictures["name"]:
        shutil.copyfile(found.job.baseline / "pictures" / f"{name}.png", folder / f"{name}.bf16.png")
        shutil.copyfile(found.job.metrics / "pictures" / f"{name}.png", folder / f"{name}.{found.label}.png")


def triple(found: Findings, name: str) -> list[tuple[str, str]]:
    """(caption, data address) of bf16, quantized and their difference."""
    before = Image.open(found.job.baseline / "pictures" / f"{name}.png").convert("RGB")
    after = Image.open(found.job.metrics / "pictures" / f"{name}.png").convert("RGB")
    distance = np.abs(np.asarray(before, dtype=np.int16) - np.asarray(after, dtype=np.int16))
    difference = Image.fromarray(np.clip(GAIN * distance, 0, 255).astype(np.uint8))
    captions = ("bf16", found.label, f"difference × {GAIN}")
    return [(text, embedded(image, PICTURE)) for text, image in zip(captions, (before, after, difference), strict=True)]


def embedded(image: Image.Image, edge: int) -> str:
    """A data address of the picture as PNG, its longest edge at most `edge` pixels."""
    image = image.convert("RGB")
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def word_difference(before: str, after: str) -> list[tuple[str, bool]]:
    """`after` as runs of words, each with whether `before` lacks it there."""
    a, b = before.split(), after.split()
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return [(" ".join(b[j1:j2]), tag != "equal") for tag, _, _, j1, j2 in blocks if j2 > j1]


def velocity_by_step(found: Findings) -> pd.DataFrame:
    """Mean over samples: step, timestep, relative_l2, the largest of it, cosine."""
    return (
        found.velocity.groupby("step")
        .agg(
            timestep=("timestep", "mean"),
            relative_l2=("relative_l2", "mean"),
            largest=("relative_l2", "max"),
            cosine=("cosine", "mean"),
        )
        .reset_index()
    )


def velocity_chart(found: Findings, column: str, title: str) -> str:
    """One thin line a sample, the mean over it; timestep 1 (noise) at the left."""

    def line(part: pd.DataFrame, style: str) -> Line:
        y = 1 - part[column] if column == "cosine" else part[column]
        return Line(x=part["timestep"].astype(float).tolist(), y=y.astype(float).tolist(), style=style)

    samples = [line(part, "sample") for _, part in found.velocity.groupby("name")]
    mean = [line(velocity_by_step(found), "mean")] if samples else []
    return line_chart(samples + mean, "timestep, from noise (1) to picture (0)", title, flip=True)


def loss_panels(found: Findings) -> list[tuple[str, list[str], dict[str, str], list[str]]]:
    """Per fold: its name, its paths, the stroke of each family of scales, one panel per layer."""
    sections = []
    for fold, of_fold in found.losses.groupby("fold"):
        points = of_fold.groupby("family")["alpha"].nunique()
        curves = [family for family in of_fold["family"].unique() if points[family] > 1]
        strokes = {family: "dashed" if curves.index(family) else "solid" for family in curves}
        levels = {family: "dotted level" for family in points.index if points[family] == 1}
        panels = []
        for layer, of_layer in of_fold.groupby("layer"):
            lines = []
            for (path, family), part in of_layer.groupby(["path", "family"], sort=False):
                chosen = part["chosen"].astype(bool).tolist()
                lines.append(
                    Line(
                        x=part["alpha"].astype(float).tolist(),
                        y=part["loss"].astype(float).tolist(),
                        style=path if path in ("und", "gen") else "both",
                        stroke="level" if len(part) == 1 else strokes[family],
                        mark=chosen.index(True) if any(chosen) else None,
                    )
                )
            panels.append(loss_panel(f"layer {layer}", lines))
        sections.append((str(fold), list(of_fold["path"].unique()), strokes | levels, panels))
    return sections


def records(frame: pd.DataFrame) -> list[dict]:
    return frame.to_dict("records")
