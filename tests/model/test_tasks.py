"""All seven tasks from a request to latents and tokens, on a random model: flows agree, shapes and errors are right."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lance_quant.errors import LanceQuantError
from lance_quant.model import sampler
from lance_quant.model.inputs import prepare
from lance_quant.model.lance import load_lance
from lance_quant.model.prompts import load_tokenizer
from lance_quant.model.request import GENERATION, GIVEN, TASKS, UNDERSTANDING, Request
from lance_quant.model.sampler import FlowConfig, guide, initial_state, joined, run_flow, start_flow
from lance_quant.model.understanding import answer, forced_logits
from lance_quant.model.vae import load_vae
from tests.random_checkpoint import random_checkpoint

FRAMES = 5


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    torch.set_num_threads(1)
    checkpoint = random_checkpoint(tmp_path_factory.mktemp("video"), layout="video")
    lance = load_lance(checkpoint, dtype=torch.float32)
    return checkpoint, lance, load_tokenizer(checkpoint.folder), load_vae(checkpoint.vae_file)


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def request(task):
    given = {"image": {"image": picture(1)}, "video": {"video": tuple(picture(i) for i in range(FRAMES))}}
    return Request(
        task=task, name=task, prompt="Make the red circle blue.", height=48, width=64, frames=FRAMES,
        **given.get(GIVEN.get(task), {}),
    )  # fmt: skip


def sample_of(stand, task):
    checkpoint, _, tokenizer, vae = stand
    return prepare(request(task), tokenizer, checkpoint.edges(task), vae)


@pytest.mark.parametrize("task", GENERATION)
@pytest.mark.parametrize("faithful", [True, False])
def test_the_branches_share_what_stands_before_the_caption(stand, task, faithful, monkeypatch):
    lance, sample = stand[1], sample_of(stand, task)
    start = initial_state(sample, 3, 48, torch.float32)
    cfg = FlowConfig(steps=2, faithful=faithful)
    flow = start_flow(lance, sample, start, cfg)
    monkeypatch.setattr(sampler.KVCache, "take", lambda *_: None)  # nothing is taken over
    monkeypatch.setattr(sampler, "first_caption", lambda *_: 0)
    alone = start_flow(lance, sample, start, cfg)
    for ours, theirs in zip(flow.caches, alone.caches, strict=True):
        assert ours.length == theirs.length
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_the_state_handed_in_is_not_written_to(stand):
    sample = sample_of(stand, "t2i")
    start = initial_state(sample, 3, 48, torch.float32)
    before = start.clone()
    for faithful in (True, False):
        cfg = FlowConfig(steps=1, faithful=faithful)
        run_flow(start_flow(stand[1], sample, start, cfg), start, cfg)
    assert torch.equal(start, before)


@pytest.mark.parametrize("task", GENERATION)
def test_grids_and_moving_rows(stand, task):
    sample = sample_of(stand, task)
    clip = task in ("t2v", "i2v", "video_edit")
    target = sample.latent_grids[-1]
    assert target[0] == (2 if clip else 1)
    per_frame = target[1] * target[2]
    moving = per_frame * (1 if task == "i2v" else target[0])
    assert len(sample.mse_indexes) == moving
    assert len(sample.latent_grids) == (2 if "edit" in task else 1)
    assert (sample.vit_patches is not None) == ("edit" in task)
    state = initial_state(sample, 7, 48, torch.float32)
    clean = torch.ones(len(state), dtype=torch.bool)
    clean[sample.denoised_rows()] = False
    if clean.any():
        expected = sample.clean_latents[0].flatten(0, 2)
        assert torch.equal(state[clean], expected[: int(clean.sum())])


@pytest.mark.parametrize("task", GENERATION)
def test_cached_and_uncached_flows_agree(stand, task):
    _, lance, *_ = stand
    sample = sample_of(stand, task)
    cfg = FlowConfig(steps=3)
    state = initial_state(sample, 3, 48, torch.float32)
    t = sampler.timesteps(cfg)[1]
    cached = start_flow(lance, sample, state, cfg)
    whole = start_flow(lance, sample, state, replace(cfg, cached=False))
    a, b = cached.velocities(state, t, True), whole.velocities(state, t, True)
    moving = torch.isin(cached.rows, sample.denoised_rows())
    torch.testing.assert_close(a.conditional[moving], b.conditional, rtol=1e-4, atol=1e-5)
    mended = start_flow(lance, sample, state, replace(cfg, faithful=False)).velocities(state, t, True)
    torch.testing.assert_close(mended.unconditional[moving], b.unconditional, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(a.unconditional, mended.unconditional, rtol=1e-3, atol=1e-4)  # quirk Q3


@pytest.mark.parametrize("task", ["t2v", "video_edit"])
def test_branches_of_a_step_together_and_apart(stand, task, monkeypatch):
    _, lance, *_ = stand
    sample = sample_of(stand, task)
    cfg = FlowConfig(steps=2)
    state = initial_state(sample, 3, 48, torch.float32)
    together = run_flow(start_flow(lance, sample, state, cfg), state, cfg)
    monkeypatch.setattr(sampler, "TOGETHER_ROWS", 0)
    apart = run_flow(start_flow(lance, sample, state, cfg), state, cfg)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert torch.equal(run_flow(start_flow(lance, sample, state, cfg), state, cfg), apart)


def test_the_first_frame_stays(stand):
    _, lance, *_ = stand
    sample = sample_of(stand, "i2v")
    cfg = FlowConfig(steps=2)
    state = initial_state(sample, 3, 48, torch.float32)
    final = run_flow(start_flow(lance, sample, state, cfg), state, cfg)
    frozen = torch.isin(sample.vae_indexes, sample.mse_indexes).logical_not()
    assert torch.equal(final[frozen], state[frozen])
    assert not torch.equal(final[~frozen], state[~frozen])


def test_norms_over_moving_rows_where_not_faithful():
    velocities = sampler.Velocities(torch.tensor([[3.0], [4.0]]), torch.tensor([[-3.0], [0.0]]))
    moving = torch.tensor([False, True])
    whole = guide(velocities, FlowConfig(), moving)
    assert torch.linalg.vector_norm(whole) == pytest.approx(5.0)
    mended = guide(velocities, FlowConfig(faithful=False), moving)
    assert abs(float(mended[1])) == pytest.approx(4.0)


@pytest.mark.parametrize("task", UNDERSTANDING)
def test_answers(stand, task):
    _, lance, *_ = stand
    sample = sample_of(stand, task)
    told = []
    cached = answer(lance, sample, 6, keep_logits=True, on_token=lambda count, token: told.append((count, token)))
    assert told == list(enumerate(cached.tokens, start=1))
    whole = answer(lance, sample, 6, keep_logits=True, cached=False)
    assert cached.tokens == whole.tokens
    torch.testing.assert_close(cached.logits, whole.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forced_logits(lance, sample, cached.tokens), cached.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("task", "field"), GIVEN.items())
def test_what_is_missing_is_said(stand, task, field):
    checkpoint, _, tokenizer, vae = stand
    bare = Request(task=task, name="mine", prompt="x", height=48, width=64)
    with pytest.raises(LanceQuantError, match=f"'mine': task {task} needs .*give {field}=FILE"):
        prepare(bare, tokenizer, checkpoint.edges(task), vae)


def test_sizes_are_checked(stand):
    checkpoint, lance, tokenizer, vae = stand
    with pytest.raises(LanceQuantError, match="multiples of 16"):
        prepare(replace(request("t2i"), width=50), tokenizer, checkpoint.edges("t2i"), vae)
    long = prepare(replace(request("t2v"), frames=50), tokenizer, checkpoint.edges("t2v"), vae)
    with pytest.raises(LanceQuantError, match="draw or give at most 9 frames"):
        lance.latent_table(long.latent_grids)
    assert set(GIVEN) < set(TASKS)


def test_texts_that_follow_each_other_are_one_span():
    spans = [(0, 3, "causal"), (3, 5, "causal"), (5, 9, "full"), (9, 10, "causal"), (10, 12, "causal")]
    assert joined(spans) == [(0, 5, "causal"), (5, 9, "full"), (9, 12, "causal")]
    apart = [(0, 3, "causal"), (4, 6, "causal")]  # what stood between is left out
    assert joined(apart) == apart and joined([]) == []
