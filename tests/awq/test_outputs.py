"""What errors of outputs count, and rows that make up for each other."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import lance_quant.awq.refine as refine
import lance_quant.awq.search as search
import lance_quant.model.attention as attention
from lance_quant.awq.block import Block
from lance_quant.awq.compensate import Compensation
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.descend import descend
from lance_quant.awq.grid import Grid
from lance_quant.awq.lessons import lessons, weighed_lessons
from lance_quant.awq.moments import Split
from lance_quant.awq.outputs import TURNS, OutputMoments, block_size, gradient_moments, in_turn
from lance_quant.awq.residual import Missing, missing_parts
from lance_quant.awq.rounding import draft
from lance_quant.awq.score import SiteRows
from lance_quant.awq.search import LayerJob, search_layer
from lance_quant.checkpoint.layout import layer_targets
from lance_quant.checkpoint.native import unpack_nibbles
from lance_quant.errors import LanceQuantError
from tests.awq.test_residual import entered, folded_work
from tests.random_layers import (
    random_checkpoint,
    random_gradients,
    random_layer,
    random_sequences,
    random_sites,
    small_config,
)

GRID = Grid(bits=4, group_size=16)
CONFIG = small_config()
SOURCE = random_layer(CONFIG)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(seed: int, outputs: int = 96, directions: int = 8):
    """A weight, second moments of its inputs, and of gradients that lie in few directions, in two blocks."""
    x = draw(seed, 400, 64) @ draw(seed + 1, 64, 64)
    gradients = draw(seed + 2, 2, 300, directions) @ draw(seed + 3, 2, directions, outputs // 2)
    return draw(seed + 4, outputs, 64) * 0.1, x.T @ x / 400, gradients.mT @ gradients


def cost(change: torch.Tensor, moments: torch.Tensor, outputs: OutputMoments) -> float:
    whole = torch.block_diag(*outputs.blocks)
    return (whole @ change @ moments * change).sum().item()


def together(made, moments):
    return Compensation(moments, 0.01)(made)


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_rows_make_up_for_each_other(seed):
    weight, moments, gradients = problem(seed)
    outputs = OutputMoments.of(gradients, 0.1)
    nearest = draft(weight, GRID)
    (turned,) = in_turn([nearest], [outputs], lambda made: together(made, moments))
    alone, best = (cost(made.weight() - weight, moments, outputs) for made in (together(nearest, moments), turned))
    assert best < 0.5 * alone


@pytest.mark.parametrize("outputs", [96, 34])
def test_rows_that_have_nothing_in_common_are_rounded_as_all_at_once(outputs):
    """Two blocks, of rows that each count something else; steps and zero points moved by descent."""
    weight, moments, _ = problem(3, outputs)
    sizes = draw(5, 2, outputs // 2).abs() + 0.1
    nearest = draft(weight, GRID)

    def settle(made):
        return descend(together(made, moments), made.latent, moments, 0.01, 2)

    (turned,) = in_turn([nearest], [OutputMoments(torch.diag_embed(sizes))], settle)
    alone = settle(nearest)
    torch.testing.assert_close(turned.weight(), alone.weight())
    assert torch.equal(turned.step, alone.step) and torch.equal(turned.zero, alone.zero)
    assert not torch.equal(turned.step, nearest.step)


def test_each_turn_is_what_costs_least_behind_the_turns_before():
    """Rows to nearest, which leaves only what rows do for each other: the minimum over those that are left, exactly."""
    weight, _, gradients = problem(6)
    outputs = OutputMoments.of(gradients, 0.1)
    (turned,) = in_turn([draft(weight, GRID)], [outputs], lambda made: made)
    nearest, made = draft(weight, GRID), torch.zeros_like(weight)
    for block, moments in enumerate(outputs.blocks.double()):
        order = moments.diagonal().argsort(descending=True) + 0
        here = block * 48 + order
        moments, wanted = moments[order][:, order], weight[here].double()
        for first in range(0, 48, 48 // TURNS):
            done, left = slice(0, first), slice(first, 48)
            error = wanted[done] - made[here[done]].double()
            pull = torch.linalg.solve(moments[left, left], moments[left, done] @ error)
            rows = here[first : first + 48 // TURNS]
            part = replace(nearest, latent=(wanted[left] + pull)[: len(rows)].float())
            part = replace(part, step=nearest.step[rows], zero=nearest.zero[rows], constant=nearest.constant[rows])
            made[rows] = part.weight()
    assert (turned.weight() == made).float().mean() > 0.995  # a tie may fall to the other side


def test_linears_of_one_input_go_together_and_know_nothing_of_each_other():
    weight, moments, gradients = problem(7)
    other, _, others = problem(8, outputs=32)
    outputs = [OutputMoments.of(gradients, 0.3), OutputMoments.of(others, 0.3)]
    drafts, sizes = [draft(weight, GRID), draft(other, GRID)], []

    def settle(made):
        sizes.append(len(made.latent))
        return together(made, moments)

    pair = in_turn(drafts, outputs, settle)
    assert len(sizes) == TURNS and sum(sizes) == 96 + 32
    for made, one, both in zip(drafts, outputs, pair, strict=True):
        (alone,) = in_turn([made], [one], lambda part: together(part, moments))
        assert torch.equal(alone.codes(), both.codes())


def test_what_is_exact_stays_exact():
    weight, moments, gradients = problem(4)
    weight[5, 16:32], weight[7], weight[60] = 0.3, 0.0, -0.02
    (turned,) = in_turn(
        [draft(weight, GRID)], [OutputMoments.of(gradients, 0.01)], lambda made: together(made, moments)
    )
    made = turned.weight()
    assert made.isfinite().all()
    torch.testing.assert_close(made[5, 16:32], weight[5, 16:32], rtol=2**-8, atol=0)
    torch.testing.assert_close(made[60], weight[60], rtol=2**-8, atol=0)
    assert not made[7].any()


def test_no_gradient_counts_nothing():
    assert OutputMoments.of(torch.zeros(2, 4, 4), 0.3) is None
    assert OutputMoments.of(torch.full((2, 4, 4), float("nan")), 0.3) is None


def test_damping_counts_all_outputs():
    made = OutputMoments.of(torch.diag_embed(torch.tensor([[4.0, 0.0], [0.0, 4.0]])), 0.5)
    torch.testing.assert_close(made.blocks.diagonal(dim1=1, dim2=2), torch.tensor([[2.5, 0.5], [0.5, 2.5]]))


def test_folded_outputs_cost_what_they_did():
    _, moments, gradients = problem(9)
    outputs, rows = OutputMoments.of(gradients, 0.3), draw(11, 96).abs() + 0.2
    change = draw(12, 96, 64)
    was = cost(change, moments, outputs)
    assert cost(change / rows[:, None], moments, outputs.folded(rows)) == pytest.approx(was, rel=1e-4)
    root = torch.linalg.cholesky(moments)
    assert (outputs.weighed(change) @ root).square().sum().item() == pytest.approx(was, rel=1e-4)


def test_blocks_are_the_largest_that_divide():
    assert [block_size(outputs) for outputs in (64, 1024, 2048, 11008, 1536, 576)] == [64, 1024, 1024, 688, 768, 576]


def gradients_of(kept) -> dict[int, torch.Tensor]:
    return {number: draw(30 + number, *one.states.shape).bfloat16() for number, one in enumerate(kept)}


@pytest.mark.parametrize("in_parts", [False, True])
def test_gradients_are_those_of_the_weights(in_parts, monkeypatch):
    """Of every linear: that of its weight is its outputs' gradients times what it read. in_parts: attention as on a
    GPU, where its way back has a fixed order only so."""
    calls = []
    if in_parts:
        monkeypatch.setattr(attention, "fixed_order", lambda: True)
        monkeypatch.setattr(attention, "PART", 5)
    real = attention._in_parts
    monkeypatch.setattr(attention, "_in_parts", lambda *some: calls.append(some) or real(*some))
    kept = random_sequences(CONFIG, count=2)
    block, behind = Block(CONFIG, 0, kept, "cpu"), gradients_of(kept)
    for number, target in enumerate(layer_targets(CONFIG, 0)):
        site, key = (target.path, target.site), f"{target.name}.weight"
        weight, expected, found = SOURCE[key].clone().requires_grad_(), 0.0, 0.0
        for batch in block.batches:
            pull = torch.stack([behind[number] for number in batch.numbers]).float()
            expected = expected + (block.outputs(SOURCE | {key: weight}, batch) * pull).sum()
            rows = block.trace(SOURCE, batch, [site]).rows
            gradient = block.gradients(SOURCE, batch, pull)[number]
            assert (gradient is None) == (site not in rows)
            if gradient is not None:
                found = found + gradient.flatten(0, 1).T @ rows[site].flatten(0, 1)
        (wanted,) = torch.autograd.grad(expected, weight)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    assert bool(calls) == in_parts


def test_tasks_count_as_they_weigh_however_many_sequences_they_have():
    kept = random_sequences(CONFIG, count=3)
    block, behind = Block(CONFIG, 0, kept, "cpu"), gradients_of(kept)
    some = {number: behind[number] for number in (0, 1, 3, 5)}  # one question, three pictures
    counts = {("x2t_image", "und"): 2.0, ("t2i", "und"): 1.0, ("t2i", "gen"): 4.0}
    found = gradient_moments(block, SOURCE, some, counts)
    assert set(found) == {target.name for target in layer_targets(CONFIG, 0)}
    for target in layer_targets(CONFIG, 0):
        wanted = 0.0
        for batch in block.batches:
            for row, number in enumerate(batch.numbers):
                if number in some:
                    part = batch.part([row])
                    each = block.gradients(SOURCE, part, some[number].float()[None])
                    gradient = dict(zip(layer_targets(CONFIG, 0), each, strict=True))[target]
                    if gradient is not None:
                        weight = counts[part.tasks[0], target.path] / {"x2t_image": 1, "t2i": 3}[part.tasks[0]]
                        wanted = wanted + weight * gradient[0].T @ gradient[0]
        torch.testing.assert_close(found[target.name].squeeze(0), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max())


def test_a_path_without_gradients_has_none():
    kept = random_sequences(CONFIG, count=2)
    found = gradient_moments(Block(CONFIG, 0, kept, "cpu"), SOURCE, {0: gradients_of(kept)[0]}, {})
    assert set(found) == {target.name for target in layer_targets(CONFIG, 0) if target.path == "und"}


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_latents_count_as_their_gradients_do(share):
    """A share of it; what a task counts, what text counts, and sequences without gradients stay as they were."""
    kept = random_sequences(CONFIG, count=3)
    block, behind = Block(CONFIG, 0, kept, "cpu"), gradients_of(kept)
    del behind[1]  # of three pictures, 1, 3 and 5, the first
    plain = lessons(block, SOURCE, {})
    for was, now in zip(plain, weighed_lessons(plain, behind, share), strict=True):
        latent = was.batch.latent
        assert torch.equal(now.counts[:, ~latent], was.counts[:, ~latent])
        if latent.any():
            rows = [row for row, number in enumerate(was.batch.numbers) if number in behind]
            before, after = was.counts[rows][:, latent], now.counts[rows][:, latent]
            squares = torch.stack([behind[was.batch.numbers[row]].float().square().sum(-1) for row in rows])[:, latent]
            wanted = (1 - share) * before + share * squares / squares.sum() * before.sum()
            torch.testing.assert_close(after, wanted)
            assert torch.equal(now.counts[was.batch.numbers.index(1)], was.counts[was.batch.numbers.index(1)])
        else:
            assert torch.equal(now.counts, was.counts)


def test_each_task_keeps_what_it_counts():
    kept = random_sequences(CONFIG, count=3)
    kept[3] = replace(kept[3], task="image_edit")
    block, behind = Block(CONFIG, 0, kept, "cpu"), gradients_of(kept)
    behind[3] = behind[3] * 50
    plain = lessons(block, SOURCE, {})

    def shares(taught):
        return {
            task: sum(
                lesson.counts[row, lesson.batch.latent].sum().item()
                for lesson in taught
                for row, of in enumerate(lesson.batch.tasks)
                if of == task
            )
            for task in ("t2i", "image_edit")
        }

    assert shares(weighed_lessons(plain, behind, 0.8)) == pytest.approx(shares(plain))


def some_outputs(work, seed: int = 20) -> dict[str, OutputMoments]:
    made = {}
    for number, target in enumerate(work.targets):
        gradients = draw(seed + number, 1, 40, 5) @ draw(seed + 100 + number, 1, 5, target.out_features)
        made[target.name] = OutputMoments.of(gradients.mT @ gradients, 0.3)
    return made


def test_what_is_rounded_is_weighed_as_it_is_folded(tmp_path, monkeypatch):
    """In a layer whose folds scale rows, of up_proj and v_proj; a linear without gradients goes beside the others."""
    block, taught = entered(0.2)
    work = replace(folded_work(block, taught, tmp_path), recipe=RECIPE)
    known = some_outputs(work)
    without = next(target.name for target in work.targets if "k_proj" in target.name)
    work.outputs = {name: one for name, one in known.items() if name != without}
    used = []
    real = refine.in_turn
    monkeypatch.setattr(
        refine, "in_turn", lambda drafts, moments, settle: used.append(moments) or real(drafts, moments, settle)
    )
    drafts = {t.name: draft(work.folded[f"{t.name}.weight"], GRID) for t in work.targets}
    moments = torch.eye(CONFIG.hidden_size)
    for path in ("und", "gen"):
        for site in ("qkv", "gate_up"):
            linears = [target for target in work.targets if (target.path, target.site) == (path, site)]
            made = refine.settled(work, linears, [drafts[t.name] for t in linears], moments, work.outputs)
            weighed = [target for target in linears if target.name != without]
            assert [len(one.latent) for one in made] == [target.out_features for target in linears]
            for target, got in zip(weighed, used[-1], strict=True):
                rows = work.rows[target.name]
                torch.testing.assert_close(got.blocks[0], known[target.name].blocks[0] * rows[:, None] * rows)
                assert (rows != 1).any() == any(leaf in target.name for leaf in ("up_proj", "v_proj"))


def test_choices_are_made_by_what_counts(tmp_path):
    """Of two weights, one errs less, the other where it does not count."""
    block, taught = entered(0.2)
    work = folded_work(block, taught, tmp_path)
    target = next(target for target in work.targets if target.site == "down")
    folded = work.folded[f"{target.name}.weight"]
    size = target.out_features
    counting = torch.full((size,), 1e-4)
    counting[: size // 2] = 1.0
    work.outputs = {target.name: OutputMoments(torch.diag(counting)[None])}
    noise = draw(3, *folded.shape) * 0.01
    little, much = noise.clone(), 3 * noise
    little[size // 2 :], much[: size // 2] = 0, 0
    was, trial = (SimpleNamespace(weight=lambda change=change: folded + change) for change in (little, much))
    split = Split(SiteRows(draw(4, 50, target.in_features), torch.zeros(50, dtype=torch.int64), 1), None)
    split = Split(split.fit, split.fit)
    assert not refine.closer(work, target, split, was, trial)
    assert refine.closer(work, target, split, was, trial, work.outputs[target.name])
    assert refine.less_missing(work, target, split, None, was, trial)
    part = missing_parts(block, work.stored(), work.source, taught, "down")[target.path]
    assert refine.less_missing(work, target, split, part, was, trial)
    work.outputs = {}
    assert not refine.less_missing(work, target, split, None, was, trial)
    assert not refine.less_missing(work, target, split, part, was, trial)


@pytest.mark.parametrize("adds", [False, True])
def test_what_is_missing_is_weighed(adds):
    weight, change = draw(1, 6, 5), draw(2, 6, 5)
    inputs, missing = draw(3, 30, 5), draw(4, 30, 6 if adds else 5)
    gradients = draw(5, 1, 9, 6)
    outputs = OutputMoments.of(gradients.mT @ gradients, 0.2)
    left = (missing if adds else missing @ weight.T) - inputs @ change.T
    wanted = (left @ outputs.blocks[0] * left).sum().item()
    assert Missing(inputs, missing, 20, adds).error(weight, change, outputs) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "weighed"),
    [
        ({}, {"qkv", "o", "gate_up", "down"}),
        ({"residual_sites": ["down"]}, {"qkv", "o", "gate_up", "down"}),
        ({"rounding": ["gptq"]}, {"qkv", "o", "gate_up", "down"}),
        ({"gradients": False}, set()),
    ],
)
def test_every_site_is_weighed_once_where_it_is_rounded_for_good(tmp_path, monkeypatch, changes, weighed):
    """The first layer's q, k and v too, where nothing is missing."""
    counts = Counter()
    real = refine.settled

    def settled(work, linears, drafts, moments, outputs):
        counts[linears[0].site] += any(target.name in outputs for target in linears)
        return real(work, linears, drafts, moments, outputs)

    monkeypatch.setattr(refine, "settled", settled)
    searched(tmp_path, monkeypatch, replace(RECIPE, **changes))
    assert {site: count for site, count in counts.items() if count} == dict.fromkeys(weighed, 2)  # both paths


def test_gradients_are_taken_through_the_float_layer_on_float_states(tmp_path, monkeypatch):
    """In a layer that rounded ones' states enter; and latents are weighed by them."""
    config = small_config(layers=2)
    checkpoint, kept = random_checkpoint(tmp_path / "model", config), random_sequences(config)
    monkeypatch.setattr(search, "read_layer", lambda folder, layer: random_sites(config, layer, outliers=9.0))
    monkeypatch.setattr(search, "read_sequences", lambda folder, layer: kept)
    monkeypatch.setattr(search, "read_gradients", lambda folder, layer: random_gradients(kept))
    monkeypatch.setattr(search, "read_prefix", lambda job: {n: one.states + 1 for n, one in enumerate(kept)})
    seen, shares = [], []
    real, weigh = search.gradient_moments, search.weighed_lessons

    def moments(block, tensors, gradients, counts):
        seen.append(torch.equal(block.batches[0].states[0], kept[block.batches[0].numbers[0]].states.float()))
        return real(block, tensors, gradients, counts)

    monkeypatch.setattr(search, "gradient_moments", moments)
    monkeypatch.setattr(search, "weighed_lessons", lambda *a: shares.append(a[2]) or weigh(*a))
    (tmp_path / "out").mkdir()
    recipe = replace(RECIPE, sequential=True, gradient_share=0.7)
    job = LayerJob(checkpoint=checkpoint, layer=1, capture=tmp_path, recipe=recipe, group_size=16, before=tmp_path)
    search_layer(job, tmp_path / "out", "cpu")
    assert seen == [True] and shares == [0.7]


def test_gradients_need_sequences():
    assert RecipeConfig(gradients=True, rounding=["gptq"]).needs_sequences


RECIPE = RecipeConfig(
    name="weighed",
    folds=["input_norm", "post_attention_norm", "up_down", "v_o"],
    evidence=["rows", "sequences"],
    rounding=["gptq", "residual"],
    residual_sites=["qkv", "o", "gate_up", "down"],
    gradients=True,
)


def searched(tmp_path, monkeypatch, recipe, name="out", device="cpu"):
    checkpoint = random_checkpoint(tmp_path / "model", CONFIG)
    kept = random_sequences(CONFIG, count=6)
    monkeypatch.setattr(search, "read_layer", lambda folder, layer: random_sites(CONFIG, layer, outliers=9.0))
    monkeypatch.setattr(search, "read_sequences", lambda folder, layer: kept)
    monkeypatch.setattr(search, "read_gradients", lambda folder, layer: random_gradients(kept))
    out = tmp_path / name
    out.mkdir()
    job = LayerJob(checkpoint=checkpoint, layer=0, capture=tmp_path, recipe=recipe, group_size=16)
    search_layer(job, out, device)
    return out


def test_a_search_errs_less_where_it_counts(tmp_path, monkeypatch):
    """Behind the layer, along the directions that its gradients are of."""
    kept = random_sequences(CONFIG, count=6)
    block = Block(CONFIG, 0, kept, "cpu")
    directions = torch.linalg.svd(torch.cat(list(random_gradients(kept).values())).float()).Vh[:4]
    source = {
        k: v for k, v in load_file(random_checkpoint(tmp_path / "m", CONFIG).model_file).items() if ".layers.0." in k
    }
    errors = {}
    for recipe in (RECIPE, replace(RECIPE, name="alike", gradients=False)):
        made = load_file(searched(tmp_path, monkeypatch, recipe, recipe.name) / "layer.safetensors")
        tensors = source | {k: v.float() for k, v in made.items() if k in source}
        for target in layer_targets(CONFIG, 0):
            codes = unpack_nibbles(made[f"{target.name}.qweight"]).unflatten(-1, (-1, 16)).float()
            steps = codes - made[f"{target.name}.zeros"][..., None].float()
            tensors[f"{target.name}.weight"] = (steps * made[f"{target.name}.scales"][..., None].float()).flatten(1)
        change = [block.outputs(tensors, batch) - block.outputs(source, batch) for batch in block.batches]
        errors[recipe.name] = sum((one @ directions.T).square().sum().item() for one in change)
    assert errors["weighed"] < 0.8 * errors["alike"]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_same_bytes_again(tmp_path, monkeypatch, device):
    made = [searched(tmp_path, monkeypatch, RECIPE, name, device) / "layer.safetensors" for name in ("one", "two")]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_a_capture_without_gradients_is_refused_by_name(tmp_path, monkeypatch):
    checkpoint = random_checkpoint(tmp_path / "model", CONFIG)
    monkeypatch.setattr(search, "read_layer", lambda folder, layer: random_sites(CONFIG, layer))
    monkeypatch.setattr(search, "read_sequences", lambda folder, layer: random_sequences(CONFIG))
    job = LayerJob(checkpoint=checkpoint, layer=0, capture=tmp_path, recipe=RECIPE, group_size=16)
    with pytest.raises(LanceQuantError, match="recipe weighed weighs errors .* calibration.gradient_tokens=32000"):
        search_layer(job, tmp_path, "cpu")


def test_gradients_without_compensation_are_refused():
    with pytest.raises(LanceQuantError, match="gradients=true acts in compensation: add gptq or residual"):
        RecipeConfig(gradients=True, rounding=["nearest"])
