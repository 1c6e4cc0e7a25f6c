"""What a site's linears make up for: nothing where nothing is missing, part of it where something is."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lance_quant.awq.refine as refine
from lance_quant.awq.artifact import LayerResult
from lance_quant.awq.block import Block
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.grid import Grid
from lance_quant.awq.learn import weights_of
from lance_quant.awq.lessons import lessons
from lance_quant.awq.refine import Refinement, less_missing, moved
from lance_quant.awq.residual import READERS, Missing, make_up, missing_parts, placed
from lance_quant.awq.rounding import draft
from lance_quant.awq.search import Inputs, LayerJob, refinement, search_fold
from lance_quant.awq.topology import FOLDS, apply, resolve
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


def test_what_does_not_hold_on_other_sequences_is_left():
    draw = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(400, 16, generator=draw), torch.randn(16, 16, generator=draw)
    noise = torch.randn(400, 16, generator=draw)
    assert make_up(Missing(inputs, noise, 300, adds=True)) is None
    found = make_up(Missing(inputs, noise + inputs @ truth.T, 300, adds=True))
    assert (found.change - truth).norm() < 0.2 * truth.norm()
    torch.testing.assert_close(found.moments, inputs.T @ inputs)


def test_whole_sequences_are_held_out():
    """The fourth of those that have tokens goes behind all others."""
    assert placed([5, 0, 3, 4, 2, 6]) == ([0, 0, 5, 8, 18, 12], 18, 20)


def folded_work(block, taught, tmp_path) -> Refinement:
    """The layer folded everywhere, with what is known of it when the ingredients after nearest begin."""
    recipe = RecipeConfig(folds=list(FOLDS), rounding=["gptq", "residual"], residual_sites=list(SITES), sequential=True)
    checkpoint = checkpoint_of(tmp_path / "model.safetensors", CONFIG)
    job = LayerJob(checkpoint=checkpoint, layer=0, capture=None, recipe=recipe, group_size=16)
    known = random_evidence(CONFIG, outliers=9.0)
    result, folded = LayerResult(), dict(SOURCE)
    for fold in resolve(CONFIG, 0, list(FOLDS)):
        result.found.append(search_fold(fold, folded, known, recipe, Grid(bits=4, group_size=16)))
        apply(fold, folded, result.found[-1].scale)
    assert len(result.found) >= 6
    return refinement(SOURCE, folded, result, replace(Inputs.of(known), block=block, taught=taught), job)


def outputs(block, tensors, batch, target, states=None) -> torch.Tensor:
    """What a linear puts out, float ones where `states` enter."""
    if states is not None:
        batch = replace(batch, states=states)
    read = block.trace(tensors, batch, [(target.path, target.site)]).rows[target.path, target.site]
    return read @ tensors[f"{target.name}.weight"].T


@pytest.mark.parametrize("site", ["qkv", "gate_up"])
def test_folded_readers_answer_more_as_the_float_model_does(site, tmp_path):
    """Run in the layer itself, with folds, on states that are off."""
    block, taught = entered(0.2)
    work = folded_work(block, taught, tmp_path)
    stored = work.folded
    parts = missing_parts(block, stored, SOURCE, taught, site)
    for target in [target for target in work.targets if target.site == site]:
        part = parts[target.path]
        moved_weight = stored[f"{target.name}.weight"] + moved(work, target, part, make_up(part))
        changed = stored | {f"{target.name}.weight": moved_weight}
        before = after = 0.0
        for lesson in taught:
            if target.path == "gen" and not lesson.batch.latent.any():
                continue
            wanted = outputs(block, SOURCE, lesson.batch, target, lesson.entering)
            for tensors in (stored, changed):
                off = outputs(block, tensors, lesson.batch, target) * work.rows[target.name] - wanted
                before, after = (
                    (before + off.norm() ** 2, after) if tensors is stored else (before, after + off.norm() ** 2)
                )
        assert after < 0.05 * before


@pytest.mark.parametrize("site", SITES)
def test_a_linear_is_taken_where_less_is_missing_by_it(site, tmp_path):
    block, taught = entered(0.2)
    work = folded_work(block, taught, tmp_path)
    part = missing_parts(block, work.stored(), SOURCE, taught, site)["gen"]
    target = next(t for t in work.targets if (t.path, t.site) == ("gen", site))
    weight = work.stored()[f"{target.name}.weight"]
    change = moved(work, target, part, make_up(part))
    trials = {
        share: SimpleNamespace(weight=lambda share=share: weight + share * change) for share in (0, 0.5, 1, 1.5, 3)
    }

    def better(one, other) -> bool:
        return less_missing(work, target, None, part, trials[other], trials[one])

    assert better(1, 0.5) and better(0.5, 0) and better(1, 1.5) and better(0, 3)
    assert not better(0.5, 1) and not better(3, 0) and not better(0, 0)


def test_each_site_sees_those_before_it_rounded_and_no_other(tmp_path, monkeypatch):
    block, taught = entered(0.2)
    work = folded_work(block, taught, tmp_path)
    drafts = {t.name: draft(work.folded[f"{t.name}.weight"], Grid(bits=4, group_size=16)) for t in work.targets}
    seen = {}

    def watched(block, tensors, source, taught, site):
        stored = work.stored()
        seen[site] = {
            t.site for t in work.targets if not torch.equal(tensors[f"{t.name}.weight"], stored[f"{t.name}.weight"])
        }
        return missing_parts(block, tensors, source, taught, site)

    monkeypatch.setattr(refine, "missing_parts", watched)
    made = refine.corrected(work, drafts)
    assert seen == {"qkv": set(), "o": {"qkv"}, "gate_up": {"qkv", "o"}, "down": {"qkv", "o", "gate_up"}}
    assert list(seen) == list(SITES)
    assert work.loss(made) < 0.5 * work.loss(drafts)


@pytest.mark.parametrize("site", SITES)
def test_linears_are_compensated_by_what_they_really_read(site, tmp_path, monkeypatch):
    """In the folded layer, on states that are off."""
    block, taught = entered(0.2)
    work = folded_work(block, taught, tmp_path)
    drafts = {t.name: draft(work.folded[f"{t.name}.weight"], Grid(bits=4, group_size=16)) for t in work.targets}
    used = []
    monkeypatch.setattr(refine, "settled", lambda work, linears, made, moments, _: used.append(moments) or made)
    refine.corrected_at(work, drafts, site)
    before = {t.name: drafts[t.name] for t in work.targets if SITES.index(t.site) < SITES.index(site)}
    tensors = work.stored() | weights_of(before)
    wanted = {"und": 0.0, "gen": 0.0}
    for lesson in taught:
        for path, rows in block.trace(tensors, lesson.batch, [(path, site) for path in wanted]).rows.items():
            at = lesson.batch.latent if path[0] == "gen" else ~lesson.batch.latent
            counts = lesson.counts * (lesson.wanted.norm(dim=-1) if site in READERS else 1)
            rows = (rows * counts[:, at, None].sqrt()).flatten(0, 1)
            wanted[path[0]] = wanted[path[0]] + rows.T @ rows
    assert len(used) == 2
    for got, path in zip(used, wanted, strict=True):
        torch.testing.assert_close(got, wanted[path], rtol=2e-2, atol=2e-3 * wanted[path].abs().max().item())


def test_the_first_layer_has_nothing_to_read_otherwise():
    """Float states enter, and are what `entering` is of."""
    block = Block(CONFIG, 0, random_sequences(CONFIG), "cpu")
    assert missing_parts(block, SOURCE, SOURCE, lessons(block, SOURCE, {}), "qkv") == {}


def test_folded_weights_go_back_and_forth(tmp_path):
    block, taught = entered(0.0)
    work = folded_work(block, taught, tmp_path)
    for target in work.targets:
        weight = SOURCE[f"{target.name}.weight"]
        torch.testing.assert_close(work.unfolded(target, work.refolded(target, weight)), weight)
        torch.testing.assert_close(work.unfolded(target, work.folded[f"{target.name}.weight"]), weight)


def test_sites_that_do_not_exist_are_refused():
    with pytest.raises(LanceQuantError, match="residual_sites has no 'mlp'"):
        RecipeConfig(rounding=["gptq", "residual"], residual_sites=["mlp"])
    with pytest.raises(LanceQuantError, match="residual_sites is empty"):
        RecipeConfig(rounding=["gptq", "residual"], residual_sites=[])
