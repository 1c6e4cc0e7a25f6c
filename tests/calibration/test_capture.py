"""The capture artifact: what its tables say must be what the linears of the whole model see."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lance_quant.calibration import capture as capturing
from lance_quant.calibration.activations import read_layer
from lance_quant.calibration.capture import capture, prepare_jobs
from lance_quant.calibration.config import CalibrationConfig
from lance_quant.calibration.jobs import CONDITIONAL, UNCONDITIONAL
from lance_quant.checkpoint.layout import PATHS, SITES, layer_targets
from lance_quant.errors import LanceQuantError
from lance_quant.model.inputs import prepare
from lance_quant.model.lance import load_lance
from lance_quant.model.prompts import IM_END, encode, load_tokenizer
from lance_quant.model.routing import Routing
from lance_quant.model.sampler import CachedFlow, is_guided, run_flow, timesteps
from lance_quant.model.understanding import forced_logits
from tests.random_checkpoint import random_checkpoint

CFG = CalibrationConfig(samples=2, timesteps=3, rows_per_site=64, sequences=1, unconditional=0.5)


@pytest.fixture(scope="module", params=["image", "video"])
def checkpoint(request, tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout=request.param)


@pytest.fixture(scope="module")
def captured(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("capture")
    return out, capture(checkpoint, CFG, out, "cpu")


def same_files(one, other) -> bool:
    files = sorted(file.relative_to(one) for file in one.rglob("*.parquet"))
    assert files == sorted(file.relative_to(other) for file in other.rglob("*.parquet"))
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


class Ears:
    """Hooks on a whole resident model: what layer 1 is fed, path and site apart."""

    def __init__(self, lance):
        self.heard = {(path, site): [] for path in PATHS for site in SITES}
        self.on = True
        for target in layer_targets(lance.config, 1):
            if target.name.split(".")[-1].split("_moe")[0] in ("q_proj", "o_proj", "gate_proj", "down_proj"):
                lance.get_submodule(target.name).register_forward_pre_hook(self._hook(target.path, target.site))

    def _hook(self, path, site):
        def hook(module, args):
            if self.on:
                self.heard[path, site].append(args[0].flatten(0, -2).float())

        return hook

    def take(self):
        taken, self.heard = self.heard, {key: [] for key in self.heard}
        return taken


def test_every_task_of_the_layout_is_covered(checkpoint, captured):
    out, summary = captured
    served = 7 if checkpoint.layout == "video" else 3
    assert summary.samples == 2 * served and len(summary.tokens) == served
    coverage = pd.read_parquet(out / "coverage.parquet")
    assert set(coverage.columns) == {"task", "path", "layer", "site", "tokens", "weight"}
    for (task, path), seen in coverage.groupby(["task", "path"]).tokens:
        assert set(seen) == {summary.tokens[task][path]}  # so that the summary alone tells what is covered
        assert (path == "gen" and task.startswith("x2t")) == (seen.iloc[0] == 0)
    assert summary.rows["und"] <= 64 and summary.rows["gen"] > 50


def test_layers_see_what_they_see_in_the_whole_model(checkpoint, tmp_path):
    """Statistics of layer 1, forward by forward, against hooks on the resident model that runs its own loops."""
    cfg = replace(CFG, samples=1, unconditional=1.0, weights={"t2i": 3.0})
    capture(checkpoint, cfg, tmp_path, "cpu")
    lance = load_lance(checkpoint)
    jobs = prepare_jobs(checkpoint, cfg, "cpu", lambda *told: None)
    ears = Ears(lance)
    found = read_layer(tmp_path, 1)
    tokenizer = load_tokenizer(checkpoint.folder)
    for job in jobs:
        task = job.sample.task
        if not job.steps:
            question = next(r for r in capturing.calibration_requests(checkpoint, cfg) if r.task == task)
            sample = prepare(question, tokenizer, checkpoint.edges(task))
            forced_logits(lance, sample, encode(tokenizer, question.answer + IM_END))
            means = {key: [calls[0].abs().mean(0)] for key, calls in ears.take().items() if calls}
        else:
            means = guided_means(lance, job, ears)
        for (path, site), each in means.items():
            got = found[path, site]
            torch.testing.assert_close(got.mean_abs[task], torch.stack(each).mean(0), rtol=1e-2, atol=1e-3)
            assert got.weights[task] == (3.0 if task == "t2i" else 1.0)


def guided_means(lance, job, ears):
    """Mean |x| of each unit of one guided job: latents call by call, text branch by branch."""
    flow = CachedFlow(lance, job.sample, job.state.to(torch.bfloat16), job.flow)
    moves = torch.isin(job.sample.vae_indexes[flow.rows], job.sample.mse_indexes)
    latents = {site: [] for site in SITES}
    text = {}
    for (path, site), calls in ears.take().items():  # the context, read by one branch after the other
        if path == "gen":
            latents[site] += 2 * [call.abs().mean(0) for call in calls]  # all stand before the caption
        else:
            contexts = len(job.context(CONDITIONAL)), len(job.context(UNCONDITIONAL))
            first, shared = contexts[0], sum(contexts) - len(calls)  # taken over from the first branch, not run again
            text[site] = calls[:first], calls[:shared] + calls[first:]
    for step in job.steps:
        noised = job.state.clone()
        noised[flow.rows[moves]] = ((1 - step.t) * job.goal + step.t * job.state[flow.rows])[moves]
        guided = is_guided(timesteps(job.flow)[step.index], job.flow)
        flow.velocities(noised.to(torch.bfloat16), torch.tensor(step.t), guided)
        for (path, site), calls in ears.take().items():
            for branch, part in enumerate(calls[0].chunk(1 + guided)):
                if path == "gen":
                    latents[site].append(part.abs().mean(0))
                else:
                    text[site][branch].append(part)
    both = {("und", site): [torch.cat(parts).abs().mean(0) for parts in text[site]] for site in SITES}
    return both | {("gen", site): means for site, means in latents.items()}


def test_tables_are_readable_with_pandas_alone(captured):
    out, summary = captured
    statistics = pd.read_parquet(out / "statistics")
    assert {"task", "site", "channel", "mean_abs", "mean_sq", "max_abs", "path", "layer"} == set(statistics.columns)
    rows = pd.read_parquet(out / "rows" / "path=gen" / "layer=1" / "part.parquet")
    values = (rows.row.iloc[0].astype(np.uint32) << 16).view(np.float32)
    assert values.dtype == np.float32 and np.isfinite(values).all()
    sequences = pd.read_parquet(out / "sequences.parquet")
    assert set(sequences.groupby("sequence").task.first()) == set(summary.tokens)
    assert set(sequences[sequences.task == "t2i"].expert) == {"und", "gen"}


def test_layer_reads_back(captured):
    out, summary = captured
    site = read_layer(out, 1)["und", "down"]
    assert site.tasks == list(summary.tokens)
    assert site.rows.dtype == torch.bfloat16 and site.rows.shape == (summary.rows["und"], 256)
    assert len({site.row_tasks.count(task) for task in site.tasks}) == 1
    assert torch.isnan(site.row_timesteps[0])
    assert (site.max_abs["t2i"] >= site.mean_abs["t2i"]).all()
    assert "x2t_image" not in read_layer(out, 1)["gen", "o"].tasks
    assert not torch.isnan(read_layer(out, 1)["gen", "o"].row_timesteps).any()
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
        splits = table.groupby("split").agg(start=("token", "min"), end=("token", "max"), mode=("mode", "first"))
        spans = [(row.start, row.end + 1, row.mode) for row in splits.itertuples()]
        routing = Routing.of(torch.from_numpy((table.expert == "gen").to_numpy().copy()))
        positions = torch.from_numpy(table[["t", "h", "w"]].to_numpy().T.copy())
        call = lance.language_model.model.call(states[0][None], positions, routing, spans)
        with torch.inference_mode():
            again = routing.merge(lance.language_model.model.layers[0](routing.split(states[0][None]), call))
        # the capture keeps q and k of latents in float32 (quirk Q6), a replay in one call does not
        torch.testing.assert_close(again[0], states[1], rtol=0.05, atol=0.05)


def test_groups_give_the_same_bytes_as_one_pass(checkpoint, captured, tmp_path, monkeypatch):
    out, one = captured
    monkeypatch.setattr(capturing, "room", lambda *_: 150_000)
    summary = capture(checkpoint, CFG, tmp_path, "cpu")
    assert one.passes == 1 and summary.passes >= 2
    assert same_files(out, tmp_path)
    assert not (tmp_path / "scratch").exists()


def test_memory_that_holds_no_layer_is_refused(checkpoint, tmp_path):
    with pytest.raises(LanceQuantError, match="raise calibration.memory_gb"):
        capture(checkpoint, replace(CFG, memory_gb=1e-4), tmp_path, "cpu")


def test_waves_are_the_samplers_own_states(checkpoint, tmp_path, monkeypatch):
    """Without a known result the sampler's steps run, one a wave, and leave what `run_flow` leaves."""
    real = capturing.calibration_requests
    monkeypatch.setattr(
        capturing, "calibration_requests", lambda *args: [replace(r, target=()) for r in real(*args) if r.task != "i2v"]
    )
    made = []
    prepared = capturing.prepare_jobs
    monkeypatch.setattr(capturing, "prepare_jobs", lambda *args: made.append(prepared(*args)) or made[-1])
    cfg = replace(CFG, samples=1, sampler_steps=3, sequences=0)
    started = {
        job.index: job.state.clone() for job in prepared(checkpoint, cfg, "cpu", lambda *told: None) if job.steps
    }
    summary = capture(checkpoint, cfg, tmp_path, "cpu")
    assert summary.passes == 3
    lance = load_lance(checkpoint)
    job = next(job for job in made[-1] if job.sample.task == "t2i")
    states = []
    flow = CachedFlow(lance, job.sample, started[job.index].to(torch.bfloat16), job.flow)
    run_flow(flow, started[job.index].to(torch.bfloat16), job.flow, lambda _, t, state, v: states.append(state.clone()))
    torch.testing.assert_close(
        job.state, states[2].float(), rtol=0.02, atol=0.02
    )  # the last step's result is not needed


def test_text_is_seen_by_the_understanding_path_alone(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("a red circle and a blue square, " * 40)
    cfg = CalibrationConfig(source="text", path=str(tmp_path), samples=3, text_tokens=24, sequences=1)
    out = tmp_path / "out"
    out.mkdir()
    summary = capture(checkpoint, cfg, out, "cpu")
    assert summary.tokens == {"text": {"und": 72, "gen": 0}}
    lance = load_lance(checkpoint)
    ears = Ears(lance)
    for job in prepare_jobs(checkpoint, cfg, "cpu", lambda *told: None):
        forced_logits(lance, job.sample, [0])
    found = read_layer(out, 1)
    for (path, site), calls in ears.take().items():
        if path == "und":
            mean = torch.cat(calls).abs().mean(0)
            torch.testing.assert_close(found[path, site].mean_abs["text"], mean, rtol=1e-2, atol=1e-3)
    assert found["gen", "o"].tasks == []


@pytest.mark.parametrize("path", ["", "nowhere", "empty"])
def test_text_that_is_not_there(checkpoint, tmp_path, path):
    (tmp_path / "empty").mkdir()
    cfg = CalibrationConfig(source="text", path=path and str(tmp_path / path))
    with pytest.raises(LanceQuantError, match="calibration"):
        capture(checkpoint, cfg, tmp_path, "cpu")


def test_published_samples_are_lances_own_examples(checkpoint, tmp_path):
    examples, media = tmp_path / "config" / "examples", tmp_path / "pictures"
    for folder in (examples, media):
        folder.mkdir(parents=True)
    Image.new("RGB", (80, 60), "red").save(media / "a.png")
    question = {
        "interleave_array": ["pictures/a.png", ["Look.", "Which colour?", "Red."]],
        "element_dtype_array": ["image", "text"],
        "istarget_in_interleave": [0, 1],
    }
    (examples / "x2t_image_example.json").write_text(json.dumps({"0001": question}, indent=1))
    (examples / "t2i_example.json").write_text(json.dumps({"000000.png": "a circle"}, indent=1))
    cfg = CalibrationConfig(
        source="published", examples=str(examples), tasks=["x2t_image", "t2i"], balance="tokens", unconditional=1.0
    )
    out = tmp_path / "out"
    out.mkdir()
    summary = capture(checkpoint, cfg, out, "cpu")
    assert summary.tokens["t2i"]["gen"] == 2 * 2 * 16  # both branches at both of the sampler's steps
    assert summary.passes == 2 and summary.tokens["x2t_image"]["und"] > 16
    site = read_layer(out, 0)["und", "qkv"]
    assert site.weights == {task: float(site.tokens[task]) for task in site.tasks}
    with pytest.raises(LanceQuantError, match="give their folder as calibration.examples="):
        capture(checkpoint, replace(cfg, examples=""), out, "cpu")
    with pytest.raises(LanceQuantError, match="image_edit_example.json is missing"):
        capture(checkpoint, replace(cfg, tasks=["image_edit"]), out, "cpu")
