"""Numeric identity: the packed bytes of each recipe on a fixed random layer. A refactor leaves them as they are.

Recipes that choose among roundings give the same bytes on any machine. Compensated and learned rounding add in the
order of the machine's own kernels, which may move a code here and there: of these, sums are pinned.
"""

import hashlib
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import lance_quant.awq.search as search
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.search import LayerJob, search_layer
from lance_quant.checkpoint.native import unpack_nibbles
from tests.random_layers import random_checkpoint, random_gradients, random_sequences, random_sites, small_config

RECIPES = Path(__file__).parents[2] / "conf" / "recipe"
BYTES = {
    "minmax": "76590dfb5139eba083db9ddc80369e8b5f44ac95cf7e6c0e7d6dd8d59e107937",
    "published": "c2aa63f9ffcd33f62c65cf29ded30ce4dc225a6b53b2f07a6f130a81ec4344d3",
    "awq": "6f85acb3d76cf1c0df1557091a34cba19a4379f81cfd74ef3833d5d6c095e745",
}
CODES = {"fast": 464910, "best": 463167}  # sum of all codes


def searched(tmp_path, monkeypatch, name):
    config = small_config()
    checkpoint = random_checkpoint(tmp_path / "model", config)
    monkeypatch.setattr(search, "read_layer", lambda folder, layer: random_sites(config, layer, outliers=9.0))
    monkeypatch.setattr(search, "read_sequences", lambda folder, layer: random_sequences(config))
    monkeypatch.setattr(search, "read_gradients", lambda folder, layer: random_gradients(random_sequences(config)))
    out = tmp_path / "out"
    out.mkdir()
    recipe = RecipeConfig(**yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    job = LayerJob(checkpoint=checkpoint, layer=0, capture=tmp_path, recipe=recipe, group_size=32)
    search_layer(job, out, "cpu")
    return out / "layer.safetensors"


@pytest.mark.parametrize("name", BYTES)
def test_bytes(tmp_path, monkeypatch, name):
    file = searched(tmp_path, monkeypatch, name)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == BYTES[name]


@pytest.mark.parametrize("name", CODES)
def test_codes(tmp_path, monkeypatch, name):
    tensors = load_file(searched(tmp_path, monkeypatch, name))
    codes = [unpack_nibbles(value).long() for key, value in tensors.items() if key.endswith(".qweight")]
    total, count = sum(int(part.sum()) for part in codes), sum(part.numel() for part in codes)
    assert total == pytest.approx(CODES[name], abs=0.002 * count)
