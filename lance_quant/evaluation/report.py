"""One run as a page: report.html (self-contained), report.md with its pictures/, README.md (the model card); and
sensitivity.parquet, a row a linear.

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
import pyarrow.parquet as pq
from PIL import Image

from lance_quant.evaluation.card import write_card
from lance_quant.evaluation.charts import Line, line_chart, loss_panel
from lance_quant.evaluation.findings import Findings, ReportJob, packed_files
from lance_quant.evaluation.names import INGREDIENT_TITLES, SOURCE_NAMES, TASK_NAMES
from lance_quant.evaluation.rendering import TEMPLATES, render
from lance_quant.evaluation.sensitivity import SENSITIVITY_FILE
from lance_quant.model.request import TASKS

THUMBNAIL, PICTURE, STRIP = 192, 512, 1280  # longest edge of an embedded input, result and clip, pixels
MOST_PNG = 100_000  # bytes; a larger picture is embedded as JPEG
QUALITY = 92
SHOWN_ANSWERS, SHOWN_PICTURES = 12, 8  # of a task in report.html, furthest apart first; report.md lists all
WIDE = 2.5  # width over height from which a picture is a clip's strip
GAIN = 8  # of the difference pictures
WORST = 10  # linears listed


@dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """File names inside the report's folder, and the result in one sentence."""

    html: str
    markdown: str
    card: str
    sensitivity: str
    headline: str
    answers: int
    pictures: int
    bytes: int  # of report.html


def write_report(job: ReportJob, out: Path) -> ReportSummary:
    """Writes report.html, report.md, pictures/, README.md and sensitivity.parquet into the existing folder `out`.

    Tasks that were not evaluated leave their sections out.
    """
    found = Findings(job)
    copy_pictures(found, out / "pictures")
    view = common_view(found)
    (out / "report.md").write_text(render("report.md.j2", view), encoding="utf-8")
    page = render("report.html.j2", {**view, **html_view(found)})
    (out / "report.html").write_text(page, encoding="utf-8")
    write_card(job, out / "README.md")
    pq.write_table(found.sensitivity, out / SENSITIVITY_FILE)
    return ReportSummary(
        html="report.html",
        markdown="report.md",
        card="README.md",
        sensitivity=SENSITIVITY_FILE,
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
        "samples": SOURCE_NAMES[found.job.evaluated_on],
        "answers": by_task(found.answers),
        "pictures": by_task(found.pictures),
        "velocity": records(velocity_by_step(found.velocity)),
        "alphas": records(found.alphas),
        "linears": found.linears[:WORST],
        "bought": found.bought,
        "ingredient_titles": INGREDIENT_TITLES,
        "sensitivity_file": SENSITIVITY_FILE,
        "files": packed_files(found.job),
    }


def by_task(rows: pd.DataFrame) -> list[tuple[str, str, list[dict]]]:
    """(task, title, rows in their order) of every task that has some."""
    parts = ((task, records(rows[rows["task"] == task])) for task in TASKS)
    return [(task, TASK_NAMES[task].title, part) for task, part in parts if part]


def html_view(found: Findings) -> dict:
    """What only the page shows: embedded pictures and charts."""
    shown = [row for _, _, rows in by_task(found.answers) for row in rows[:SHOWN_ANSWERS]]
    drawn = [row for _, _, rows in by_task(found.pictures) for row in rows[:SHOWN_PICTURES]]
    return {
        "style": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "inputs": {row["name"]: shot for row in shown if (shot := given(found, row["name"], THUMBNAIL)) is not None},
        "differences": {row["name"]: word_difference(row["baseline"], row["int4"]) for row in shown},
        "shots": {row["name"]: shots(found, row["name"]) for row in drawn},
        "shown_answers": SHOWN_ANSWERS,
        "shown_pictures": SHOWN_PICTURES,
        "gain": GAIN,
        "velocity_chart": velocity_chart(found, "relative_l2", "relative L2 error"),
        "cosine_chart": velocity_chart(found, "cosine", "1 − cosine"),
        "charted": [task for task, _, _ in by_task(found.velocity)],
        "loss_panels": loss_panels(found),
    }


def copy_pictures(found: Findings, folder: Path) -> None:
    """Inputs and results under names that report.md links: <name>.input.png, <name>.bf16.png, <name>.int4.png."""
    folder.mkdir()
    for name in (*found.answers["name"], *found.pictures["name"]):
        if (source := given_file(found, name)).exists():
            shutil.copyfile(source, folder / f"{name}.input.png")
    for name in found.pictures["name"]:
        shutil.copyfile(found.job.baseline / "pictures" / f"{name}.png", folder / f"{name}.bf16.png")
        shutil.copyfile(found.job.metrics / "pictures" / f"{name}.png", folder / f"{name}.{found.label}.png")


@dataclass(frozen=True, kw_only=True)
class Shot:
    """An embedded picture. wide: a clip's frames side by side, which want a line of their own."""

    caption: str
    address: str
    wide: bool


def given_file(found: Findings, name: str) -> Path:
    return found.job.baseline / "images" / f"{name}.png"


def given(found: Findings, name: str, edge: int) -> Shot | None:
    """What a sample was asked about or started from; None where that was text alone."""
    file = given_file(found, name)
    return shot("given", Image.open(file), edge) if file.exists() else None


def shots(found: Findings, name: str) -> list[Shot]:
    """What was given, if anything, bf16, quantized, and the difference of the two."""
    before = Image.open(found.job.baseline / "pictures" / f"{name}.png").convert("RGB")
    after = Image.open(found.job.metrics / "pictures" / f"{name}.png").convert("RGB")
    distance = np.abs(np.asarray(before, dtype=np.int16) - np.asarray(after, dtype=np.int16))
    difference = Image.fromarray(np.clip(GAIN * distance, 0, 255).astype(np.uint8))
    source = given(found, name, PICTURE)
    captions = ("bf16", found.label, f"difference × {GAIN}")
    drawn = [shot(text, image, PICTURE) for text, image in zip(captions, (before, after, difference), strict=True)]
    return drawn if source is None else [source, *drawn]


def shot(caption: str, image: Image.Image, edge: int) -> Shot:
    wide = image.width > WIDE * image.height
    return Shot(caption=caption, address=embedded(image, max(edge, STRIP) if wide else edge), wide=wide)


def embedded(image: Image.Image, edge: int) -> str:
    """A data address of the picture, its longest edge at most `edge` pixels: PNG, or JPEG where that is large."""
    image = image.convert("RGB")
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png"
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > MOST_PNG:
        buffer, kind = io.BytesIO(), "jpeg"
        image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def word_difference(before: str, after: str) -> list[tuple[str, bool]]:
    """`after` as runs of words, each with whether `before` lacks it there."""
    a, b = before.split(), after.split()
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return [(" ".join(b[j1:j2]), tag != "equal") for tag, _, _, j1, j2 in blocks if j2 > j1]


def velocity_by_step(velocity: pd.DataFrame) -> pd.DataFrame:
    """Mean over samples: step, timestep, relative_l2, the largest of it, cosine."""
    return (
        velocity.groupby("step")
        .agg(
            timestep=("timestep", "mean"),
            relative_l2=("relative_l2", "mean"),
            largest=("relative_l2", "max"),
            cosine=("cosine", "mean"),
        )
        .reset_index()
    )


def velocity_chart(found: Findings, column: str, title: str) -> str:
    """One line a task, or of a single task one thin line a sample and their mean; timestep 1 (noise) at the left."""

    def line(part: pd.DataFrame, style: str) -> Line:
        y = 1 - part[column] if column == "cosine" else part[column]
        return Line(x=part["timestep"].astype(float).tolist(), y=y.astype(float).tolist(), style=style)

    velocity = found.velocity
    tasks = [task for task in TASKS if (velocity["task"] == task).any()]
    if len(tasks) > 1:
        lines = [line(velocity_by_step(velocity[velocity["task"] == task]), f"task {task}") for task in tasks]
    else:
        lines = [line(part, "sample") for _, part in velocity.groupby("name")]
        lines += [line(velocity_by_step(velocity), "mean")] if tasks else []
    return line_chart(lines, "timestep, from noise (1) to picture (0)", title, flip=True)


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
