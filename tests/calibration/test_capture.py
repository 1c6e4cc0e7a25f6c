"""The capture artifact: what its tables say must be what the linears saw."""

import numpy as np
import pandas as pd
import pytest
import torch

from lance_quant.calibration.activations import read_layer
from lance_quant.calibration.capture import capture, chosen_steps
from lance_quant.calibration.config import CalibrationConfig
from lance_quant.calibration.recorder import Recorder, Reservoir
from lance_quant.errors import LanceQuantError
from lance_quant.model.lance import load_lance
from lance_quant.model.positions import block_mask
from lance_quant.model.routing import Routing
from tests.random_checkpoint import random_checkpoint

CFG = CalibrationConfig(samples=3, timesteps=3, rows_per_site=64, sequences=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def captured(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("capture")
    return out, capture(checkpoint, CFG, out, "cpu")


def test_coverage(checkpoint, captured):
    out, summary = captured
    coverage = pd.read_parquet(out / "coverage.parquet")
    assert set(coverage.columns) == {"task", "path", "layer", "site", "tokens"}
    seen = coverage[(coverage.layer == 0) & (coverage.site == "qkv")].set_index(["task", "path"]).tokens
    # three pictures at three timesteps: 16 latents in each branch that guidance runs
    assert seen["t2i", "gen"] % 16 == 0 and seen["t2i", "gen"] >= 3 * 3 * 16
    assert seen["x2t_image", "gen"] == 0
    assert summary.tokens["x2t_image"]["und"] == seen["x2t_image", "und"] > 0


def test_tokens_of_a_path_are_those_of_each_of_its_linears(captured):
    """So that coverage can be judged from the summary alone, whatever is asked for."""
    out, summary = captured
    coverage = pd.read_parquet(out / "coverage.parquet")
    for (task, path), seen in coverage.groupby(["task", "path"]).tokens:
        assert set(seen) == {summary.tokens[task][path]}


def test_tables_are_readable_with_pandas_alone(captured):
    out, _ = captured
    statistics = pd.read_parquet(out / "statistics")
    assert {"task", "site", "channel", "mean_abs", "mean_sq", "max_abs", "path", "layer"} == set(statistics.columns)
    rows = pd.read_parquet(out / "rows" / "path=gen" / "layer=1" / "part.parquet")
    values = (rows.row.iloc[0].astype(np.uint32) << 16).view(np.float32)
    assert values.dtype == np.float32 and np.isfinite(values).all()
    sequences = pd.read_parquet(out / "sequences.parquet")
    assert sequences.groupby("sequence").task.first().tolist() == ["x2t_image", "t2i"]
    assert set(sequences[sequences.task == "t2i"].expert) == {"und", "gen"}


def test_layer_reads_back(checkpoint, captured):
    out, summary = captured
    site = read_layer(out, 1)["und", "down"]
    assert site.tasks == ["x2t_image", "t2i"]
    assert site.rows.dtype == torch.bfloat16 and site.rows.shape == (64, 256)
    assert site.row_tasks.count("t2i") == site.row_tasks.count("x2t_image") == 32
    assert torch.isnan(site.row_timesteps[0]) and not torch.isnan(site.row_timesteps[-1])
    assert (site.max_abs["t2i"] >= site.mean_abs["t2i"]).all()
    assert read_layer(out, 1)["gen", "o"].tasks == ["t2i"]
    with pytest.raises(LanceQuantError, match="layer 7"):
        read_layer(out, 7)


def test_kept_sequences_replay_the_layer(checkpoint, captured):
    """States entering a layer, its positions, splits and routing are enough to compute what enters the next one."""
    out, _ = captured
    lance = load_lance(checkpoint)
    tokens = pd.read_parquet(out / "sequences.parquet")
    for sequence, table in tokens.groupby("sequence"):
        states = []
        for layer in range(2):
            rows = pd.read_parquet(out / "hidden" / f"layer={layer}" / "part.parquet")
            rows = np.stack(rows[rows.sequence == sequence].state.to_numpy())
            states.append(torch.from_numpy(rows.view(np.int16).copy()).view(torch.bfloat16))
        splits = table.groupby("split").agg(count=("token", "size"), mode=("mode", "first"))
        seen = {}
        handle = lance.language_model.model.layers[1].register_forward_pre_hook(
            lambda module, args, seen=seen: seen.update(x=args[1].routing.merge(args[0]))
        )
        routing = Routing.of(torch.from_numpy((table.expert == "gen").to_numpy().copy()))
        positions = torch.from_numpy(table[["t", "h", "w"]].to_numpy().T.copy())
        mask = block_mask(splits["count"].tolist(), splits["mode"].tolist())
        with torch.inference_mode():
            lance.language_model.model(states[0][None], positions, routing, mask=mask)
        handle.remove()
        assert torch.equal(seen["x"][0], states[1])


def test_statistics_are_those_of_the_inputs(checkpoint):
    lance = load_lance(checkpoint, dtype=torch.float32)
    x = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(1))
    inputs = []
    module = lance.language_model.model.layers[0].self_attn.q_proj
    with torch.inference_mode(), Recorder(lance, ["t2i"], 16, seed=0) as recorder:
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
        for part in x.split(13, dim=1):
            recorder.begin("t2i", 0)
            lance.language_model.model(part, torch.zeros(3, part.shape[1], dtype=torch.int64), Routing())
    seen = torch.cat(inputs)
    sums = recorder.sums["t2i", "und", 0, "qkv"]
    torch.testing.assert_close(sums.absolute / 40, seen.double().abs().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.square / 40, seen.double().square().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(sums.largest, seen.abs().amax(0))
    kept = {tuple(row.tolist()) for row in sums.rows}
    assert len(kept) == 16 and kept <= {tuple(row.tolist()) for row in seen.to(torch.bfloat16)}


def test_reservoir_is_uniform():
    counts = np.zeros(50)
    for seed in range(400):
        reservoir = Reservoir(10, np.random.default_rng(seed))
        held = {}
        for start in range(0, 50, 7):
            count = min(7, 50 - start)
            for token, slot in zip(*reservoir.offer(count, start, 0.0), strict=True):
                held[slot] = start + token
        assert len(held) == 10 == len(reservoir.samples)
        counts[list(held.values())] += 1
    # binomial with mean 80 and standard deviation 8
    assert counts.min() > 48 and counts.max() < 112


def test_same_seed_same_bytes(checkpoint, captured, tmp_path):
    out, _ = captured
    capture(checkpoint, CFG, tmp_path, "cpu")
    for file in sorted(out.rglob("*.parquet")):
        assert file.read_bytes() == (tmp_path / file.relative_to(out)).read_bytes(), file.name


def test_steps_are_stratified():
    assert chosen_steps(30, 40, 0) == list(range(30))
    steps = chosen_steps(30, 8, 3)
    assert steps == sorted(set(steps)) and len(steps) == 8
    assert all(round(i * 30 / 8) <= step < round((i + 1) * 30 / 8) for i, step in enumerate(steps))
