"""The ingredients after nearest: what each promises on its own terms, and the packed bytes of a fixed seed."""

import hashlib
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import lance_quant.awq.search as search
from lance_quant.awq.artifact import INGREDIENTS
from lance_quant.awq.block import Block
from lance_quant.awq.clip import CLIPS, clip_rows, group_blocks, shares
from lance_quant.awq.compensate import Compensation, inverse_factor
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.descend import descend
from lance_quant.awq.grid import Grid, Rounded
from lance_quant.awq.learn import Learning, learn, turns
from lance_quant.awq.lessons import first_lessons, lessons, whole_loss
from lance_quant.awq.moments import split_rows
from lance_quant.awq.rounding import draft
from lance_quant.awq.score import SiteRows
from lance_quant.awq.search import LayerJob, search_layer
from lance_quant.awq.topology import FOLDS, apply, resolve
from lance_quant.checkpoint.layout import layer_targets
from lance_quant.checkpoint.native import unpack_nibbles
from lance_quant.errors import LanceQuantError
from tests.random_layers import random_checkpoint, random_layer, random_sequences, random_sites, small_config

GRID = Grid(bits=4, group_size=16)


def correlated(rows: int = 200, width: int = 64, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width // 4, generator=draw) @ torch.randn(width // 4, width, generator=draw) + torch.randn(
        rows, width, generator=draw
    )


def error(weight, made, x) -> float:
    return (x @ (made.weight() - weight).T).square().sum().item()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_compensation_is_never_worse_than_nearest_on_its_own_rows(bits, seed):
    x = correlated(seed=seed)
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed + 10))
    nearest = draft(weight, replace(GRID, bits=bits))
    made = Compensation(x.T @ x, 0.01)(nearest)
    assert error(weight, made, x) < 0.8 * error(weight, nearest, x)
    assert torch.equal(made.step, nearest.step) and torch.equal(made.zero, nearest.zero)


def test_compensation_keeps_what_is_exact():
    x = correlated()
    x[:, 5] = 0  # a channel that never fires
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    weight[2, 16:32] = 0.75
    made = Compensation(x.T @ x, 0.01)(draft(weight, GRID)).weight()
    assert made.isfinite().all()
    assert torch.equal(made[1], weight[1]) and torch.equal(made[2, 16:32], weight[2, 16:32])
    nothing = draft(weight, GRID)
    assert Compensation(torch.zeros(64, 64), 0.01)(nothing) is nothing


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_descent_lowers_the_error_of_compensated_codes(bits, seed):
    x = correlated(seed=seed)
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed + 10))
    start = Compensation(x.T @ x, 0.01)(draft(weight, replace(GRID, bits=bits)))
    errors = [error(weight, descend(start, weight, x.T @ x, 0.0, passes), x) for passes in range(4)]
    assert errors[1] < 0.97 * errors[0] and errors[3] <= errors[2] <= errors[1]
    made = descend(start, weight, x.T @ x, 0.01, 3)
    assert torch.equal(made.step, made.step.bfloat16().float()) and torch.equal(made.zero, made.zero.round())
    assert made.zero.min() >= 0 and made.zero.max() <= made.grid.top
    torch.testing.assert_close(made.rounded().dequantize(), made.latent, rtol=1e-6, atol=1e-6)  # its own grid holds it


def test_descent_keeps_what_is_exact():
    x = correlated()
    x[:, 5] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    weight[2, 16:32] = 0.75
    made = descend(Compensation(x.T @ x, 0.01)(draft(weight, GRID)), weight, x.T @ x, 0.01, 3).weight()
    assert made.isfinite().all()
    assert torch.equal(made[1], weight[1]) and torch.equal(made[2, 16:32], weight[2, 16:32])
    nothing = draft(weight, GRID)
    assert descend(nothing, weight, torch.zeros(64, 64), 0.01, 3) is nothing


def test_damping_grows_until_there_is_a_factor():
    lone = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    moments = lone.T @ lone - 1e-2 * torch.eye(64)  # not even positive
    factor = inverse_factor(moments, 1e-6)
    assert factor.isfinite().all() and torch.equal(factor, factor.triu())
    good = correlated()
    good = good.T @ good
    factor = inverse_factor(good, 0.01)
    damped = good / good.diagonal().mean() + 0.01 * torch.eye(64)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(64), atol=1e-3, rtol=0)


def test_moments_without_a_factor_still_compensate():
    """A few rows, and a little less than nothing in all other directions: as with the least damping that is enough."""
    x = correlated(rows=8)
    moments = x.T @ x
    short = moments - 2e-4 * moments.diagonal().mean() * torch.eye(64)
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    nearest = draft(weight, GRID)
    made, slight = Compensation(short, 1e-6)(nearest), Compensation(moments, 1e-3)(nearest)
    assert error(weight, made, x) < 1.2 * error(weight, slight, x) < 0.1 * error(weight, nearest, x)


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_never_raises_its_own_error(name):
    x = correlated()
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(3)) ** 3  # long tails
    weight[3] = 0
    weight[4, :16] = -2.0
    nearest = draft(weight, GRID)
    moments = x.T @ x
    if name == "group":
        moments = torch.block_diag(*group_blocks(moments, 16))
    made, low, high = CLIPS[name](nearest, moments, RecipeConfig())
    assert 0.65 <= low <= 1 and 0.65 <= high <= 1

    def own(one):
        change = one.weight() - weight
        return ((change @ moments) * change).sum().item()

    assert own(made) < own(nearest) if name == "group" else own(made) <= own(nearest)
    assert torch.equal(made.weight()[3], weight[3]) and torch.equal(made.weight()[4, :16], weight[4, :16])


@pytest.mark.parametrize("steps", [2, 3, 9])
def test_a_clip_tries_as_many_shares_as_the_recipe_says(steps):
    x, recipe = correlated(), RecipeConfig(clip_steps=steps, clip_least=0.5)
    nearest = draft(torch.randn(400, 64, generator=torch.Generator().manual_seed(3)) ** 3, GRID)
    wanted = torch.linspace(1, 0.5, steps)
    assert shares(recipe) == pytest.approx(wanted.tolist())
    for taken in clip_rows(nearest, group_blocks(x.T @ x, 16), recipe)[2:]:
        torch.testing.assert_close(taken.unique(), wanted.flip(0))
    _, *taken = CLIPS["linear"](nearest, x.T @ x, recipe)
    assert all((wanted - one).abs().min() < 1e-6 for one in taken)


def block_of(config, sequences=None) -> Block:
    return Block(config, 0, sequences or random_sequences(config), "cpu")


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_all_folds_leave_the_products_own_layer_as_it_was(heads, kv_heads, bias, qk_norm):
    config = small_config(heads, kv_heads, bias, qk_norm=qk_norm)
    tensors = random_layer(config, seed=heads * kv_heads)
    block = block_of(config)
    folded = dict(tensors)
    draw = torch.Generator().manual_seed(3)
    for fold in resolve(config, 0, list(FOLDS)):
        columns = tensors[f"{fold.consumers[0].name}.weight"].shape[1]
        apply(fold, folded, torch.rand(len(fold.narrow(torch.ones(columns))), generator=draw) * 3 + 0.3)
    for batch in block.batches:
        torch.testing.assert_close(block.outputs(folded, batch), block.outputs(tensors, batch), rtol=1e-4, atol=1e-4)


def test_rows_of_a_block_are_what_its_linears_read():
    config = small_config()
    tensors = random_layer(config)
    block = block_of(config)
    assert [len(batch.tasks) for batch in block.batches] == [3, 3]
    rows = block.site_rows(tensors)
    counts = {key: len(found.rows) for key, found in rows.items()}
    assert {counts[path, site] for path, site in counts if path == "und"} == {3 * 24 + 3 * 8}
    assert {counts[path, site] for path, site in counts if path == "gen"} == {3 * 16}
    assert set(rows["gen", "down"].tasks) == {"t2i"} and set(rows["und", "o"].tasks) == {"x2t_image", "t2i"}
    states = torch.cat([batch.states.flatten(0, 1) for batch in block.batches if batch.tasks[0] == "x2t_image"])
    norm = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    wanted = norm * tensors["language_model.model.layers.0.input_layernorm.weight"]
    read = rows["und", "qkv"]
    assert set(read.samples) == set(range(6)) and set(rows["gen", "qkv"].samples) == {1, 3, 5}
    got = read.rows[torch.tensor([task == "x2t_image" for task in read.tasks])]
    torch.testing.assert_close(got.float(), wanted, rtol=2**-8, atol=1e-5)


def learning(config, recipe, tensors, block) -> Learning:
    return Learning(block=block, folded=tensors, taught=lessons(block, tensors, {}), recipe=recipe, seed=0)


def test_learned_rounding_lowers_its_own_loss_and_moves_nothing_exact():
    config = small_config()
    tensors = random_layer(config)
    name = "language_model.model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"][3] = 0
    tensors[f"{name}.weight"][4, :16] = 0.25
    drafts = {target.name: draft(tensors[f"{target.name}.weight"], GRID) for target in layer_targets(config, 0)}
    recipe = RecipeConfig(rounding=["nearest", "learned"], learned_steps=30, learned_rate=0.03, learned_tokens=48)
    block = block_of(config)
    made, before, after = learn(learning(config, recipe, tensors, block), drafts)
    assert after < 0.7 * before
    weight = made[name].weight()
    assert torch.equal(weight[3], torch.zeros(64)) and torch.equal(weight[4, :16], torch.full((16,), 0.25))
    again, _, _ = learn(learning(config, recipe, tensors, block), drafts)
    assert all(torch.equal(made[key].codes(), again[key].codes()) for key in made)
    wild = replace(recipe, learned_rate=0.5, range_rate=0.5, learned_steps=1)
    kept, before, after = learn(learning(config, wild, tensors, block), drafts)
    assert after == before and kept is drafts  # a step too far is taken back


def test_a_path_without_tokens_is_not_learned():
    config = small_config()
    tensors = random_layer(config)
    drafts = {target.name: draft(tensors[f"{target.name}.weight"], GRID) for target in layer_targets(config, 0)}
    recipe = RecipeConfig(rounding=["nearest", "learned"], learned_steps=5, learned_rate=0.05)
    questions = random_sequences(config)[::2]
    made, _, _ = learn(learning(config, recipe, tensors, block_of(config, questions)), drafts)
    for target in layer_targets(config, 0):
        assert (made[target.name] is drafts[target.name]) == (target.path == "gen")


def test_tasks_and_paths_count_alike_whatever_their_tokens():
    config = small_config()
    block = block_of(config)
    tensors = random_layer(config)
    taught = lessons(block, tensors, {("t2i", "gen"): 2.0})
    cells = {}
    for lesson in taught:
        change = lesson.wanted.square().sum(-1) * lesson.counts
        for path, at in (("und", ~lesson.batch.latent), ("gen", lesson.batch.latent)):
            if at.any():
                cells[lesson.batch.tasks[0], path] = change[:, at].sum().item()
    assert cells == pytest.approx({("x2t_image", "und"): 0.25, ("t2i", "und"): 0.25, ("t2i", "gen"): 0.5}, rel=1e-4)


def test_a_massive_state_neither_drowns_the_others_nor_is_drowned_out():
    """At equal relative errors the one state that is a hundred times the others weighs as much as a hundred of them."""
    config = small_config()
    kept = random_sequences(config)[::2]
    for one in kept:
        one.states[0] *= 100
    lesson = lessons(block_of(config, kept), random_layer(config), {})[0]
    share = (lesson.counts * lesson.wanted.square().sum(-1)).double()
    norms = lesson.wanted.double().norm(dim=-1)
    assert norms[:, 0].min() > 20 * norms[:, 1:].max() / 4
    torch.testing.assert_close(share / share.sum(), norms / norms.sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("tokens", [1, 96, 10**6])
def test_some_sequences_of_a_lesson_stand_for_all(tokens):
    """Of sequences that are all alike, some are off by as much as all of them."""
    config = small_config()
    question, picture = random_sequences(config, count=1)
    block, tensors = block_of(config, [question] * 4 + [picture] * 4), random_layer(config)
    taught = lessons(block, tensors, {})
    some = first_lessons(taught, tokens)
    assert [len(lesson.counts) for lesson in some] == 2 * [{1: 1, 96: 2}.get(tokens, 4)]
    off = tensors | random_layer(config, seed=1)
    assert whole_loss(block, off, some, 48) == pytest.approx(whole_loss(block, off, taught, 48), rel=1e-5)


def test_every_sequence_has_its_turn_before_any_has_a_second():
    config = small_config()
    taught = lessons(block_of(config), random_layer(config), {})
    order = turns(taught, steps=6, tokens=48, seed=0)
    seen = [(index, row) for turn in order[:3] for index, rows in turn.items() for row in rows]
    assert len(seen) == len(set(seen)) == 6
    assert turns(taught, 6, 48, seed=0) == order != turns(taught, 6, 48, seed=1)


def test_held_out_rows_are_not_fitted():
    rows = SiteRows(torch.arange(40.0)[:, None], torch.tensor([0] * 30 + [1] * 10), 2)
    split = split_rows(rows, 0.25)
    assert len(split.judge.rows) == 7 + 2 and len(split.fit.rows) == 31
    assert not set(split.judge.rows.flatten().tolist()) & set(split.fit.rows.flatten().tolist())
    assert split_rows(rows, 0.0).fit is rows
    few = SiteRows(rows.rows[:33], rows.task[:33], 2)
    assert split_rows(few, 0.25).judge is few


@pytest.mark.parametrize(
    "samples, held", [(8, {3, 7}), (4, {3}), (5, {3})], ids=["every fourth", "as many as that", "one more"]
)
def test_whole_samples_are_held_out(samples, held):
    """A sample's rows come twice, and in no order."""
    sample = torch.arange(samples).repeat_interleave(6)[torch.randperm(6 * samples)].repeat(2)
    rows = SiteRows(torch.randn(len(sample), 4), torch.zeros(len(sample), dtype=torch.int64), 1, sample=sample)
    split = split_rows(rows, 0.25)
    assert set(split.judge.sample.tolist()) == held
    assert set(split.fit.sample.tolist()) == set(range(samples)) - held
    assert len(split.judge.rows) == 12 * len(held) and len(split.fit.rows) == 12 * (samples - len(held))


def test_of_few_samples_the_last_is_held_out_and_of_fewer_still_rows():
    sample = torch.arange(5).repeat_interleave(8)
    rows = SiteRows(torch.randn(40, 4), torch.zeros(40, dtype=torch.int64), 1, sample=sample)
    assert set(split_rows(rows, 0.125).judge.sample.tolist()) == {4}
    three = SiteRows(rows.rows[:24], rows.task[:24], 1, sample=sample[:24])
    assert split_rows(three, 0.125).judge.sample.tolist() == [0, 1, 2]


FAST = RecipeConfig(
    name="fast",
    folds=list(FOLDS),
    evidence=["rows", "sequences"],
    heldout=0.25,
    clip="group",
    clip_steps=4,
    rounding=["gptq", "residual"],
)
BEST = replace(FAST, name="best", rounding=["gptq", "residual", "learned"], learned_steps=8, learned_tokens=48)
LEARNED = replace(BEST, name="learned", rounding=["nearest", "learned", "residual"])


def correlated_sites(config, layer=0):
    sites = random_sites(config, layer, outliers=9.0)
    for index, (key, site) in enumerate(sites.items()):
        width = site.rows.shape[1]
        mix = torch.randn(width, width, generator=torch.Generator().manual_seed(index)) + 2 * torch.eye(width)
        sites[key] = replace(site, rows=(site.rows.float() @ mix).to(torch.bfloat16))
    return sites


def searched(tmp_path, monkeypatch, recipe, name="out", device="cpu", **changes):
    config = small_config()
    checkpoint = random_checkpoint(tmp_path / "model", config)
    monkeypatch.setattr(search, "read_layer", lambda folder, layer: correlated_sites(config))
    monkeypatch.setattr(search, "read_sequences", lambda folder, layer: random_sequences(config))
    out = tmp_path / name
    out.mkdir()
    job = LayerJob(checkpoint=checkpoint, layer=0, capture=tmp_path, recipe=recipe, group_size=16, **changes)
    return out, search_layer(job, out, device)


@pytest.mark.parametrize("recipe", [FAST, BEST], ids=lambda recipe: recipe.name)
def test_the_artifact_of_each_recipe(tmp_path, monkeypatch, recipe):
    out, summary = searched(tmp_path, monkeypatch, recipe)
    linears = pd.read_parquet(out / "linears.parquet")
    assert summary.folded >= 7 and linears.clip_low.between(0.65, 1).all()
    ingredients = pd.read_parquet(out / "ingredients.parquet")
    assert list(ingredients) == INGREDIENTS.names
    each = ingredients[ingredients.name != "layer"].pivot(index="name", columns="ingredient", values="error")
    assert set(each) == {"minmax", "folds", "clip", *recipe.rounding}
    assert (each["gptq"] <= each["clip"] * (1 + 1e-9)).all()  # what does not help is not taken
    assert each.mean()["gptq"] < each.mean()["clip"] < each.mean()["folds"] < each.mean()["minmax"]
    assert list(linears.error_before) == list(each.loc[linears.name, "minmax"])
    assert list(linears.error_after) == list(each.loc[linears.name, recipe.rounding[-1]])
    whole = ingredients[ingredients.name == "layer"].set_index("ingredient").error
    assert list(whole.index) == ["minmax", "folds", "clip", *recipe.rounding]
    assert whole["folds"] < whole["minmax"]
    shares = ingredients.groupby("name").share.agg(["sum", "count"])
    assert (shares["count"] == len(whole) - 1).all()  # minmax itself has none
    taken_off = 1 - whole[recipe.rounding[-1]] / whole["minmax"]
    assert shares.loc["layer", "sum"] == pytest.approx(taken_off)
    assert whole["residual"] < whole["gptq"]
    assert whole[recipe.rounding[-1]] <= whole["residual"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", [FAST, LEARNED], ids=lambda recipe: recipe.name)
def test_same_bytes_again_on_a_gpu(tmp_path, monkeypatch, recipe):
    made = [searched(tmp_path, monkeypatch, recipe, name, device="cuda")[0] for name in ("first", "second")]
    assert (made[0] / "layer.safetensors").read_bytes() == (made[1] / "layer.safetensors").read_bytes()


@pytest.mark.parametrize("recipe", [FAST, LEARNED], ids=lambda recipe: recipe.name)
def test_same_bytes_again(tmp_path, monkeypatch, recipe):
    first, _ = searched(tmp_path, monkeypatch, recipe, "first")
    torch.manual_seed(99)
    second, _ = searched(tmp_path, monkeypatch, recipe, "second")
    digests = [hashlib.sha256((folder / "layer.safetensors").read_bytes()).hexdigest() for folder in (first, second)]
    assert digests[0] == digests[1]
    other, _ = searched(tmp_path, monkeypatch, recipe, "other", seed=1)
    assert ((other / "layer.safetensors").read_bytes() == (first / "layer.safetensors").read_bytes()) is (
        recipe is FAST  # only the order of learning is drawn
    )


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_bits(tmp_path, monkeypatch, bits):
    _, summary = searched(tmp_path, monkeypatch, replace(FAST, rounding=["gptq"]), bits=bits)
    assert summary.error_after < summary.error_before


def test_a_capture_without_sequences_is_refused_by_name(tmp_path, monkeypatch):
    config = small_config()
    checkpoint = random_checkpoint(tmp_path / "model", config)
    monkeypatch.setattr(search, "read_layer", lambda folder, layer: random_sites(config, layer))
    monkeypatch.setattr(search, "read_sequences", lambda folder, layer: [])
    with pytest.raises(LanceQuantError, match="recipe best runs kept sequences .* calibration.sequences=2"):
        search_layer(
            LayerJob(checkpoint=checkpoint, layer=0, capture=tmp_path, recipe=BEST, group_size=16), tmp_path, "cpu"
        )


def as_written(source, file):
    """A layer's tensors as its artifact holds them, folded norms and biases too."""
    made = load_file(file)
    tensors = {key: made.get(key, value).float() for key, value in source.items()}
    for name in (key.removesuffix(".qweight") for key in made if key.endswith(".qweight")):
        parts = (unpack_nibbles(made[f"{name}.qweight"]), made[f"{name}.scales"], made[f"{name}.zeros"])
        tensors[f"{name}.weight"] = Rounded(*parts).dequantize()
    return tensors


def test_a_sequential_recipe_goes_on_where_the_layer_before_ended(tmp_path, monkeypatch):
    config = small_config(layers=2)
    checkpoint = random_checkpoint(tmp_path / "model", config)
    monkeypatch.setattr(search, "read_layer", lambda folder, layer: correlated_sites(config, layer))
    recipe = replace(FAST, name="chain", sequential=True)
    kept = random_sequences(config)
    tensors = {k: v for k, v in load_file(checkpoint.model_file).items() if ".layers.0." in k}
    float_layer = Block(config, 0, kept, "cpu").leave(tensors)
    after = [replace(one, states=float_layer[number]) for number, one in enumerate(kept)]
    monkeypatch.setattr(search, "read_sequences", lambda folder, layer: [kept, after][layer])
    folders = [tmp_path / "0", tmp_path / "1"]
    job = LayerJob(checkpoint=checkpoint, layer=0, capture=tmp_path, recipe=recipe, group_size=16)
    for folder in folders:
        folder.mkdir()
    search_layer(job, folders[0], "cpu")
    left = load_file(folders[0] / "prefix.safetensors")
    assert set(left) == {str(number) for number in range(len(kept))}
    off = [(left[str(n)].float() - float_layer[n].float()).norm() / float_layer[n].float().norm() for n in float_layer]
    assert 0 < max(off) < 0.2
    written = Block(config, 0, kept, "cpu").leave(as_written(tensors, folders[0] / "layer.safetensors"))
    assert all(torch.equal(left[str(number)], state) for number, state in written.items())
    with pytest.raises(LanceQuantError, match="recipe chain is sequential: give search the artifact of layer 0"):
        search_layer(replace(job, layer=1), folders[1], "cpu")
    second = replace(job, layer=1, before=folders[0])
    inputs = search.inputs_of(second, search.read_capture(second), search.read_tensors(second, "cpu"), "cpu")
    for lesson in inputs.taught:  # what the rounded layer left goes in, what the float model makes of its own comes out
        for row, number in enumerate(lesson.batch.numbers):
            assert torch.equal(lesson.batch.states[row], left[str(number)].float())
    search_layer(second, folders[1], "cpu")
    ingredients = pd.read_parquet(folders[1] / "ingredients.parquet")
    whole = ingredients[ingredients.name == "layer"].set_index("ingredient").error
    assert whole["residual"] < whole["gptq"]  # against what the float model puts out
