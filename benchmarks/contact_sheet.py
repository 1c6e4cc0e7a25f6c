"""Every task on one picture, bf16 beside the quantized model:

    python -m flows.full_run checkpoint=tiny_video
    python benchmarks/contact_sheet.py report=artifacts/report/<key> [out=docs/contact_sheet.png] [samples=3]

Draws what the run's baseline and evaluate artifacts hold; models are not run. A row a task, its first samples by name,
so that none is picked.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from lance_quant.errors import LanceQuantError
from lance_quant.evaluation.names import TASK_NAMES
from lance_quant.evaluation.samples import image_file, load_frames, picture_file, strip
from lance_quant.model.request import TASKS, UNDERSTANDING

DEFAULTS = {"report": "", "out": "docs/contact_sheet.png", "samples": "3"}
LABEL, CELL, GAP, LINE = 150, 432, 18, 18  # pixels: width of the row's name, of a sample; between them; a line of text
PICTURE, FRAME = 136, 78  # sides of a picture, of which three stand in a cell, and of a clip's frame, of which five do
INK, SOFT, RULE, PAPER, DIFFERS = (27, 30, 36), (105, 112, 122), (222, 222, 216), (255, 255, 255), (163, 58, 29)
MOST = 500_000  # bytes; above it the sheet is saved in 256 colours
FONT, BOLD, LARGE = (ImageFont.load_default(size) for size in (13, 15, 19))


def main(arguments: list[str]) -> None:
    settings = DEFAULTS | dict(word.split("=", 1) for word in arguments)
    if unknown := set(settings) - set(DEFAULTS):
        raise LanceQuantError(f"{unknown.pop()} is no setting of this command: take report=, out= or samples=")
    sheet = contact_sheet(artifacts_of(Path(settings["report"])), int(settings["samples"]))
    out = Path(settings["out"])
    sheet.save(out, optimize=True)
    if out.stat().st_size > MOST:
        sheet.quantize(256).save(out, optimize=True)
    print(f"{out}  {sheet.width} x {sheet.height} pixels, {out.stat().st_size / 1000:.0f} kB")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a report tells of: the folders of the baseline and of the comparison, how the quantized model is called in
    a cell (`int4`) and in full."""

    baseline: Path
    scores: Path
    label: str
    title: str


def artifacts_of(report: Path) -> Compared:
    """Raises LanceQuantError where there is no report."""
    report = report.parent if report.suffix == ".html" else report
    manifest = report / "manifest.json"
    if not manifest.is_file():
        raise LanceQuantError(
            f"{report} holds no report: give the folder that full_run names, report=artifacts/report/<key>"
        )
    content = json.loads(manifest.read_text())
    store, upstream, config = report.parents[1], content["upstream"], content["config"]
    return Compared(
        baseline=store / "baseline" / upstream["baseline"],
        scores=store / "evaluate" / upstream["evaluate"],
        label=f"int{config['bits']}",
        title=f"{config['checkpoint']['name']}: bf16 beside {config['bits']} bits, group size {config['group_size']}, "
        f"recipe {config['recipe']['name']}",
    )


def contact_sheet(compared: Compared, samples: int) -> Image.Image:
    """A row a task that was evaluated, `samples` of its samples."""
    tables = {name: table(compared.scores / f"{name}.parquet") for name in ("answers", "pictures")}
    rows = []
    for task in TASKS:
        of_kind = tables["answers" if task in UNDERSTANDING else "pictures"]
        of_task = of_kind[of_kind["task"] == task].sort_values("name") if len(of_kind) else of_kind
        if not len(of_task):
            continue
        cell = answer_cell if task in UNDERSTANDING else drawing_cell
        cells = [cell(compared, row) for row in of_task.head(samples).to_dict("records")]
        rows.append(row_of(task, summary(task, of_task, compared.label), cells, samples))
    return stacked([heading(compared, rows[0].width), *rows, Image.new("RGB", (1, 1), PAPER)], GAP, PAPER)


def heading(compared: Compared, width: int) -> Image.Image:
    """What the sheet is, and what its colours say."""
    out = Image.new("RGB", (width, 3 * LINE), PAPER)
    pen = ImageDraw.Draw(out)
    pen.text((GAP, GAP), compared.title, fill=INK, font=LARGE)
    words = "the name is red: not what was asked for, or another answer than bf16's"
    pen.text((width - GAP, GAP + 4), words, fill=DIFFERS, font=FONT, anchor="ra")
    return out


def table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.exists() else pd.DataFrame()


def summary(task: str, rows: pd.DataFrame, label: str) -> list[str]:
    """What the row's name says of all samples of the task."""
    kind = "reference_exact" if task in UNDERSTANDING else "correct"
    lines = [f"{len(rows)} samples"]
    lines += [f"{int(rows['exact'].sum())} answers identical"] if task in UNDERSTANDING else []
    known = rows.dropna(subset=[f"{kind}_baseline", f"{kind}_int4"])
    if len(known):
        for name, model in (("bf16", "baseline"), (label, "int4")):
            lines.append(f"{name}: {int(known[f'{kind}_{model}'].astype(bool).sum())} right")
    if task not in UNDERSTANDING:
        lines.append(f"{rows['psnr'].mean():.1f} dB to bf16")
    return lines


def row_of(task: str, lines: list[str], cells: list[Image.Image], samples: int) -> Image.Image:
    height = max(150, *(cell.height for cell in cells))
    out = Image.new("RGB", (GAP + LABEL + samples * (CELL + GAP), height + GAP), PAPER)
    pen = ImageDraw.Draw(out)
    pen.line((GAP, 0, out.width - GAP, 0), fill=RULE)
    y = GAP
    for text in wrapped(TASK_NAMES[task].title, BOLD, LABEL - GAP):
        pen.text((GAP, y), text, fill=INK, font=BOLD)
        y += LINE + 2
    for text in (task, *lines):
        pen.text((GAP, y), text, fill=SOFT, font=FONT)
        y += LINE
    for place, cell in enumerate(cells):
        out.paste(cell, (GAP + LABEL + place * (CELL + GAP), GAP))
    return out


def answer_cell(compared: Compared, row: dict) -> Image.Image:
    """What was asked about, the question, and both answers."""
    given = Image.open(image_file(compared.baseline, row["name"])).convert("RGB")
    wide = given.width > 2 * given.height
    given = fitted(given, CELL if wide else PICTURE, PICTURE)
    width = CELL if wide else CELL - given.width - 10
    texts = [(row["prompt"], BOLD, INK)]
    texts += [(f"true: {row['reference']}", FONT, SOFT)] if row["reference"] else []
    texts.append((f"bf16: {row['baseline']}", FONT, INK))
    texts.append((f"{compared.label}: {row['int4']}", FONT, INK if row["exact"] else DIFFERS))
    text = paragraph(texts, width)
    if wide:
        return stacked([given, text], 6, PAPER)
    out = Image.new("RGB", (CELL, max(given.height, text.height)), PAPER)
    out.paste(given, (0, 0))
    out.paste(text, (given.width + 10, 0))
    return out


def drawing_cell(compared: Compared, row: dict) -> Image.Image:
    """What was given, if anything, what both models drew, and the prompt."""
    given = image_file(compared.baseline, row["name"])
    shown = [("given", SOFT, Image.open(given).convert("RGB"))] if given.exists() else []
    for name, folder, model in (
        ("bf16", compared.baseline, "baseline"),
        (compared.label, compared.scores, "int4"),
    ):
        frames = load_frames(folder, row["name"])
        image = strip(list(frames)) if len(frames) > 1 else Image.open(picture_file(folder, row["name"]))
        correct = row[f"correct_{model}"]  # None where nobody can tell
        shown.append((name, DIFFERS if correct is not None and not correct else SOFT, image))
    text = paragraph([(row["prompt"], FONT, INK)], CELL)
    if row["frames"] > 1:
        lines = [captioned(name, ink, fitted(image, CELL - 40, FRAME), beside=True) for name, ink, image in shown]
        return stacked([*lines, text], 4, PAPER)
    pictures = [captioned(name, ink, fitted(image, PICTURE, PICTURE)) for name, ink, image in shown]
    line = Image.new("RGB", (CELL, pictures[0].height), PAPER)
    for place, picture in enumerate(pictures):
        line.paste(picture, (place * (PICTURE + 10), 0))
    return stacked([line, text], 4, PAPER)


def captioned(name: str, ink: tuple[int, int, int], image: Image.Image, *, beside: bool = False) -> Image.Image:
    """The picture with its name below it, or left of it."""
    size = (CELL, image.height) if beside else (image.width, image.height + LINE)
    out = Image.new("RGB", size, PAPER)
    out.paste(image, (40, 0) if beside else (0, 0))
    at = (0, image.height // 2 - 8) if beside else (0, image.height + 1)
    ImageDraw.Draw(out).text(at, name, fill=ink, font=FONT)
    return out


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """At most width x height pixels; small pictures stay as they are, a strip never overflows its cell."""
    image = image.copy()
    image.thumbnail((width, height), Image.Resampling.LANCZOS)
    return image


def paragraph(texts: list[tuple[str, ImageFont.FreeTypeFont, tuple[int, int, int]]], width: int) -> Image.Image:
    lines = [(line, font, ink) for text, font, ink in texts for line in wrapped(text, font, width)]
    out = Image.new("RGB", (width, LINE * len(lines) + 4), PAPER)
    for place, (line, font, ink) in enumerate(lines):
        ImageDraw.Draw(out).text((0, place * LINE), line, fill=ink, font=font)
    return out


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def stacked(pictures: list[Image.Image], gap: int, paper: tuple[int, int, int]) -> Image.Image:
    """Pictures under one another."""
    height = sum(picture.height + gap for picture in pictures) - gap
    out = Image.new("RGB", (max(picture.width for picture in pictures), height), paper)
    y = 0
    for picture in pictures:
        out.paste(picture, (0, y))
        y += picture.height + gap
    return out


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LanceQuantError as error:
        sys.exit(f"error: {error}")
