"""sensitivity.parquet over searched layers: errors as they count, every linear once, a plan read from it."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import lance_quant.awq.search as search
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.grid import grid_of, quantize
from lance_quant.awq.outputs import OutputMoments
from lance_quant.awq.search import Inputs, LayerJob, quantize_layer, search_layer
from lance_quant.awq.topology import resolve
from lance_quant.checkpoint.layout import expected_shapes, layer_targets, layout_of, targets
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.evaluation.report import write_report
from lance_quant.evaluation.sensitivity import SENSITIVITY, by_need, sensitivity
from tests.random_layers import (
    checkpoint_of,
    random_checkpoint,
    random_evidence,
    random_gradients,
    random_layer,
    random_sequences,
    random_sites,
    small_config,
)

MINMAX = RecipeConfig(name="minmax", scoring="none", folds=[])
FOLDS = ["input_norm", "post_attention_norm", "up_down", "v_o"]
GPTQ = RecipeConfig(name="gptq", folds=FOLDS, clip="group", rounding=["gptq"], evidence=["rows"])
BEST = replace(
    GPTQ,
    name="weighed",
    evidence=["rows", "sequences"],
    heldout=0.125,
    rounding=["gptq", "residual"],
    residual_sites=["qkv", "o", "gate_up", "down"],
    gradients=True,
)
BASE = (
    "layer path site name recipe bits group_size shape scheme fold family alpha clip_low clip_high error_kind "
    "error_before error_after weighed_before weighed_after parameters bytes"
).split()
DAMPING = 0.3


def direct(gradients, rows, weight, change) -> float:
    """Squared: gradients at the outputs times the outputs' errors, tasks alike; damped by the errors' own size."""
    damping = DAMPING * gradients.square().sum(0).mean()

    def size(x, weight):
        outputs = x.double() @ weight.double().T
        return (gradients.double() @ outputs.T).square().sum() + damping.double() * outputs.square().sum()

    apart = [rows.rows[rows.task == task].float() for task in range(rows.tasks)]
    return (sum(size(x, change) / size(x, weight) for x in apart) / rows.tasks).item()


def test_weighed_errors_are_those_of_outputs_times_gradients():
    """Of a folded, clipped and compensated layer, in the unfolded one's terms; only gen's linears have gradients."""
    config = small_config()
    tensors, known = random_layer(config), random_evidence(config, outliers=9.0)
    draw = torch.Generator().manual_seed(8)
    gradients = {
        target.name: torch.randn(50, 4, generator=draw) @ torch.randn(4, target.out_features, generator=draw)
        for target in layer_targets(config, 0)
        if target.path == "gen"
    }
    outputs = {name: OutputMoments.of((one.T @ one)[None], DAMPING) for name, one in gradients.items()}
    job = LayerJob(
        checkpoint=checkpoint_of(Path("model.safetensors"), config), layer=0, capture=None, recipe=GPTQ, group_size=16
    )
    folds = resolve(config, 0, FOLDS)
    result = quantize_layer(tensors, folds, replace(Inputs.of(known), outputs=outputs), job)
    assert len(result.found) == 7 and {row["weighed_after"] is None for row in result.linears} == {True, False}
    ingredients = pd.DataFrame(result.ingredients).set_index(["name", "ingredient"])
    for target, row in zip(layer_targets(config, 0), result.linears, strict=True):
        weight = tensors[f"{target.name}.weight"]
        made = result.rounded[target.name].dequantize()
        for found in result.found:
            if target in found.fold.consumers:
                made = made / found.fold.widen(found.scale)
            if target.name in found.fold.producers:
                made = made * found.scale[:, None]
        if target.path == "und":
            assert row["weighed_before"] is None and row["weighed_after"] is None
            continue
        plain = quantize(weight, grid_of(GPTQ, 4, 16)).dequantize()
        rows, one = known.rows_of(target), gradients[target.name]
        for column, change in (("weighed_before", plain - weight), ("weighed_after", made - weight)):
            assert row[column] ** 2 == pytest.approx(direct(one, rows, weight, change), rel=1e-3), (target.name, column)
        steps = ingredients.loc[target.name]
        assert list(steps.index) == ["minmax", "folds", "clip", "gptq"]
        assert steps.weighed["minmax"] == row["weighed_before"] and steps.weighed["gptq"] == row["weighed_after"]
        assert steps.weighed_share.sum() == pytest.approx(1 - row["weighed_after"] / row["weighed_before"])


def without_adapters(checkpoint):
    """The decoder alone, as a text model has it."""
    tensors = load_file(checkpoint.model_file)
    keys = expected_shapes(checkpoint.config, adapters=False)
    save_file({key: tensors[key] for key in keys}, checkpoint.model_file)
    return replace(checkpoint, layout=layout_of(list(keys)))


def searched(tmp_path, monkeypatch, recipe, checkpoint, config):
    """Folders of all layers' search artifacts, the last layer's first."""
    kept = random_sequences(config, count=6)
    monkeypatch.setattr(search, "read_layer", lambda folder, layer: random_sites(config, layer, outliers=9.0))
    monkeypatch.setattr(search, "read_sequences", lambda folder, layer: kept)
    monkeypatch.setattr(search, "read_gradients", lambda folder, layer: random_gradients(kept))
    folders = [tmp_path / f"layer{layer}" for layer in range(config.num_hidden_layers)]
    for layer, folder in enumerate(folders):
        folder.mkdir()
        capture = tmp_path if recipe.needs_capture else None
        search_layer(
            LayerJob(checkpoint=checkpoint, layer=layer, capture=capture, recipe=recipe, group_size=16), folder, "cpu"
        )
    return folders[::-1]


@pytest.mark.parametrize("layout", ["image", "text"])
@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        (MINMAX, []),
        (replace(GPTQ, folds=FOLDS[:2]), ["error_folds", "error_clip", "error_gptq"]),
        (BEST, [f"{kind}_{name}" for kind in ("error", "weighed") for name in ("folds", "clip", "gptq", "residual")]),
    ],
    ids=["minmax", "gptq", "best"],
)
def test_every_linear_once(tmp_path, monkeypatch, recipe, steps, layout):
    config = small_config(layers=2)
    checkpoint = random_checkpoint(tmp_path / "model", config)
    if layout == "text":
        checkpoint = without_adapters(checkpoint)
    folders = searched(tmp_path, monkeypatch, recipe, checkpoint, config)
    table = sensitivity(folders, recipe.name)
    assert table.column_names == BASE + steps and SENSITIVITY.names == BASE
    rows = table.to_pandas()
    assert list(rows.recipe.unique()) == [recipe.name] and set(rows.bits) == {4}
    assert sorted(rows.name) == sorted(target.name for target in targets(config))
    keys = [
        f"{row.layer} {'und gen'.find(row.path)} {'qkv o gate_up down'.find(row.site):02d} {row.name}"
        for row in rows.itertuples()
    ]
    assert keys == sorted(keys)
    assert table.equals(sensitivity(folders[::-1], recipe.name))
    for row in rows.itertuples():
        with TensorReader(tmp_path / f"layer{row.layer}" / "layer.safetensors") as reader:
            shapes = [reader.shape(f"{row.name}.{part}") for part in ("qweight", "scales", "zeros")]
        codes, scales, zeros = (shape[0] * shape[1] for shape in shapes)
        assert row.bytes == codes + 2 * scales + zeros and row.parameters == 2 * codes
        assert tuple(row.shape) == (shapes[0][0], 2 * shapes[0][1])
    last = steps[len(steps) // 2 - 1 if recipe is BEST else -1] if steps else "error_before"
    assert list(rows[last]) == list(rows.error_after)
    assert set(rows.error_kind) == ({"output"} if recipe.needs_capture else {"weight"})
    if recipe is BEST:
        assert list(rows.weighed_residual) == list(rows.weighed_after) and rows.weighed_after.notna().all()
        assert rows.weighed_gptq.mean() < rows.weighed_before.mean()
    else:
        assert rows.weighed_after.isna().all() and rows.weighed_before.isna().all()


def test_the_report_keeps_it(make_job, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    job = make_job(layers=3)
    write_report(job, out)
    table = pq.read_table(out / "sensitivity.parquet")
    assert table.equals(sensitivity(job.layers, job.recipe)) and table.num_rows == 3 * 8
    assert "weighed_gptq" in table.column_names


def test_without_layers_it_has_its_columns():
    assert sensitivity([], "minmax").column_names == BASE


def test_a_plan_is_the_top_of_it():
    """Squared errors per byte that 8 bits would add: half a byte a weight; weighed where gradients tell."""
    rows = [
        ("large", 0.10, None, 4000),
        ("small", 0.10, None, 1000),
        ("harmless", 0.20, 0.01, 1000),
        ("grave", 0.05, 0.30, 4000),
    ]
    table = pd.DataFrame(rows, columns=["name", "error_after", "weighed_after", "parameters"])
    table = table.assign(layer=0, path="und", site="o", error_kind="output", bytes=table.parameters * 9 // 16)
    plan = by_need(table)
    assert list(plan.name) == ["grave", "small", "large", "harmless"]
    assert list(plan.error) == [0.30, 0.10, 0.10, 0.01]
    assert list(plan.more) == [2000, 500, 2000, 500] and list(plan.total) == [2000, 2500, 4500, 5000]
    assert plan.per_byte[1] == pytest.approx(0.01 / 500)
    assert list(plan.query("total <= 2600").name) == ["grave", "small"]
