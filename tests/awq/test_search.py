"""Parity of `published` with the golden file, and what `awq` promises beyond it."""

import json
from dataclasses import replace
from math import sqrt

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import lance_quant.awq.search as search
from lance_quant.awq.artifact import LINEARS
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.grid import grid_of, quantize
from lance_quant.awq.moments import split_rows
from lance_quant.awq.score import Evidence, OutputError, SiteRows, SyntheticScore, evidence
from lance_quant.awq.search import LayerJob, quantize_layer, read_tensors, search_layer
from lance_quant.awq.topology import FOLDS, resolve
from lance_quant.checkpoint.layout import layer_targets, targets
from lance_quant.checkpoint.native import FOLDED, PLAIN, UNSEEN, pack_nibbles
from lance_quant.errors import LanceQuantError
from lance_quant.model.parity import WEIGHTS
from tests.golden_cases import FOLDER, GOLDEN
from tests.published import AWQ, MINMAX, PUBLISHED
from tests.random_layers import (
    checkpoint_of,
    random_checkpoint,
    random_evidence,
    random_layer,
    random_sites,
    small_config,
)


def small_job(recipe: RecipeConfig, **changes) -> LayerJob:
    job = LayerJob(
        checkpoint=checkpoint_of(FOLDER, small_config()), layer=0, capture=None, recipe=recipe, group_size=32
    )
    return replace(job, **changes)


def run(recipe: RecipeConfig, tensors=None, known=None, **changes):
    job = small_job(recipe, **changes)
    folds = resolve(job.checkpoint.config, 0, recipe.folds)
    known = known if known is not None else Evidence()
    return quantize_layer(tensors or random_layer(job.checkpoint.config), folds, known, job)


def golden_layer(layer: int):
    """The published recipe on one layer of the fixture, from the fixture's own statistics."""
    config = GOLDEN.config()
    job = small_job(PUBLISHED, checkpoint=checkpoint_of(FOLDER / WEIGHTS, config), layer=layer)
    statistics = load_file(FOLDER / "published_awq_stats.safetensors")
    mean_abs = {
        target.name: statistics[f"{target.name}.mean_abs"]
        for target in layer_targets(config, layer)
        if f"{target.name}.mean_abs" in statistics
    }
    return quantize_layer(read_tensors(job, "cpu"), resolve(config, layer, PUBLISHED.folds), Evidence(mean_abs), job)


@pytest.mark.parametrize("layer", [0, 1])
def test_published_is_the_golden_file_byte_for_byte(layer):
    golden = load_file(FOLDER / "published_awq_g32.safetensors")
    torch.manual_seed(11)
    state = torch.get_rng_state()
    result = golden_layer(layer)
    assert torch.equal(torch.get_rng_state(), state), "the search moved the global random state"
    made = dict(result.folded_tensors)
    for name, rounded in result.rounded.items():
        made |= {
            f"{name}.qweight": pack_nibbles(rounded.codes),
            f"{name}.scales": rounded.scales,
            f"{name}.zeros": rounded.zeros,
        }
    expected = {key: tensor for key, tensor in golden.items() if f".layers.{layer}." in key}
    assert len(expected) == 46 and set(made) == set(expected)
    for key, tensor in expected.items():
        assert made[key].dtype == tensor.dtype and torch.equal(made[key], tensor), key


def test_published_schemes_are_those_of_the_golden_meta():
    meta = json.loads((FOLDER / "published_awq_g32_meta.json").read_text())
    rows = [row for layer in (0, 1) for row in golden_layer(layer).linears]
    assert {f"{row['name']}.weight": row["scheme"] for row in rows} == {
        key: row["scheme"] for key, row in meta["per_weight"].items()
    }


def test_published_without_statistics_and_fallback():
    """und.down alone does not divide by 64; nothing was seen on the generation path."""
    known = random_evidence(small_config())
    known = Evidence({name: a for name, a in known.mean_abs.items() if "moe_gen" not in name})
    rows = {row["name"]: row for row in run(PUBLISHED, known=known, group_size=64).linears}
    prefix = "language_model.model.layers.0."
    assert rows[f"{prefix}self_attn.q_proj"]["scheme"] == FOLDED
    assert rows[f"{prefix}self_attn.q_proj_moe_gen"]["scheme"] == UNSEEN
    assert rows[f"{prefix}self_attn.o_proj_moe_gen"]["scheme"] == PLAIN
    assert rows[f"{prefix}mlp.down_proj"]["group_size"] == 32
    assert rows[f"{prefix}mlp.up_proj"]["group_size"] == 64
    with pytest.raises(LanceQuantError, match="group_size=48 does not divide the 64 inputs of .*q_proj"):
        run(PUBLISHED, known=known, group_size=48)  # a fold is searched at the group size that was asked for


def test_the_published_score_does_not_clamp_its_trial_zero():
    """On weights of one sign, where the fixture has none: the formula of the published search, written out again."""
    config = small_config()
    tensors = {key: tensor.abs() + 0.3 for key, tensor in random_layer(config).items()}
    known = random_evidence(config)
    fold = resolve(config, 0, ["post_attention_norm"])[0]
    scale = torch.rand(64, generator=torch.Generator().manual_seed(4)) + 0.5
    mean = known.mean_abs[fold.consumers[0].name]
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0xC0DE)) * mean
    wanted = 0.0
    for target in fold.consumers:
        weight = tensors[f"{target.name}.weight"]
        groups = (weight * scale).view(-1, 2, 32)
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
        zero = (-groups.amin(-1, keepdim=True) / step).round()
        assert zero.max() < 0
        rounded = (((groups / step + zero).round().clamp(0, 15) - zero) * step).view_as(weight)
        wanted += ((x / scale) @ rounded.T - x @ weight.T).square().mean().item()
    score = SyntheticScore(fold, tensors, known, grid_of(PUBLISHED, 4, 32))
    assert score(scale).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_awq_beats_minmax_where_channels_stand_out(bits):
    known = random_evidence(small_config(), outliers=20.0)
    scaled = run(AWQ, known=known, bits=bits).linears
    plain = run(MINMAX, known=known, bits=bits).linears
    for one, other in zip(scaled, plain, strict=True):
        assert one["error_before"] == pytest.approx(other["error_after"], rel=1e-5)
        assert one["error_kind"] == "output"
        if one["scheme"] == FOLDED:
            assert one["error_after"] < 0.8 * other["error_after"], one["name"]
        else:
            assert one["site"] in ("o", "down")
            assert one["error_after"] == other["error_after"]


def test_identity_is_kept_where_no_scale_helps():
    """Weights already on the grid are rounded without loss; any scale would only hurt."""
    draw = torch.Generator().manual_seed(0)
    tensors = random_layer(small_config())
    for target in layer_targets(small_config(), 0):
        codes = torch.randint(0, 16, (target.out_features, target.in_features), generator=draw).float()
        codes[:, ::32], codes[:, 1::32] = 0, 15
        tensors[f"{target.name}.weight"] = (codes - 7) * 0.125
    result = run(AWQ, tensors, random_evidence(small_config()))
    assert {found.best.family for found in result.found} == {"identity"}
    assert not result.folded_tensors
    assert {row["scheme"] for row in result.linears} == {PLAIN}
    assert max(row["error_after"] for row in result.linears) < 1e-6


def test_all_four_folds_run_through_the_same_engine():
    recipe = RecipeConfig(name="all", folds=list(FOLDS))
    config = small_config()
    known = random_evidence(config, outliers=20.0)
    result = run(recipe, known=known)
    assert {row["scheme"] for row in result.linears} == {FOLDED}
    changed = {key.rsplit(".", 1)[0].rsplit(".", 1)[-1] for key in result.folded_tensors}
    assert changed >= {"v_proj", "v_proj_moe_gen", "input_layernorm", "post_attention_layernorm_moe_gen"}
    for row in result.linears:  # in the unfolded layer's own terms, producers' rows included
        assert row["error_after"] < row["error_before"] * 1.05, row


def test_each_task_counts_equally_whatever_its_size_and_rows():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=draw)
    rows = torch.randn(50, 64, generator=draw)
    rows[10:] *= 100
    task = torch.tensor([0] * 10 + [1] * 40)
    change = torch.randn(8, 64, generator=draw) * 0.01
    apart = [rows[task == t] for t in (0, 1)]
    wanted = sum(((x @ change.T).square().sum() / (x @ weight.T).square().sum()).item() for x in apart) / 2
    assert OutputError(weight, SiteRows(rows, task, 2))(change) == pytest.approx(wanted, rel=1e-5)
    twice = SiteRows(torch.cat([rows, rows]), torch.cat([task, task]), 2)  # more rows than channels: by second moments
    assert OutputError(weight, twice)(change) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.5, 4.0)])
def test_each_task_counts_as_its_weight_says(weights):
    key, tasks = ("und", "qkv"), ("x2t_image", "t2i")
    site = random_sites(small_config(), rows=60)[key]  # the second task's rows are thirty times as large
    rows = site.rows.float()
    draw = torch.Generator().manual_seed(0)
    weight, change = torch.randn(8, 64, generator=draw), torch.randn(8, 64, generator=draw) * 0.01
    known = evidence(
        {key: replace(site, weights=dict(zip(tasks, weights, strict=True)))},
        layer_targets(small_config(), 0),
        by_token=False,
        device="cpu",
    )
    apart = [((x @ change.T).norm() / (x @ weight.T).norm()).item() ** 2 for x in (rows[:30], rows[30:])]
    wanted = sum(count * one for count, one in zip(weights, apart, strict=True)) / sum(weights)
    assert OutputError(weight, known.rows[key])(change) == pytest.approx(wanted, rel=1e-4)
    mean = sum(count * x.abs().mean(0) for count, x in zip(weights, (rows[:30], rows[30:]), strict=True)) / sum(weights)
    for found in known.mean_abs.values():
        torch.testing.assert_close(found, mean)


def searched(tmp_path, monkeypatch, recipe=AWQ, name="out", sites=None, **changes):
    config = small_config()
    checkpoint = random_checkpoint(tmp_path / "model", config)
    monkeypatch.setattr(search, "read_layer", lambda folder, layer: sites or random_sites(config, layer, outliers=9.0))
    out = tmp_path / name
    out.mkdir()
    job = small_job(recipe, checkpoint=checkpoint, capture=tmp_path, **changes)
    return out, search_layer(job, out, "cpu")


def test_the_artifact(tmp_path, monkeypatch):
    out, summary = searched(tmp_path, monkeypatch)
    names = ["ingredients.parquet", "layer.safetensors", "linears.parquet", "losses.parquet"]
    assert sorted(path.name for path in out.iterdir()) == names
    tensors = load_file(out / "layer.safetensors")
    names = [target.name for target in targets(small_config())]
    parts = {f"{name}.{part}" for name in names for part in ("qweight", "scales", "zeros")}
    scales = {f"scale.{path}.{fold}" for path in ("und", "gen") for fold in AWQ.folds}
    norms = {key for key in tensors if key.endswith("norm.weight") or key.endswith("norm_moe_gen.weight")}
    assert set(tensors) == parts | scales | norms and len(norms) == 4
    losses = pd.read_parquet(out / "losses.parquet")
    assert list(losses) == ["layer", "path", "fold", "family", "alpha", "loss", "chosen"]
    for _, curve in losses.groupby(["path", "fold"]):
        assert len(curve) == 1 + 2 * 21 and curve.chosen.sum() == 1
        assert curve.loss[curve.chosen].item() == curve.loss.min()
    linears = pd.read_parquet(out / "linears.parquet")
    assert list(linears.name) == names and list(linears) == LINEARS.names
    assert summary.linears == 14 and summary.folded == 10
    assert summary.error_after == pytest.approx(linears.error_after.mean())
    assert summary.error_after < summary.error_before


def test_errors_are_those_of_the_rows_that_are_held_out(tmp_path, monkeypatch):
    out, _ = searched(tmp_path, monkeypatch, replace(AWQ, heldout=0.25))
    linears = pd.read_parquet(out / "linears.parquet").set_index("name")
    config = small_config()
    known, source = random_evidence(config, outliers=9.0), load_file(tmp_path / "model" / "model.safetensors")
    for target in layer_targets(config, 0):
        weight, rows = source[f"{target.name}.weight"], known.rows_of(target)
        judge = split_rows(rows, 0.25).judge
        assert len(judge.rows) == len(rows.rows) // 4
        nearest = quantize(weight, grid_of(AWQ, 4, 32)).dequantize()
        error = sqrt(OutputError(weight, judge)(nearest - weight))
        assert linears.error_before[target.name] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("recipe", [AWQ, PUBLISHED, MINMAX], ids=lambda recipe: recipe.name)
def test_same_bytes_again_and_on_more_threads(tmp_path, monkeypatch, recipe):
    first, _ = searched(tmp_path, monkeypatch, recipe, "first")
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    torch.manual_seed(99)
    second, _ = searched(tmp_path, monkeypatch, recipe, "second")
    torch.set_num_threads(threads)
    assert (first / "layer.safetensors").read_bytes() == (second / "layer.safetensors").read_bytes()


def test_five_bits_are_stored_a_byte_a_code(tmp_path, monkeypatch):
    out, _ = searched(tmp_path, monkeypatch, MINMAX, bits=5)
    tensor = load_file(out / "layer.safetensors")["language_model.model.layers.0.self_attn.q_proj.qweight"]
    assert tuple(tensor.shape) == (64, 64) and tensor.max() > 15


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(LanceQuantError, match="group_size=64 does not divide the 96 inputs"):
        searched(tmp_path, monkeypatch, AWQ, "a", group_size=64)
    with pytest.raises(LanceQuantError, match="bits=2"):
        searched(tmp_path, monkeypatch, AWQ, "b", bits=2)
    checkpoint = random_checkpoint(tmp_path / "model", small_config())
    with pytest.raises(LanceQuantError, match="recipe awq scores captured activations"):
        search_layer(small_job(AWQ, checkpoint=checkpoint), tmp_path, "cpu")
    sites = random_sites(small_config())
    sites["und", "qkv"].rows[3, 3] = float("inf")
    with pytest.raises(LanceQuantError, match="und.input_norm .* captured rows hold NaN or infinity"):
        searched(tmp_path, monkeypatch, AWQ, "c", sites=sites)
    tensors = load_file(checkpoint.model_file)
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    tensors[key][0, 0] = float("nan")
    save_file(tensors, checkpoint.model_file)
    with pytest.raises(LanceQuantError, match=f"'{key}' holds NaN"):
        search_layer(small_job(MINMAX, checkpoint=checkpoint), tmp_path, "cpu")


def test_a_site_without_tokens_takes_no_scale(tmp_path, monkeypatch):
    sites = random_sites(small_config())
    for key in list(sites):
        if key[0] == "gen":
            sites[key] = replace(
                sites[key], tokens={"x2t_image": 0, "t2i": 0}, rows=sites[key].rows[:0], row_tasks=[], row_samples=[]
            )
    out, summary = searched(tmp_path, monkeypatch, sites=sites)
    linears = pd.read_parquet(out / "linears.parquet").set_index("name")
    assert summary.folded == 5
    gen = linears[linears.path == "gen"]
    assert set(gen.scheme[gen.site.isin(["qkv", "gate_up"])]) == {UNSEEN}
    assert set(gen.error_kind) == {"weight"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", [AWQ, PUBLISHED, MINMAX], ids=lambda recipe: recipe.name)
def test_cuda_runs_the_same_code_and_repeats_itself(tmp_path, monkeypatch, recipe):
    config = small_config()
    checkpoint = random_checkpoint(tmp_path / "model", config)
    monkeypatch.setattr(search, "read_layer", lambda folder, layer: random_sites(config, layer, outliers=9.0))
    job = small_job(recipe, checkpoint=checkpoint, capture=tmp_path)
    made = []
    for name, device in (("one", "cuda"), ("two", "cuda"), ("cpu", "cpu")):
        (tmp_path / name).mkdir()
        search_layer(job, tmp_path / name, device)
        made.append(tmp_path / name)
    assert (made[0] / "layer.safetensors").read_bytes() == (made[1] / "layer.safetensors").read_bytes()
    gpu, cpu = (pd.read_parquet(folder / "linears.parquet") for folder in made[1:])
    if recipe.scoring != "synthetic":  # its draw differs between devices
        assert list(gpu.alpha.dropna()) == list(cpu.alpha.dropna())
        assert list(gpu.error_after) == pytest.approx(list(cpu.error_after), rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_draw_is_that_of_manual_seed():
    torch.manual_seed(0xC0DE)
    wanted = torch.randn(512, 64, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0xC0DE)
    assert torch.equal(torch.randn(512, 64, generator=generator, device="cuda"), wanted)
