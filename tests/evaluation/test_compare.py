"""Baseline and comparison on a random checkpoint: a model compared with itself has no error."""

import json

import pandas as pd
import pytest
import torch

from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.pack import PackJob, pack
from lance_quant.awq.search import LayerJob, search_layer
from lance_quant.evaluation import compare as comparison
from lance_quant.evaluation.baseline import run_baseline
from lance_quant.evaluation.compare import CompareJob, compare
from lance_quant.evaluation.config import EvaluationConfig
from lance_quant.model.lance import load_lance
from tests.random_checkpoint import random_checkpoint

CFG = EvaluationConfig(samples=2, steps=4, max_new_tokens=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    checkpoint = random_checkpoint(root / "checkpoint")
    (root / "baseline").mkdir()
    summary = run_baseline(checkpoint, CFG, root / "baseline", "cpu")
    assert summary.samples == {"x2t_image": 2, "t2i": 2}
    layers = []
    for layer in range(checkpoint.config.num_hidden_layers):
        layers.append(root / f"layer{layer}")
        layers[-1].mkdir()
        recipe = RecipeConfig(name="minmax", scoring="none", folds=[])
        job = LayerJob(checkpoint=checkpoint, layer=layer, capture=None, recipe=recipe, group_size=64, bits=4, seed=0)
        search_layer(job, layers[-1], "cpu")
    (root / "packed").mkdir()
    pack(
        PackJob(
            checkpoint=checkpoint,
            layers=layers,
            recipe=job.recipe,
            group_size=64,
            bits=4,
            tasks_calibrated=[],
        ),  # fmt: skip
        root / "packed",
    )
    return root, CompareJob(checkpoint=checkpoint, packed=root / "packed", baseline=root / "baseline", evaluation=CFG)


def test_packed_against_bf16(run, tmp_path):
    _, job = run
    metrics = compare(job, tmp_path, "cpu").metrics
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert 0 < metrics["velocity_relative_l2"] < 0.5 and 0.9 < metrics["velocity_cosine"] < 1
    assert metrics["kl"] > 0 and metrics["perplexity_int4"] > 1
    assert metrics["bytes_packed"] < metrics["bytes_source"] / 3
    velocity = pd.read_parquet(tmp_path / "velocity.parquet")
    assert len(velocity) == 2 * CFG.steps and velocity.timestep.max() == 1
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


def test_a_model_against_itself(run, tmp_path, monkeypatch):
    _, job = run
    monkeypatch.setattr(comparison, "load_packed_lance", lambda checkpoint, packed, device: load_lance(checkpoint))
    metrics = compare(job, tmp_path, "cpu").metrics
    assert metrics["x2t_exact"] == metrics["x2t_jaccard"] == metrics["top1"] == metrics["ssim"] == 1
    assert metrics["velocity_relative_l2"] == metrics["latent_relative_l2"] == 0
    assert metrics["kl"] < 1e-4  # logits are kept in bf16
    assert metrics["psnr"] == 100


def test_packed_weights_are_never_dense(run):
    root, job = run
    lance = comparison.load_packed_lance(job.checkpoint, job.packed, "cpu")
    linear = lance.language_model.model.layers[0].mlp.down_proj
    assert linear.qweight.dtype == torch.uint8 and not list(linear.parameters())
