"""What a site's linears make up for: nothing where nothing is missing, part of it where something is."""

from dataclasses import replace

import pytest
import torch

from lance_quant.awq.block import Block
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.grid import Grid, quantize
from lance_quant.awq.lessons import lessons
from lance_quant.awq.residual import Missing, make_up, missing_parts, placed
from lance_quant.awq.search import Inputs, LayerJob, quantize_layer, refinement
from lance_quant.awq.topology import FOLDS, resolve
from lance_quant.checkpoint.layout import SITES, layer_targets
from lance_quant.errors import LanceQuantError
from tests.random_layers import checkpoint_of, random_evidence, random_layer, random_sequences, small_config

CONFIG = small_config()
SOURCE = random_layer(CONFIG)
SHARED = torch.randn(8, 64, generator=torch.Generator().manual_seed(7))


def entered(off: float) -> tuple[Block, list]:
    """A layer that enter states which are off by as much, in a way that they tell of themselves."""
    kept = random_sequences(CONFIG, count=12)
    mix = torch.randn(8, 64, generator=torch.Generator().manual_seed(8))
    states = [torch.randn(24, 8, generator=torch.Generator().manual_seed(n)) @ SHARED for n in range(len(kept))]
    kept = [replace(one, states=state.bfloat16()) for one, state in zip(kept, states, strict=True)]
    block = Block(CONFIG, 0, kept, "cpu")
    taught = lessons(block, SOURCE, {})
    ours = [one.states.float() for one in kept]
    block.enter({number: state + off * (state @ SHARED.T @ mix) / 64 for number, state in enumerate(ours)})
    return block, [replace(lesson, batch=batch) for lesson, batch in zip(taught, block.batches, strict=True)]


@pytest.mark.parametrize("site", SITES)
def test_nothing_is_made_up_for_where_nothing_is_missing(site):
    block, taught = entered(0.0)
    parts = missing_parts(block, SOURCE, SOURCE, taught, site)
    assert set(parts) == {"und", "gen"}
    for path, part in parts.items():
        assert len(part.inputs) == len(part.missing) == 12 * (24 + 8 if path == "und" else 16)
        assert make_up(part) is None


@pytest.mark.parametrize("site", SITES)
def test_what_is_found_missing_is_less_afterwards(site):
    """For every linear of the site, float, in a layer whose states are off."""
    block, taught = entered(0.2)
    parts = missing_parts(block, SOURCE, SOURCE, taught, site)
    targets = [target for target in layer_targets(CONFIG, 0) if target.site == site]
    assert targets
    for target in targets:
        part, weight = parts[target.path], SOURCE[f"{target.name}.weight"]
        change = part.change(weight, make_up(part))
        assert change.shape == weight.shape
        assert part.error(weight, change) < 0.9 * part.error(weight, torch.zeros_like(weight))


@pytest.mark.parametrize("site", ["qkv", "gate_up"])
def test_a_reader_answers_as_the_float_model_would(site):
    """The error of no change is that of the outputs: what the float model's states give less what ours give."""
    block, taught = entered(0.2)
    part = missing_parts(block, SOURCE, SOURCE, taught, site)["gen"]
    target = next(t for t in layer_targets(CONFIG, 0) if (t.path, t.site) == ("gen", site))
    weight = SOURCE[f"{target.name}.weight"]
    wanted = (part.inputs + part.missing) @ weight.T - part.inputs @ weight.T
    assert part.error(weight, torch.zeros_like(weight)) == pytest.approx(wanted.square().sum().item(), rel=1e-4)


def test_what_does_not_hold_on_other_sequences_is_left():
    draw = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(400, 16, generator=draw), torch.randn(16, 16, generator=draw)
    noise = torch.randn(400, 16, generator=draw)
    assert make_up(Missing(inputs, noise, 300, adds=True)) is None
    found = make_up(Missing(inputs, noise + inputs @ truth.T, 300, adds=True))
    assert (found - truth).norm() < 0.2 * truth.norm()


def test_whole_sequences_are_held_out():
    """The fourth of those that have tokens goes behind all others."""
    assert placed([5, 0, 3, 4, 2, 6]) == ([0, 0, 5, 8, 18, 12], 18, 20)


def test_folded_weights_go_back_and_forth(tmp_path):
    recipe = RecipeConfig(folds=list(FOLDS))
    checkpoint = checkpoint_of(tmp_path / "model.safetensors", CONFIG)
    job = LayerJob(checkpoint=checkpoint, layer=0, capture=None, recipe=recipe, group_size=16)
    folds = resolve(CONFIG, 0, list(FOLDS))
    result = quantize_layer(SOURCE, folds, random_evidence(CONFIG, outliers=9.0), job)
    work = refinement(SOURCE, SOURCE, result, Inputs(), job)
    for target in work.targets:
        weight = SOURCE[f"{target.name}.weight"]
        torch.testing.assert_close(work.unfolded(target, work.refolded(target, weight)), weight)


def test_every_site_that_is_named_is_made_up_for():
    """The whole layer's error falls with each further site, where the states that enter are off."""
    block, taught = entered(0.2)
    rounded = {
        f"{target.name}.weight": quantize(SOURCE[f"{target.name}.weight"], Grid(bits=4, group_size=16)).dequantize()
        for target in layer_targets(CONFIG, 0)
        if target.site != "down"
    }
    with_all = missing_parts(block, SOURCE | rounded, SOURCE, taught, "down")
    float_ones = missing_parts(block, SOURCE, SOURCE, taught, "down")
    for path in with_all:
        assert with_all[path].missing.norm() > float_ones[path].missing.norm()


def test_sites_that_do_not_exist_are_refused():
    with pytest.raises(LanceQuantError, match="residual_sites has no 'mlp'"):
        RecipeConfig(rounding=["gptq", "residual"], residual_sites=["mlp"])
    with pytest.raises(LanceQuantError, match="residual_sites is empty"):
        RecipeConfig(rounding=["gptq", "residual"], residual_sites=[])
