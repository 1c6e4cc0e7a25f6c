"""The checkpoint that ships: its size, its files, and that it still answers, draws and decodes as it was measured."""

from pathlib import Path

import pytest
import torch

import lance_quant.tiny
from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.model.lance import load_lance
from lance_quant.model.prompts import load_tokenizer
from lance_quant.model.sampler import FlowConfig
from lance_quant.tiny import autoencoder, batched, export, layouts, measure, pools, tokenizer
from lance_quant.tiny.texts import PoolPlan

WEIGHTS = Path(lance_quant.tiny.__file__).parent / "weights"
MIB = 2**20


@pytest.fixture(scope="module")
def scores():
    """bf16, 16 held-out scenes with three questions each; few steps draw well enough for a sign of life."""
    checkpoint = open_checkpoint(CheckpointConfig(path=str(WEIGHTS / export.FOLDER)))
    lance = load_lance(checkpoint)
    words = load_tokenizer(checkpoint.folder)
    vae = autoencoder.load_vae(WEIGHTS / autoencoder.FILE)
    pool = pools.build_pool(words, vae, PoolPlan(scenes=16, unseen=True, seed=9, captions=1), "cpu", 1)
    asker, drawer = batched.Asker(lance, layouts.AskLayout(words)), batched.Drawer(lance, layouts.DrawLayout(words))
    with torch.inference_mode():
        return measure.held_out_scores(asker, drawer, pool, vae, FlowConfig(steps=10))


def test_sizes():
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 14 * MIB and max(sizes) <= 12 * MIB


def test_no_pickles():
    assert not [path for path in WEIGHTS.rglob("*") if path.suffix in (".pth", ".pt", ".bin", ".pkl")]


def test_the_tokenizer_is_the_one_that_trains():
    assert load_tokenizer(WEIGHTS / export.FOLDER).to_str() == tokenizer.train_tokenizer().to_str()


def test_answers(scores):
    assert scores["x2t_exact"] >= 0.8


def test_drawings(scores):
    assert scores["t2i_correct"] >= 0.5


def test_reader(scores):
    assert scores["reader_true"] == 1
    assert scores["reader_round_trip"] >= 0.95
