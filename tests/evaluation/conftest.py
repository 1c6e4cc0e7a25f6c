"""A small run's artifacts with the schemas of the stages: what the report and the card are tested on."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from lance_quant.evaluation.findings import ReportJob

COLORS = {"red": (214, 64, 56), "blue": (52, 96, 200), "green": (60, 160, 90), "orange": (240, 160, 60)}


def scene(color: str, seed: int) -> Image.Image:
    image = Image.new("RGB", (96, 96), (238, 236, 228))
    draw = ImageDraw.Draw(image)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        x, y = rng.integers(8, 60, 2)
        draw.ellipse((int(x), int(y), int(x) + 26, int(y) + 26), fill=COLORS[color])
    return image


def write_metrics(folder: Path, x2t: int, t2i: int) -> None:
    rng, colors = np.random.default_rng(0), list(COLORS)
    metrics = {
        "samples_x2t": x2t,
        "samples_t2i": t2i,
        "bytes_source": 9_600_000,
        "bytes_packed": 1_830_000,
        "seconds": 12.5,
    }
    if x2t:
        same = [i % 4 != 1 for i in range(x2t)]
        truth = [f"three {colors[i % 4]} circles" for i in range(x2t)]
        int4 = [t if s else t.replace("three", "two") for t, s in zip(truth, same, strict=True)]
        close = np.where(same, 1.0, 0.74)
        pd.DataFrame(
            {
                "name": [f"x2t_{i:02d}" for i in range(x2t)],
                "prompt": ["What is in the picture | <b>exactly</b>?"] * x2t,
                "reference": truth,
                "baseline": truth,
                "int4": int4,
                "exact": np.array(same, dtype=float),
                "levenshtein": close,
                "difflib": close,
                "jaccard": np.where(same, 1.0, 0.5),
                "reference_exact_baseline": True,
                "reference_exact_int4": same,
            }
        ).to_parquet(folder / "answers.parquet")
        pd.DataFrame(
            {
                "name": [f"x2t_{i:02d}" for i in range(x2t)],
                "tokens": 5,
                "perplexity_baseline": 1.02,
                "perplexity_int4": 1.02 + 0.02 * rng.random(x2t),
                "kl": 0.004 * rng.random(x2t),
                "top1": close,
            }
        ).to_parquet(folder / "forced.parquet")
        metrics |= {
            "x2t_exact": float(np.mean(same)),
            "x2t_levenshtein": float(close.mean()),
            "x2t_difflib": float(close.mean()),
            "x2t_jaccard": 0.9,
            "perplexity_baseline": 1.02,
            "perplexity_int4": 1.031,
            "kl": 0.0021,
            "top1": 0.981,
        }
    if t2i:
        steps, names = 12, [f"t2i_{i:02d}" for i in range(t2i)]
        times = np.linspace(1.0, 0.08, steps)
        pd.DataFrame(
            [
                {
                    "name": name,
                    "step": i,
                    "timestep": t,
                    "relative_l2": e,
                    "cosine": 1 - e * e / 2,
                    "guided_relative_l2": 2 * e,
                    "guided_cosine": 1 - 2 * e * e,
                }
                for name in names
                for i, t in enumerate(times)
                for e in [0.02 + 0.05 * (1 - t) ** 2 * (0.7 + rng.random() * 0.6)]
            ]
        ).to_parquet(folder / "velocity.parquet")
        pd.DataFrame(
            {
                "name": names,
                "prompt": [f"three {colors[i % 4]} circles on a pale ground" for i in range(t2i)],
                "latent_relative_l2": 0.05 + 0.03 * rng.random(t2i),
                "psnr": 28 + 8 * rng.random(t2i),
                "ssim": 0.95,
            }
        ).to_parquet(folder / "pictures.parquet")
        metrics |= {
            "velocity_relative_l2": 0.034,
            "velocity_cosine": 0.99931,
            "velocity_guided_relative_l2": 0.068,
            "latent_relative_l2": 0.062,
            "psnr": 31.7,
            "ssim": 0.95,
        }
    (folder / "metrics.json").write_text(json.dumps(metrics))


def write_pictures(baseline: Path, metrics: Path, x2t: int, t2i: int) -> None:
    colors = list(COLORS)
    for folder in (baseline / "images", baseline / "pictures", metrics / "pictures"):
        folder.mkdir(parents=True)
    for i in range(x2t):
        scene(colors[i % 4], i).save(baseline / "images" / f"x2t_{i:02d}.png")
    for i in range(t2i):
        before = scene(colors[i % 4], 50 + i)
        before.save(baseline / "pictures" / f"t2i_{i:02d}.png")
        noise = np.random.default_rng(i).normal(0, 6, (96, 96, 3))
        after = np.clip(np.asarray(before) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(after).save(metrics / "pictures" / f"t2i_{i:02d}.png")


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
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    pd.DataFrame(
        [
            {
                "layer": layer,
                "path": path,
                "name": f"language_model.model.layers.{layer}.{name}{suffix}",
                "scheme": "asym_int4_grouped_awq",
                "group_size": 64,
                "bits": 4,
                "error_before": 0.09 + 0.004 * layer,
                "error_after": 0.05 + 0.004 * layer + 0.001 * i,
                "error_kind": "output",
            }
            for path, suffix in (("und", ""), ("gen", "_moe_gen"))
            for i, name in enumerate(names)
        ]
    ).to_parquet(folder / "linears.parquet")


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
    """make_job(x2t=8, t2i=4, layers=4, searched=True) -> ReportJob over freshly written artifacts."""
    count = iter(range(100))

    def make(x2t: int = 8, t2i: int = 4, layers: int = 4, searched: bool = True) -> ReportJob:
        root = tmp_path / f"run{next(count)}"
        write_pictures(root / "baseline", root / "metrics", x2t, t2i)
        write_metrics(root / "metrics", x2t, t2i)
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
