"""KL, top-1 and perplexity against a float64 reference, and independent of the chunk size."""

import math

import pytest
import torch

from lance_quant.errors import LanceQuantError
from lance_quant.evaluation.distributions import compare_logits


def logits(seed: int, n: int = 37, vocab: int = 101) -> torch.Tensor:
    return 3 * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def test_against_float64():
    a, b, targets = logits(0), logits(1), torch.arange(37)
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    scores = compare_logits(a, b, targets, rows=8)
    assert scores.tokens == 37
    assert scores.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert scores.perplexity_baseline == pytest.approx(math.exp(-p[targets, targets].mean()), rel=1e-5)
    assert scores.perplexity_other == pytest.approx(math.exp(-q[targets, targets].mean()), rel=1e-5)
    assert scores.kl != pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-3)  # the direction matters


def test_chunks_do_not_matter():
    a, b, targets = logits(0).bfloat16(), logits(1).bfloat16(), torch.arange(37)
    small, large = compare_logits(a, b, targets, rows=5), compare_logits(a, b, targets, rows=500)
    assert small.kl == pytest.approx(large.kl, rel=1e-6) and small.top1 == large.top1


def test_equal_logits():
    a = logits(0)
    scores = compare_logits(a, a.clone(), torch.zeros(37, dtype=torch.long))
    assert (scores.kl, scores.top1) == (0.0, 1.0)
    assert scores.perplexity_baseline == scores.perplexity_other


def test_first_index_wins_ties():
    a = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    b = torch.tensor([[5.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    assert compare_logits(a, b, torch.tensor([0, 0])).top1 == 0.5


def test_uniform_perplexity_is_the_vocabulary():
    flat = torch.zeros(4, 50)
    assert compare_logits(flat, flat, torch.arange(4)).perplexity_baseline == pytest.approx(50)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4), 2), ((2, 3), (2, 3), 3), ((0, 3), (0, 3), 0)])
def test_wrong_shapes_are_one_sentence(shapes):
    a, b, n = shapes
    with pytest.raises(LanceQuantError, match="cannot be compared"):
        compare_logits(torch.zeros(a), torch.zeros(b), torch.zeros(n, dtype=torch.long))
