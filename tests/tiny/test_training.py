"""A handful of steps on few scenes lowers every task's loss, and checkpoints of both layouts come out that open
strictly."""

import json

import pytest
import torch

from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.errors import LanceQuantError
from lance_quant.model.lance import load_lance
from lance_quant.model.request import TASKS
from lance_quant.tiny import autoencoder, export, measure, pools, tokenizer, training
from lance_quant.tiny.recipes import ExportRecipe, LanceRecipe
from lance_quant.tiny.state import Schedule, Step, TrainingRun
from lance_quant.tiny.texts import MEDIA, PoolPlan


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    words = tokenizer.train_tokenizer()
    torch.manual_seed(0)
    vae = autoencoder.build(6, 8).requires_grad_(False)
    autoencoder.save_vae(vae, out / autoencoder.FILE)
    lance = training.build_lance(*export.architecture(words), "cpu")
    plans = [PoolPlan(medium=medium, scenes=2) for medium in MEDIA]
    made = dict(zip(MEDIA, pools.build_pools(words, vae, plans, "cpu", 1), strict=True))
    schedule = Schedule(steps=100, minutes=1e9, peak=2e-3, warmup=2)
    run = TrainingRun(lance, schedule, folder=out, name=training.STATE, seed=1)
    bench = training.Bench(made, measure.runners(lance, words), LanceRecipe(batch=2))
    losses = training.Losses(bench)
    step = Step(run, losses)
    history = []
    for _ in range(9):
        history.append({name: loss.item() for name, loss in step(*losses.draw(run.begin_step())).items()})
        run.end_step()
    run.save()
    return out, lance, history, run


def test_every_tasks_loss_falls(trained):
    history = trained[2]
    for task in TASKS:
        assert sum(row[task] for row in history[-3:]) < 0.9 * sum(row[task] for row in history[:3]), task


def test_every_weight_learns(trained):
    _, lance, _, _ = trained
    assert [name for name, parameter in lance.named_parameters() if parameter.grad is None] == []


def test_both_checkpoints_open_strictly_with_the_average(trained):
    out, _, _, run = trained
    shipped = out / "shipped"
    shipped.mkdir()
    folders = training.run_export(ExportRecipe(state=str(out)), out=shipped)
    assert (shipped / autoencoder.FILE).read_bytes() == (out / autoencoder.FILE).read_bytes()
    assert [folder.name for folder in folders] == list(export.FOLDERS.values())
    for folder, (layout, frames) in zip(folders, export.MAX_FRAMES.items(), strict=True):
        checkpoint = open_checkpoint(CheckpointConfig(path=str(folder)))
        assert checkpoint.layout == layout and checkpoint.config.max_num_frames == frames
        loaded = load_lance(checkpoint, dtype=torch.float32)
        for name, value in run.average.items():
            assert torch.equal(loaded.get_parameter(name), value)


def test_start_takes_a_checkpoints_weights(trained):
    out, _, _, run = trained
    training.run_export(ExportRecipe(), out=out)
    fresh = training.build_lance(*export.architecture(tokenizer.train_tokenizer()), "cpu")
    training.start_from(fresh, out)
    for name, value in run.average.items():
        assert torch.equal(fresh.get_parameter(name), value)
    with pytest.raises(LanceQuantError, match="start"):
        training.start_from(fresh, out / export.VIT_FOLDER)


def test_a_stopped_run_goes_on(tmp_path):
    autoencoder.save_vae(autoencoder.build(6, 8), tmp_path / autoencoder.FILE)
    recipe = LanceRecipe(batch=1, pictures=2, clips=2, looks=1, look_steps=1, workers=1, steps=2)
    for minutes, steps in ((0.0, 0), (10.0, 2)):  # the first call has no time for a step
        training.train_lance(recipe, out=tmp_path, minutes=minutes, total_minutes=1e6, device="cpu")
        info = json.loads((tmp_path / training.STATE / "info.json").read_text())
        assert (info["step"], info["finished"]) == (steps, steps == 2)
    names = sorted(path.stem for path in (tmp_path / training.STATE).glob("*.safetensors"))
    assert names == ["average", "model"]  # a finished run keeps no moments
