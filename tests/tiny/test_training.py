"""A handful of steps on few scenes lowers both losses, and a checkpoint comes out that opens strictly."""

import pytest
import torch

from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.model.lance import load_lance
from lance_quant.tiny import autoencoder, batched, export, layouts, pools, tokenizer, training
from lance_quant.tiny.recipes import LanceRecipe
from lance_quant.tiny.state import Schedule, Step, TrainingRun
from lance_quant.tiny.texts import PoolPlan


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    words = tokenizer.train_tokenizer()
    torch.manual_seed(0)
    vae = autoencoder.build(6, 8).requires_grad_(False)
    autoencoder.save_vae(vae, out / autoencoder.FILE)
    config, vision = export.architecture(words)
    lance = training.build_lance(config, vision, "cpu")
    pool = pools.build_pool(words, vae, PoolPlan(scenes=4), "cpu", 1)
    run = TrainingRun(lance, Schedule(steps=100, minutes=1e9, peak=2e-3, warmup=2), folder=out, name="s", seed=1)
    asker = batched.Asker(lance, layouts.AskLayout(words))
    drawer = batched.Drawer(lance, layouts.DrawLayout(words))
    losses = training.Losses(
        training.Bench(lance, pool, asker, drawer, LanceRecipe(batch=4, draw_batch=4), batched.PLAIN)
    )
    step = Step(run, losses)
    history = []
    for _ in range(12):
        history.append({name: loss.item() for name, loss in step(*losses.draw(run.begin_step())).items()})
        run.end_step()
    export.write_checkpoint(lance, words, vision, out)
    return out, lance, history


def test_both_losses_fall(trained):
    history = trained[2]
    for name in ("x2t_image", "t2i"):
        assert sum(row[name] for row in history[-3:]) < 0.9 * sum(row[name] for row in history[:3])


def test_every_weight_learns(trained):
    _, lance, _ = trained
    untouched = [name for name, parameter in lance.named_parameters() if parameter.grad is None]
    assert untouched == []


def test_the_checkpoint_opens_strictly_with_the_same_weights(trained):
    out, lance, _ = trained
    checkpoint = open_checkpoint(CheckpointConfig(path=str(out / export.FOLDER)))
    assert checkpoint.layout == "image" and checkpoint.config == lance.config
    loaded = load_lance(checkpoint, dtype=torch.float32)
    for name, value in lance.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value)
