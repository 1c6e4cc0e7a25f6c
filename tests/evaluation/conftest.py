"""A small run's artifacts with the schemas of the stages: what the report and the card are tested on."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from lance_quant.awq.artifact import INGREDIENTS, LINEARS
from lance_quant.evaluation.findings import ReportJob
from lance_quant.evaluation.means import flat, means
from lance_quant.evaluation.samples import strip
from lance_quant.model.request import CLIP_TASKS, GIVEN, UNDERSTANDING

STEPS = 12
COLORS = {"red": (214, 64, 56), "blue": (52, 96, 200), "green": (60, 160, 90), "orange": (240, 160, 60)}


def scene(color: str, seed: int) -> Image.Image:
    image = Image.new("RGB", (96, 96), (238, 236, 228))
    draw = ImageDraw.Draw(image)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        x, y = rng.integers(8, 60, 2)
        draw.ellipse((int(x), int(y), int(x) + 26, int(y) + 26), fill=COLORS[color])
    return image


def name_of(task: str, index: int) -> str:
    return f"{task}_{index:02d}"


def write_metrics(folder: Path, tasks: dict[str, int]) -> None:
    """Tables of a comparison with `tasks` samples a task, and the means of them."""
    tables: dict[str, list[dict]] = {"answers": [], "forced": [], "velocity": [], "pictures": []}
    for task, count in tasks.items():
        for index in range(count):
            row = {"name": name_of(task, index), "task": task}
            if task in UNDERSTANDING:
                question(tables, row, index)
            else:
                drawing(tables, row, index)
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items() if rows}
    table = means(frames)
    for name, frame in (frames | {"metrics": table}).items():
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    sizes = {"bytes_source": 9_600_000, "bytes_packed": 1_830_000, "seconds": 12.5}
    (folder / "metrics.json").write_text(json.dumps(flat(table) | sizes))


def question(tables: dict, row: dict, index: int) -> None:
    same, truth = index % 4 != 1, f"three {list(COLORS)[index % 4]} circles"
    close = 1.0 if same else 0.74
    tables["answers"].append(
        row
        | {
            "prompt": "What is in the picture | <b>exactly</b>?",
            "reference": truth,
            "baseline": truth,
            "int4": truth if same else truth.replace("three", "two"),
            "exact": float(same),
            "levenshtein": close,
            "difflib": close,
            "jaccard": 1.0 if same else 0.5,
            "reference_exact_baseline": True,
            "reference_exact_int4": same,
        }
    )
    tables["forced"].append(
        row | {"tokens": 5, "perplexity_baseline": 1.02, "perplexity_int4": 1.031, "kl": 0.0021, "top1": close}
    )


def drawing(tables: dict, row: dict, index: int) -> None:
    """Velocity errors of 0.034 in the mean, PSNR of 31.7 dB in the mean of every two."""
    for step, t in enumerate(np.linspace(1.0, 0.08, STEPS)):
        error = 0.034 * (0.5 + step / (STEPS - 1))
        errors = {"relative_l2": error, "cosine": 1 - error**2 / 2}
        guided = {"guided_relative_l2": 2 * error, "guided_cosine": 1 - 2 * error**2}
        tables["velocity"].append(row | {"step": step, "timestep": t} | errors | guided)
    tables["pictures"].append(
        row
        | {
            "prompt": f"three {list(COLORS)[index % 4]} circles on a pale ground",
            "frames": 5 if row["task"] in CLIP_TASKS else 1,
            "latent_relative_l2": 0.062,
            "psnr": 31.7 + (2 if index % 2 else -2),
            "ssim": 0.95,
            "correct_baseline": True,
            "correct_int4": index % 4 != 3,
        }
    )


def write_pictures(baseline: Path, metrics: Path, tasks: dict[str, int]) -> None:
    colors = list(COLORS)
    for folder in (baseline / "images", baseline / "pictures", metrics / "pictures"):
        folder.mkdir(parents=True)
    for task, count in tasks.items():
        for index in range(count):
            name = f"{name_of(task, index)}.png"
            if task in GIVEN:
                shown = 5 if GIVEN[task] == "video" else 1
                side_by_side([scene(colors[index % 4], index)] * shown).save(baseline / "images" / name)
            if task in UNDERSTANDING:
                continue
            before = side_by_side([scene(colors[index % 4], 50 + index)] * (5 if task in CLIP_TASKS else 1))
            before.save(baseline / "pictures" / name)
            noise = np.random.default_rng(index).normal(0, 6, np.asarray(before).shape)
            after = np.clip(np.asarray(before) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(after).save(metrics / "pictures" / name)


def side_by_side(frames: list[Image.Image]) -> Image.Image:
    return strip([np.asarray(frame) for frame in frames])


def write_layer(folder: Path, layer: int) -> None:
    folder.mkdir(parents=True)
    rows = []
    for path in ("und", "gen"):
        for fold, floor in (("input_norm", 0.4), ("post_attention_norm", 0.55)):
            for family in ("awq", "mean"):
                best = floor + 0.05 * (layer % 3) + (0.1 if path == "gen" else 0)
                for i in range(21):
                    loss = (1e-4 if family == "awq" else 1.1e-4) * (1 + 9 * (i / 20 - best) ** 2)
                    rows.append(
                        {"layer": layer, "path": path, "fold": fold, "family": family, "alpha": i / 20, "loss": loss}
                    )
            rows.append({"layer": layer, "path": path, "fold": fold, "family": "identity", "alpha": 0.0, "loss": 3e-4})
    losses = pd.DataFrame(rows)
    losses["chosen"] = losses.index.isin(losses.groupby(["path", "fold"])["loss"].idxmin())
    losses.to_parquet(folder / "losses.parquet")
    write_linears(folder, layer)


def write_linears(folder: Path, layer: int) -> None:
    """Of a recipe of folds, clip and gptq, the last of which raises errors; weighed ones, which it lowers, for gen."""
    linears, ingredients = [], []
    names = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}
    for path, suffix in (("und", ""), ("gen", "_moe_gen")):
        for i, (site, name) in enumerate(names.items()):
            before, after = 0.09 + 0.004 * layer, 0.05 + 0.004 * layer + 0.001 * i
            fold = {"qkv": "input_norm", "gate_up": "post_attention_norm"}.get(site)
            key = {"layer": layer, "path": path, "name": f"language_model.model.layers.{layer}.{name}{suffix}"}
            weighs = path == "gen"
            linears.append(
                key
                | {
                    "site": site,
                    "scheme": "asym_int4_grouped_awq",
                    "group_size": 64,
                    "bits": 4,
                    "out_features": 128,
                    "in_features": 64,
                    "fold": fold,
                    "family": fold and "activation",
                    "alpha": 0.35 if fold else None,
                    "clip_low": 0.91,
                    "clip_high": 0.94,
                    "error_kind": "output",
                    "error_before": before,
                    "error_after": after,
                    "weighed_before": 2 * before if weighs else None,
                    "weighed_after": before if weighs else None,
                }
            )
            errors = {"minmax": before, "folds": before * 0.75, "clip": after - 0.01, "gptq": after}
            counts = {"minmax": 2 * before, "folds": 1.5 * before, "clip": 1.25 * before, "gptq": before}
            ingredients += rows_of(key, errors, counts if weighs else None)
    whole = {"minmax": 0.2, "folds": 0.15, "clip": 0.15, "gptq": 0.05}
    ingredients += rows_of({"layer": layer, "path": "both", "name": "layer"}, whole, None)
    pq.write_table(pa.Table.from_pylist(linears, LINEARS), folder / "linears.parquet")
    pq.write_table(pa.Table.from_pylist(ingredients, INGREDIENTS), folder / "ingredients.parquet")


def rows_of(key: dict, errors: dict[str, float], weighed: dict[str, float] | None) -> list[dict]:
    """A linear's rows of ingredients.parquet."""
    rows, last = [], None
    for name in errors:
        row = key | {"ingredient": name, "error_kind": "output", "error": errors[name]}
        row |= {"share": last and (errors[last] - errors[name]) / errors["minmax"]}
        if weighed:
            row |= {"weighed": weighed[name]}
            row |= {"weighed_share": last and (weighed[last] - weighed[name]) / weighed["minmax"]}
        rows.append(row)
        last = name
    return rows


def write_packed(folder: Path, calibrated: list[str]) -> None:
    folder.mkdir()
    name = "language_model.model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            f"{name}.qweight": torch.randint(0, 256, (128, 64), generator=generator, dtype=torch.uint8),
            f"{name}.scales": torch.rand(128, 2, generator=generator).bfloat16(),
            f"{name}.zeros": torch.randint(0, 16, (128, 2), generator=generator, dtype=torch.uint8),
        },
        folder / "awq_state_dict.safetensors",
    )
    entry = {"shape": [128, 128], "n_bit": 4, "group_size": 64, "scheme": "asym_int4_grouped_awq"}
    meta = {
        "n_bit": 4,
        "group_size": 64,
        "scheme": "asym_int4_grouped_awq",
        "awq_linears": 1,
        "plain_linears": 0,
        "tasks_calibrated": calibrated,
        "per_weight": {f"{name}.weight": entry},
    }
    (folder / "awq_meta.json").write_text(json.dumps(meta))
    (folder / "manifest.json").write_text("{}")  # the store's own, no part of the layout


@pytest.fixture
def make_job(tmp_path):
    """make_job(x2t_image=8, t2i=4) -> ReportJob over freshly written artifacts of so many samples a task."""
    count = iter(range(100))

    def make(layers: int = 4, searched: bool = True, **tasks: int) -> ReportJob:
        tasks = tasks or {"x2t_image": 8, "t2i": 4}
        root = tmp_path / f"run{next(count)}"
        write_pictures(root / "baseline", root / "metrics", tasks)
        write_metrics(root / "metrics", tasks)
        write_packed(root / "packed", ["x2t_image", "t2i"] if searched else [])
        for layer in range(layers if searched else 0):
            write_layer(root / f"layer{layer}", layer)
        if searched:
            (root / "capture").mkdir()
            pd.DataFrame(
                [
                    {"task": task, "path": path, "layer": layer, "site": site, "tokens": 4096 - layer if seen else 0}
                    for task, path, seen in (
                        ("x2t_image", "und", 1),
                        ("t2i", "und", 1),
                        ("t2i", "gen", 1),
                        ("x2t_image", "gen", 0),
                    )
                    for layer in range(layers)
                    for site in ("qkv", "o", "gate_up", "down")
                ]
            ).to_parquet(root / "capture" / "coverage.parquet")
        return ReportJob(
            name="tiny",
            recipe="awq" if searched else "minmax",
            checkpoint={"layout": "image", "parameters": 2_400_000, "fingerprint": "0123456789abcdef" * 4},
            layers=[root / f"layer{layer}" for layer in range(layers if searched else 0)],
            packed=root / "packed",
            baseline=root / "baseline",
            metrics=root / "metrics",
            capture=root / "capture" if searched else None,
            settings={
                "device": "cpu",
                "recipe": {"name": "awq", "bits": 4},
                "evaluation": {"tasks": ["x2t_image", "t2i"]},
            },
        )

    return make
