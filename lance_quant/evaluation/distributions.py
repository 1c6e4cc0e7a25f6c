"""How far apart two next-token distributions are: KL in nats, top-1 agreement, perplexity of each.

compare_logits(bf16_logits, int4_logits, targets).kl
"""

import math
from dataclasses import dataclass

import torch

from lance_quant.errors import LanceQuantError

ROWS = 64  # a chunk of 64 x 152k float32 logits is 39 MB


@dataclass(frozen=True, kw_only=True)
class DistributionScores:
    """Means over `tokens` positions."""

    tokens: int
    kl: float  # KL(baseline || other), nats per token
    top1: float  # share of positions where both put the same token first
    perplexity_baseline: float
    perplexity_other: float


def compare_logits(
    baseline: torch.Tensor, other: torch.Tensor, targets: torch.Tensor, rows: int = ROWS
) -> DistributionScores:
    """Compares logits [n, vocab] of any float dtype position by position; `targets` [n] are the forced token ids.

    Log-softmax in float32, `rows` positions at a time on the tensors' device, sums in float64. Of equal largest logits
    the first index counts as top-1. Raises LanceQuantError where the shapes do not fit or there is no position.
    """
    if baseline.ndim != 2 or baseline.shape != other.shape or targets.shape != baseline.shape[:1] or not len(targets):
        raise LanceQuantError(
            f"logits of {tuple(baseline.shape)} and {tuple(other.shape)} with {tuple(targets.shape)} targets cannot be"
            " compared: both want [n, vocab] and the targets [n], n at least 1"
        )
    sums = torch.zeros(4, dtype=torch.float64, device=baseline.device)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        a = baseline[part].float().log_softmax(-1)
        b = other[part].float().log_softmax(-1)
        index = targets[part, None].to(a.device)
        sums += torch.stack(
            [
                (a.exp() * (a - b)).sum(-1).double().sum(),
                (baseline[part].argmax(-1) == other[part].argmax(-1)).double().sum(),
                -a.gather(-1, index).double().sum(),
                -b.gather(-1, index).double().sum(),
            ]
        )
    kl, top1, loss_a, loss_b = (sums / len(targets)).tolist()
    return DistributionScores(
        tokens=len(targets),
        kl=max(kl, 0.0),  # rounding can leave -1e-9 where the two are equal
        top1=top1,
        perplexity_baseline=math.exp(loss_a),
        perplexity_other=math.exp(loss_b),
    )
