"""Baseline and comparison of all seven tasks on random checkpoints: a model compared with itself has no error."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.pack import PackJob, pack
from lance_quant.awq.search import LayerJob, search_layer
from lance_quant.evaluation import baseline, compare
from lance_quant.evaluation.compare import CompareJob
from lance_quant.evaluation.config import EvaluationConfig
from lance_quant.evaluation.findings import COLUMNS
from lance_quant.evaluation.samples import load_frames, load_tensors
from lance_quant.model.lance import load_lance
from lance_quant.model.request import CLIP_TASKS, GENERATION, GIVEN, TASKS, UNDERSTANDING, Request
from tests.random_checkpoint import random_checkpoint

CFG = EvaluationConfig(samples=1, steps=4, velocity_steps=3, max_new_tokens=6)
FRAMES = 5
SERVED = {"image": ["x2t_image", "t2i", "image_edit"], "video": list(TASKS)}


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def one_of_each(checkpoint, cfg) -> list[Request]:
    """A request a task, of noise: what it shows does not matter here."""
    clip = tuple(noise(frame) for frame in range(FRAMES))
    requests = []
    for task in SERVED[checkpoint.layout]:
        given = {"image": noise(0)} if GIVEN.get(task) == "image" else {}
        given |= {"video": clip} if GIVEN.get(task) == "video" else {}
        frames = FRAMES if task in CLIP_TASKS else 1
        answer = "a cross" if task in UNDERSTANDING else ""
        requests.append(
            Request(
                task=task,
                name=f"{task}-0",
                prompt="a red circle",
                answer=answer,
                height=64,
                width=64,
                frames=frames,
                **given,
            )
        )
    return requests


@pytest.fixture(scope="module", params=["image", "video"])
def run(request, tmp_path_factory):
    """A baseline and a packed folder of a random checkpoint of each layout."""
    root = tmp_path_factory.mktemp("run")
    checkpoint = random_checkpoint(root / "checkpoint", layout=request.param)
    (root / "baseline").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline, "evaluation_requests", one_of_each)
        summary = baseline.run_baseline(checkpoint, CFG, root / "baseline", "cpu")
    assert summary.samples == {task: 1 for task in SERVED[request.param]}
    recipe = RecipeConfig(name="minmax", scoring="none", folds=[])
    layers = []
    for layer in range(checkpoint.config.num_hidden_layers):
        layers.append(root / f"layer{layer}")
        layers[-1].mkdir()
        job = LayerJob(checkpoint=checkpoint, layer=layer, capture=None, recipe=recipe, group_size=64, bits=4, seed=0)
        search_layer(job, layers[-1], "cpu")
    (root / "packed").mkdir()
    of = {"checkpoint": checkpoint, "layers": layers, "recipe": recipe, "group_size": 64, "bits": 4}
    pack(PackJob(**of, tasks_calibrated=[]), root / "packed")
    return CompareJob(checkpoint=checkpoint, packed=root / "packed", baseline=root / "baseline", evaluation=CFG)


@pytest.fixture
def compared(run, tmp_path, monkeypatch):
    """The metrics and the folder of a comparison, with another model in the packed one's place where given."""
    monkeypatch.setattr(compare, "evaluation_requests", one_of_each)

    def of(load=None) -> tuple[dict, object]:
        if load is not None:
            monkeypatch.setattr(compare, "load_packed_lance", load)
        return compare.compare(run, tmp_path, "cpu").metrics, tmp_path

    return of


def test_packed_against_bf16(run, compared):
    metrics, out = compared()
    tasks = SERVED[run.checkpoint.layout]
    drawn = [task for task in tasks if task in GENERATION]
    asked = [task for task in tasks if task in UNDERSTANDING]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert 0 < metrics["velocity_relative_l2"] < 0.5 and 0.9 < metrics["velocity_cosine"] < 1
    assert metrics["kl"] > 0 and metrics["perplexity_int4"] > 1
    assert metrics["bytes_packed"] < metrics["bytes_source"] / 3
    assert (metrics["samples_understanding"], metrics["samples_generation"]) == (len(asked), len(drawn))
    for name in ("answers", "forced", "velocity", "pictures", "metrics"):
        assert pq.read_schema(out / f"{name}.parquet").names == COLUMNS[name].split(), name
    velocity = pd.read_parquet(out / "velocity.parquet")
    assert len(velocity) == 3 * len(drawn) and sorted(velocity.step.unique()) == [0, 2, 3]
    assert velocity.timestep.max() == 1
    table = pd.read_parquet(out / "metrics.parquet")
    assert set(table.task) == {"all", *tasks}
    for task in asked:
        assert metrics[f"{task}/kl"] > 0 and metrics[f"{task}/samples"] == 1
    for task in drawn:
        assert 0 < metrics[f"{task}/velocity_relative_l2"] < 0.5 and metrics[f"{task}/latent_relative_l2"] > 0
        assert metrics[f"{task}/psnr"] < 100
        frames = load_frames(out, f"{task}-0")
        assert frames.shape == load_frames(run.baseline, f"{task}-0").shape
        assert frames.shape == (FRAMES if task in CLIP_TASKS else 1, 64, 64, 3)
        assert (out / "frames" / f"{task}-0.safetensors").exists() == (task in CLIP_TASKS)
        assert (out / "pictures" / f"{task}-0.png").exists()


def test_a_model_against_itself(run, compared):
    metrics, _ = compared(lambda checkpoint, packed, device: load_lance(checkpoint))
    assert metrics["x2t_exact"] == metrics["x2t_jaccard"] == metrics["top1"] == metrics["ssim"] == 1
    for task in SERVED[run.checkpoint.layout]:
        if task in GENERATION:
            assert metrics[f"{task}/velocity_relative_l2"] == metrics[f"{task}/latent_relative_l2"] == 0, task
            assert metrics[f"{task}/psnr"] == 100
        else:
            assert metrics[f"{task}/exact"] == 1
            assert metrics[f"{task}/kl"] < 1e-4  # logits are kept in bf16


def test_what_the_baseline_keeps(run):
    """Velocities of the latents drawn alone: not of a source, nor of the first frame of i2v."""
    answers = pd.read_parquet(run.baseline / "answers.parquet")
    assert list(answers.columns) == ["name", "task", "prompt", "reference", "answer", "tokens"]
    given = {path.stem for path in (run.baseline / "images").iterdir()}
    assert given == {f"{task}-0" for task in SERVED[run.checkpoint.layout] if task in GIVEN}
    rows = {"t2i": (16, 16), "t2v": (32, 32), "i2v": (32, 16), "image_edit": (32, 16), "video_edit": (64, 32)}
    for task in set(rows) & set(SERVED[run.checkpoint.layout]):
        kept = load_tensors(run.baseline, "trajectories", f"{task}-0")
        every, drawn = rows[task]
        assert kept["steps"].tolist() == [0, 2, 3]
        assert kept["start"].shape == (every, 48) and kept["states"].shape == (3, every, 48)
        assert kept["velocities"].shape == kept["guided"].shape == (3, drawn, 48)
        assert kept["final"].shape == (drawn, 48)
        assert torch.equal(kept["start"], kept["states"][0])


def test_packed_weights_are_never_dense(run):
    lance = compare.load_packed_lance(run.checkpoint, run.packed, "cpu")
    linear = lance.language_model.model.layers[0].mlp.down_proj
    assert linear.qweight.dtype == torch.uint8 and not list(linear.parameters())


def test_a_model_without_tasks_has_sizes_alone(run, tmp_path):
    text = replace(run.checkpoint, layout="text")
    cfg = EvaluationConfig(samples=1)
    (tmp_path / "baseline").mkdir()
    assert baseline.run_baseline(text, cfg, tmp_path / "baseline", "cpu").samples == {}
    (tmp_path / "scores").mkdir()
    job = CompareJob(checkpoint=text, packed=run.packed, baseline=tmp_path / "baseline", evaluation=cfg)
    metrics = compare.compare(job, tmp_path / "scores", "cpu").metrics
    assert set(metrics) == {"samples_understanding", "samples_generation", "bytes_source", "bytes_packed", "seconds"}
