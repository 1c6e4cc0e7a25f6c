"""Rounding one expert's linears leaves the other's alone."""

import torch

from benchmarks.experts import rounded
from lance_quant.checkpoint.layout import open_checkpoint, targets
from lance_quant.model.lance import load_lance
from tasks.config import compose_config


def test_only_the_named_experts_are_rounded():
    cfg = compose_config(["checkpoint=tiny", "recipe=minmax"])
    checkpoint = open_checkpoint(cfg.checkpoint)
    plain, ours = load_lance(checkpoint), rounded(checkpoint, cfg, ("gen",), "cpu")
    for target in targets(checkpoint.config):
        before, after = (lance.get_submodule(target.name).weight for lance in (plain, ours))
        assert torch.equal(before, after) == (target.path == "und")
        assert (before - after).abs().max() <= before.abs().max() / 7  # a step at most, of 15 over the whole range
