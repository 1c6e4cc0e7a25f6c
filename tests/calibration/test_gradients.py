"""Gradients of kept sequences: the whole model's own, and what their second moments stand for."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import lance_quant.calibration.gradients as gradients
from lance_quant.calibration.capture import capture, outputs_of, prepare_jobs
from lance_quant.calibration.config import CalibrationConfig
from lance_quant.calibration.gradients import last_gradient, spread, write_gradients
from lance_quant.calibration.sequences import read_gradients, read_sequences
from lance_quant.model.lance import load_lance
from lance_quant.model.routing import Routing
from tests.random_checkpoint import random_checkpoint

CFG = CalibrationConfig(samples=2, timesteps=3, rows_per_site=64, sequences=2, unconditional=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="video")


@pytest.fixture(scope="module")
def captured(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("capture")
    capture(checkpoint, CFG, out, "cpu")
    return out


def test_each_layer_passes_on_what_the_layers_behind_it_take_back(checkpoint, captured):
    """Of every kept sequence: the last layer's gradient through the resident model's last layer is the one before's."""
    lance = load_lance(checkpoint, dtype=torch.float32)
    decoder = lance.language_model.model
    decoder.rope_inv_freq_bf16 = True
    last = checkpoint.config.num_hidden_layers - 1
    behind, before = read_gradients(captured, last), read_gradients(captured, last - 1)
    sequences = read_sequences(captured, last)
    assert set(behind) == set(before) == set(range(len(sequences)))
    for number, one in enumerate(sequences):
        routing = Routing.of(one.latent)
        states = one.states.float()[None].requires_grad_()
        out = routing.merge(
            decoder.layers[last](routing.split(states), decoder.call(states, one.positions, routing, one.spans))
        )
        wanted = torch.autograd.grad(out, states, behind[number].float()[None])[0][0]
        torch.testing.assert_close(before[number].float(), wanted, rtol=0.02, atol=0.01 * wanted.abs().max().item())
        asked = one.drawn | one.said
        assert asked.any() and not behind[number][~asked].any() and behind[number][asked].any(-1).all()
        wanted = last_of(lance, out[0].detach(), one, number)
        torch.testing.assert_close(behind[number].float(), wanted, rtol=0.02, atol=1e-3 * wanted.abs().max().item())


def last_of(lance, states, one, number):
    """What is asked of the resident model's last states, with the draw of seed 0 and this sequence."""
    states, draw = states.requires_grad_(), torch.Generator().manual_seed(number)
    decoder, along = lance.language_model.model, 0.0
    if one.drawn.any():
        velocity = lance.llm2vae(decoder.norm_moe_gen(states[one.drawn]))
        signs = torch.randint(0, 2, velocity.shape, generator=draw) * 2.0 - 1
        along = (velocity * signs).sum() / velocity.detach().norm()
    if one.said.any():
        likely = lance.language_model.lm_head(decoder.norm(states[one.said])).log_softmax(-1)
        waits = torch.empty_like(likely.detach()).exponential_(generator=draw).log() - likely.detach()
        along = along + likely.gather(1, waits.argmin(-1, keepdim=True)).sum() / one.said.sum() ** 0.5
    return torch.autograd.grad(along, states)[0]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_each_seed_draws_anew_and_one_the_same_again(checkpoint, tmp_path, device):
    capture(checkpoint, replace(CFG, seed=1, tasks=["t2i"]), tmp_path / "one", device)
    write_gradients(checkpoint, tmp_path / "one", 10**6, 1, device)
    ours = read_gradients(tmp_path / "one", 1)
    write_gradients(checkpoint, tmp_path / "one", 10**6, 2, device)
    assert not torch.equal(ours[0], read_gradients(tmp_path / "one", 1)[0])
    write_gradients(checkpoint, tmp_path / "one", 10**6, 1, device)
    assert torch.equal(ours[0], read_gradients(tmp_path / "one", 1)[0])


@pytest.fixture
def heads():
    """Final norms and what reads them, of 6 channels: nothing else of a Lance is looked at."""
    draw = torch.Generator().manual_seed(0)
    drawn, said = torch.randn(6, 4, generator=draw), torch.randn(6, 9, generator=draw)
    norm = lambda x: x / x.square().mean(-1, keepdim=True).sqrt()  # noqa: E731
    model = SimpleNamespace(norm=norm, norm_moe_gen=lambda x: 2 * norm(x))
    return SimpleNamespace(
        llm2vae=lambda x: x @ drawn, language_model=SimpleNamespace(model=model, lm_head=lambda x: x @ said)
    )


def mean_moments(heads, states, one, draws=4000):
    total = 0.0
    for number in range(draws):
        gradient = last_gradient(heads, states, one, torch.Generator().manual_seed(number)).float().flatten()
        total = total + gradient[:, None] * gradient
    return total / draws


def test_second_moments_are_of_the_relative_error_of_the_velocity(heads):
    states = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    one = SimpleNamespace(drawn=torch.tensor([False, True, True]), said=torch.zeros(3, dtype=torch.bool))
    velocity = lambda x: heads.llm2vae(heads.language_model.model.norm_moe_gen(x[1:])).flatten()  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(velocity, states).flatten(1)
    wanted = jacobian.T @ jacobian / velocity(states).square().sum()
    torch.testing.assert_close(
        mean_moments(heads, states, one), wanted, rtol=0.1, atol=0.05 * wanted.abs().max().item()
    )


def test_second_moments_are_of_the_divergence_of_what_is_said(heads, monkeypatch):
    """Fisher information: the second derivative of KL at no change, mean over the tokens, a logit row at a time."""
    monkeypatch.setattr(gradients, "LOGIT_ROWS", 1)
    states = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    one = SimpleNamespace(drawn=torch.zeros(3, dtype=torch.bool), said=torch.tensor([True, False, True]))
    logits = lambda x: heads.language_model.lm_head(heads.language_model.model.norm(x[::2]))  # noqa: E731
    likely = logits(states).log_softmax(-1)
    divergence = lambda x: (likely.exp() * (likely - logits(x).log_softmax(-1))).sum() / 2  # noqa: E731
    wanted = torch.autograd.functional.hessian(divergence, states).reshape(18, 18)
    torch.testing.assert_close(
        mean_moments(heads, states, one), wanted, rtol=0.1, atol=0.05 * wanted.abs().max().item()
    )


def test_what_is_asked_of_each_token(checkpoint):
    for job in prepare_jobs(checkpoint, CFG, "cpu", lambda *_: None):
        sample = job.sample
        split = np.repeat(np.arange(len(sample.split_lens)), sample.split_lens)
        asked = outputs_of(sample, split)
        if job.steps:
            assert set(np.flatnonzero(asked == "velocity")) == set(sample.mse_indexes.tolist())
            assert set(asked) == {"velocity", ""}
            before = int(sample.mse_indexes[0])
            assert not (outputs_of(sample, split[:before]) == "velocity").any()
        else:
            assert (asked[split == split[-1]] == "logits").all() and set(asked[split != split[-1]]) == {""}


def test_some_sequences_of_every_task(checkpoint, tmp_path):
    one = lambda task, tokens: SimpleNamespace(task=task, states=torch.zeros(tokens, 1))  # noqa: E731
    kept = [one("t2i", 10)] * 4 + [one("t2v", 30)] * 2 + [one("x2t_image", 5)]
    assert spread(kept, 1000) == list(range(7))
    assert spread(kept, 52) == [0, 2, 4, 6]
    assert spread(kept, 1) == [0, 4, 6]
    capture(checkpoint, replace(CFG, tasks=["t2i"], gradient_tokens=1), tmp_path / "few", "cpu")
    assert list(read_gradients(tmp_path / "few", 0)) == [0]
    capture(checkpoint, replace(CFG, tasks=["t2i"], gradient_tokens=0), tmp_path / "none", "cpu")
    assert read_gradients(tmp_path / "none", 0) == {}
    tokens = pd.read_parquet(tmp_path / "none" / "sequences.parquet")
    assert set(tokens.output) == {"", "velocity"}
