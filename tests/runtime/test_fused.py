"""Fused layers, decoding and denoising steps against the plain model, on the CPU by the torch forms."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lance_quant.errors import LanceQuantError
from lance_quant.model.cache import KVCache
from lance_quant.model.inputs import prepare
from lance_quant.model.lance import load_lance
from lance_quant.model.linear import Linear
from lance_quant.model.positions import CAPTION, TEXT
from lance_quant.model.prompts import load_tokenizer
from lance_quant.model.request import Request
from lance_quant.model.routing import Routing
from lance_quant.model.sampler import CachedFlow, FlowConfig, initial_state, run_flow, start_flow
from lance_quant.model.understanding import answer, forced_logits
from lance_quant.model.vae import load_vae
from lance_quant.runtime import fused
from lance_quant.runtime.accelerate import accelerate, answer_together
from lance_quant.runtime.kernels.early import can_start_early
from tests.random_checkpoint import random_checkpoint
from tests.random_int4 import random_int4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("fused"))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(checkpoint, request):
    """(plain, accelerated)"""
    plain = load_lance(checkpoint, "cpu", request.param)
    return plain, accelerate(copy.deepcopy(plain), "on")


def sample_of(checkpoint, task: str, prompt: str = "a red circle"):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    request = Request(task=task, name="it", prompt=prompt, image=picture, height=48, width=64)
    vae = load_vae(checkpoint.vae_file) if task == "image_edit" else None
    return prepare(request, load_tokenizer(checkpoint.folder), checkpoint.edges(task), vae)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert error < (1e-5 if theirs.dtype == torch.float32 else 0.03), error


@pytest.mark.parametrize("latents", [None, slice(2, 6), [1, 4]], ids=["text", "together", "apart"])
@pytest.mark.parametrize("caches", [0, 1, 2])
@torch.inference_mode()
def test_decoder(pair, latents, caches):
    plain, fast = (lance.language_model.model for lance in pair)
    torch.manual_seed(0)
    hidden = torch.randn(2, 8, plain.config.hidden_size).to(pair[0].dtype)
    positions = torch.arange(8).expand(2, 3, 8) + torch.tensor([0, 5])[:, None, None]
    mask = torch.zeros(8, dtype=torch.bool)
    if latents is not None:
        mask[latents] = True
    routing, out = Routing.of(mask), []
    for decoder in (plain, fast):
        lengths = (3, 5) if caches == 2 else (3,)
        kept = []
        for length in lengths[: caches or None] if caches else ():
            cache = KVCache(plain.config, 16, 2 if caches == 1 else 1, "cpu", hidden.dtype)
            context = torch.ones(cache.keys.shape[1], length, plain.config.hidden_size).to(hidden.dtype)
            decoder(context, torch.arange(length).expand(3, -1), Routing(), cache=cache)
            kept.append(cache)
        cache = None if not kept else kept[0] if caches == 1 else kept
        out.append(decoder(hidden, positions, routing, cache=cache, keep=caches == 1))
        assert [each.length for each in kept] == ([11] if caches == 1 else [3, 5] if caches else [])
    close(out[1], out[0])


def test_answers(checkpoint, pair):
    sample = sample_of(checkpoint, "x2t_image")
    plain, fast = (answer(lance, sample, 12, keep_logits=True) for lance in pair)
    assert answer(pair[1], sample, 12).tokens == fast.tokens  # looking ahead, and again in the same memory
    if pair[0].dtype == torch.float32:
        assert fast.tokens == plain.tokens
        close(fast.logits, plain.logits)
    close(forced_logits(pair[1], sample, plain.tokens), forced_logits(pair[0], sample, plain.tokens))


def test_answers_together(checkpoint, pair):
    prompts = ("a red circle", "what is this, and where does it stand?", "why")
    samples = [sample_of(checkpoint, "x2t_image", prompt) for prompt in prompts]
    if pair[0].dtype == torch.float32:
        together = answer_together(pair[1], samples, 9)
        assert [each.tokens for each in together] == [answer(pair[0], sample, 9).tokens for sample in samples]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_drawing(checkpoint, pair, guidance):
    sample, cfg, finals = sample_of(checkpoint, "t2i"), FlowConfig(steps=4, guidance=guidance), []
    for lance in pair:
        state = initial_state(sample, 1, 48, lance.dtype)
        finals.append(run_flow(start_flow(lance, sample, state, cfg), state, cfg))
    close(finals[1], finals[0])


@pytest.mark.parametrize(("task", "passes"), [("t2i", 1), ("image_edit", 4)])
@pytest.mark.parametrize("faithful", [True, False])
def test_both_contexts_go_through_the_layers_at_once(checkpoint, pair, task, passes, faithful, monkeypatch):
    """And hold what each holds that went through by itself."""
    sample, cfg, flows, calls = sample_of(checkpoint, task), FlowConfig(faithful=faithful), [], []
    for lance in pair:
        state = initial_state(sample, 1, 48, lance.dtype)
        decoder = lance.language_model.model
        real = decoder.forward
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "forward", lambda *given, real=real: calls.append(given) or real(*given))
            flows.append(CachedFlow(lance, sample, state, cfg))
        if lance is pair[0]:
            calls.clear()
    assert len(calls) == passes
    for ours, theirs in zip(flows[1].caches, flows[0].caches, strict=True):
        assert ours.length == theirs.length
        for name in ("keys", "values"):
            close(*(getattr(each, name)[:, :, :, : each.length] for each in (ours, theirs)))
    assert torch.equal(flows[0].positions, flows[1].positions)


@pytest.mark.parametrize(
    ("texts", "captions", "at_once"),
    [
        ((5, 0), [1], False),  # up to the target
        ((0, 6), [0], True),
        ((4, 0), [0], False),  # more of it than the target has room for
        ((4, 3, 2, 3, 0), [1, 3], False),  # two apart: the second context has two texts to run
        ((4, 3, 0, 6), [1, 2], True),
        ((0,), [0], False),  # nothing else
        ((0,), [], False),
    ],
    ids=["end", "first", "long", "apart", "adjacent", "all", "none"],
)
def test_captions_anywhere(checkpoint, pair, texts, captions, at_once, monkeypatch):
    """Lengths of the texts before the target, 0 for what is left of it."""
    sample = sample_of(checkpoint, "t2i")
    first = next(start for start, _, mode in sample.spans() if mode == "noise")
    lengths = [length or first - sum(texts) for length in texts]
    modality, start = sample.modality.clone(), 0
    modality[:first] = TEXT
    for number, length in enumerate(lengths):
        if number in captions:
            modality[start : start + length] = CAPTION
        start += length
    behind = [(end - begin, mode) for begin, end, mode in sample.spans() if begin >= first]
    modes = ("causal",) * len(lengths) + tuple(mode for _, mode in behind)
    lengths += [length for length, _ in behind]
    sample = replace(sample, modality=modality, split_lens=tuple(lengths), split_modes=modes)
    together, flows = [], []
    real = CachedFlow._prefill_at_once
    monkeypatch.setattr(CachedFlow, "_prefill_at_once", lambda *given: together.append(1) or real(*given))
    for lance in pair:
        state = initial_state(sample, 1, 48, lance.dtype)
        flows.append(CachedFlow(lance, sample, state, FlowConfig()))
    assert bool(together) == at_once
    for ours, theirs in zip(flows[1].caches, flows[0].caches, strict=True):
        assert ours.length == theirs.length
        if ours.length:
            close(*(each.keys[:, :, :, : each.length] for each in (ours, theirs)))


@pytest.mark.parametrize(
    ("spans", "lengths", "masked"),
    [
        (None, [7], False),
        ([(0, 9, "causal")], [0], False),
        ([(0, 9, "causal")], [7], True),
        ([(0, 1, "causal")], [7], False),
        ([(0, 9, "full")], [7], False),
        ([(0, 4, "causal"), (4, 9, "full")], [0], True),
        ([(0, 4, "causal"), (4, 9, "full")], [1015], True),
        ([(0, 4, "causal"), (4, 9, "full")], [1016], False),
        ([(0, 4, "causal"), (4, 9, "full")], [0, 0], False),
    ],
)
def test_few_tokens_share_a_mask(pair, spans, lengths, masked):
    call = SimpleNamespace(spans=spans, caches=[SimpleNamespace(length=length) for length in lengths])
    mask = pair[1].language_model.model._mask(call, torch.zeros(1))
    assert (mask is not None) == masked
    assert mask is None or mask.shape == (9, lengths[0] + 9)


@torch.inference_mode()
def test_what_stands_around_a_product_in_the_gemv(pair, monkeypatch):
    """An expert whose linears go to the GEMV, its kernel replaced by torch, gives what its parts one by one do."""
    expert = copy.deepcopy(pair[1].language_model.model.layers[0].und)
    for name in ("qkv", "out", "gate_up", "down"):
        linear = getattr(expert, name)
        setattr(expert, name, random_int4(linear.out_features, linear.in_features, 32, bias=False)[0])
    x, attended = (torch.randn(1, 3, each.in_features).to(pair[0].dtype) for each in (expert.qkv, expert.out))
    read, (written, added) = expert.read(x, None)[1], expert.write(x, attended)

    def by_parts(linear, x, gain=None, eps=0.0, silu_mul=False, residual=None):
        x = x if gain is None else torch.nn.functional.rms_norm(x, x.shape[-1:], gain, eps)
        y = fused.silu_mul(linear(x)) if silu_mul else linear(x)
        return y if residual is None else y + residual

    monkeypatch.setattr(fused, "within", by_parts)
    monkeypatch.setattr(fused, "choose", lambda linear, x: fused.triton_gemv)
    close(expert.read(x, None)[1], read)
    whole, nothing = expert.write(x, attended)
    assert nothing is None
    close(whole, written + added)


@torch.inference_mode()
def test_silu_in_the_kernel_for_few_rows(monkeypatch):
    gate_up, _ = random_int4(64, 128, 32)
    x = torch.randn(2, 3, 128)
    expected = fused.active(gate_up, x)
    monkeypatch.setattr(fused, "few_active", lambda linear, x: fused.silu_mul(linear(x)) + 1)
    monkeypatch.setattr(fused, "choose", lambda linear, x: fused.triton_few)
    close(fused.active(gate_up, x), expected + 1)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(9, 64), (1, 9, 64)])
def test_silu_times_behind_pieces(monkeypatch, shape):
    """`gated` itself is tested beside its kernel; here in torch."""
    gate_up, exact = random_int4(64, 64, 32, bias=False)
    monkeypatch.setattr(fused, "choose", lambda linear, x: fused.triton_dequant_cublas)
    monkeypatch.setattr(fused, "gated", lambda linear, rows: fused.silu_mul(exact(rows)))
    x = torch.randn(shape)
    assert torch.equal(fused.active(gate_up, x), fused.silu_mul(exact(x)))


@pytest.mark.parametrize(("capability", "can"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_early_starts_need_a_gpu_that_has_them(monkeypatch, capability, can):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert can_start_early(torch.device("cuda")) == can
    assert not can_start_early(torch.device("cpu"))


def test_linears_of_one_input_are_one_product(pair):
    for layer in pair[1].language_model.model.layers:
        for expert in (layer.und, layer.gen):
            assert isinstance(expert.qkv, Linear) and isinstance(expert.gate_up, Linear)


def test_choices(pair):
    assert accelerate(copy.deepcopy(pair[0])).fast is None  # auto, on a CPU
    with pytest.raises(LanceQuantError, match="accelerate=maybe"):
        accelerate(pair[0], "maybe")


def test_what_needs_an_accelerated_model_says_so(checkpoint, pair):
    with pytest.raises(LanceQuantError, match=r"accelerate\(lance, 'on'\) first"):
        answer_together(pair[0], [sample_of(checkpoint, "x2t_image")])
    with pytest.raises(LanceQuantError, match="accelerate=off: this model is accelerated"):
        accelerate(pair[1], "off")
    assert answer_together(pair[1], []) == []
