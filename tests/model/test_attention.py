"""Span attention against a dense mask: any splits, any context, grouped heads."""

import pytest
import torch
import torch.nn.functional as F

import lance_quant.model.attention as attention
from lance_quant.devices import repeatable
from lance_quant.model.attention import attend, attend_masked, span_mask
from lance_quant.model.positions import block_mask

CASES = [
    ((5, 4, 3, 6, 2), ("causal", "full", "causal", "noise", "causal")),
    ((4, 3), ("causal", "causal")),
    ((3, 5, 4, 2, 6), ("causal", "full", "full_noise", "causal", "noise")),
    ((7,), ("noise",)),
    ((2, 3, 1, 3, 4), ("causal", "noise", "causal", "noise", "full")),
]


def drawn(seed, n, context):
    """Queries, keys and values of n tokens behind a context, grouped heads."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, heads, n + more, 8, generator=generator) for heads, more in ((6, 0), (2, context), (2, context))
    ]


def spans_of(lengths, modes):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, modes, strict=True))


@pytest.mark.parametrize(("lengths", "modes"), CASES)
@pytest.mark.parametrize("context", [0, 3])
def test_attend(lengths, modes, context):
    n, (q, k, v) = sum(lengths), drawn(1, sum(lengths), context)
    mask = torch.cat((torch.ones(n, context, dtype=torch.bool), block_mask(lengths, modes)), dim=1)
    wide = (part.repeat_interleave(3, dim=1) for part in (k, v))
    expected = F.scaled_dot_product_attention(q, *wide, attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v, spans_of(lengths, modes)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("lengths", "modes"), [*CASES, ((3, 4, 3), ("causal", "aside", "causal"))])
@pytest.mark.parametrize("context", [0, 3])
def test_by_a_mask_at_once(lengths, modes, context):
    n, (q, k, v) = sum(lengths), drawn(5, sum(lengths), context)
    spans = spans_of(lengths, modes)
    mask = span_mask(spans, context, q.dtype, q.device)
    assert mask.shape == (n, context + n) and mask.stride(0) % 16 == 0
    torch.testing.assert_close(attend_masked(q, k, v, mask), attend(q, k, v, spans), rtol=1e-5, atol=1e-6)


def test_what_stands_aside_is_causal_and_not_seen_behind():
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 2, 10, 8, generator=generator) for _ in range(3))
    found = attend(q, k, v, spans_of((3, 4, 3), ("causal", "aside", "causal")))
    torch.testing.assert_close(found[:, :, :7], attend(*(part[:, :, :7] for part in (q, k, v)), [(0, 7, "causal")]))
    kept = [*range(3), *range(7, 10)]
    alone = attend(*(part[:, :, kept] for part in (q, k, v)), [(0, 6, "causal")])
    torch.testing.assert_close(found[:, :, 7:], alone[:, :, 3:])


def test_without_spans_every_token_sees_everything():
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3))
    torch.testing.assert_close(attend(q, k, v, None), attend(q, k, v, [(0, 5, "full")]))


@pytest.mark.parametrize(("lengths", "modes"), CASES)
@pytest.mark.parametrize("context", [0, 3])
def test_a_way_back_of_fixed_order_gives_the_same(lengths, modes, context, monkeypatch):
    """Two queries at a time: values and gradients."""
    monkeypatch.setattr(attention, "PART", 2)
    monkeypatch.setattr(attention, "fixed_order", lambda: True)
    generator = torch.Generator().manual_seed(3)
    n = sum(lengths)
    q = torch.randn(2, 6, n, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, context + n, 8, generator=generator, requires_grad=True) for _ in range(2))
    pull = torch.randn(2, 6, n, 8, generator=generator)
    calls = []
    real = attention._plain
    monkeypatch.setattr(attention, "_plain", lambda *parts: calls.append(parts) or real(*parts))
    mask = torch.cat((torch.ones(n, context, dtype=torch.bool), block_mask(lengths, modes)), dim=1)
    wide = (part.repeat_interleave(3, dim=1) for part in (k, v))
    expected = F.scaled_dot_product_attention(q, *wide, attn_mask=mask)
    found = attend(q, k, v, spans_of(lengths, modes))
    assert len(calls) == sum(-(-length // 2) for length in lengths)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(out, (q, k, v), pull) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    calls.clear()
    attend(q.detach(), k, v, spans_of(lengths, modes))
    assert not calls


def test_a_mask_that_is_added_goes_back_in_parts(monkeypatch):
    monkeypatch.setattr(attention, "fixed_order", lambda: True)
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(1, 6, 10, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(1, 2, 10, 8, generator=generator) for _ in range(2))
    spans = spans_of((3, 4, 3), ("causal", "aside", "causal"))
    found = attend_masked(q, k, v, span_mask(spans, 0, q.dtype, q.device))
    torch.testing.assert_close(found, attend(q.detach(), k, v, spans), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_way_back_of_fixed_order_has_the_same_bits_on_a_gpu():
    q, k, v = (torch.randn(1, heads, 3000, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2))
    pull, spans, found = torch.randn_like(q), [(0, 700, "causal"), (700, 3000, "noise")], []
    for _ in range(3):
        with repeatable("cuda"):
            found.append(torch.autograd.grad(attend(q, k, v, spans), (q, k, v), pull))
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], again, strict=True))
