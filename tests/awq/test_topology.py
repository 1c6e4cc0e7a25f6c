"""Folding any positive scale leaves the float layer as it was: checked on a plain layer written out here."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from lance_quant.awq.topology import FOLDS, apply, resolve
from lance_quant.checkpoint.layout import PATHS, SUFFIX, layer_prefix
from tests.random_layers import random_layer, small_config


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def run_layer(config, tensors, x):
    """x float64 [n, H], the first half of the rows understanding, the rest generation; each sees all keys."""
    half = len(x) // 2
    parts = {"und": slice(0, half), "gen": slice(half, None)}
    prefix = layer_prefix(0)

    def each(function):
        return torch.cat([function(parts[path], SUFFIX[path]) for path in PATHS])

    def linear(name, value):
        out = value @ tensors[f"{prefix}{name}.weight"].T
        return out + tensors[f"{prefix}{name}.bias"] if f"{prefix}{name}.bias" in tensors else out

    def heads(leaf):
        flat = each(
            lambda rows, s: linear(f"self_attn.{leaf}{s}", rms(x[rows], tensors[f"{prefix}input_layernorm{s}.weight"]))
        )
        return flat.view(len(x), -1, config.head_dim).transpose(0, 1)

    q, k = rms(heads("q_proj"), 1.0), rms(heads("k_proj"), 1.0)
    mixed = scaled_dot_product_attention(q[None], k[None], heads("v_proj")[None], enable_gqa=True)[0]
    mixed = mixed.transpose(0, 1).reshape(len(x), -1)
    x = x + each(lambda rows, s: linear(f"self_attn.o_proj{s}", mixed[rows]))

    def mlp(rows, s):
        h = rms(x[rows], tensors[f"{prefix}post_attention_layernorm{s}.weight"])
        return linear(f"mlp{s}.down_proj", silu(linear(f"mlp{s}.gate_proj", h)) * linear(f"mlp{s}.up_proj", h))

    return x + each(mlp)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("names", [[name] for name in FOLDS] + [list(FOLDS)])
def test_a_fold_changes_nothing(names, heads, kv_heads, bias):
    config = small_config(heads, kv_heads, bias)
    tensors = {key: tensor.double() for key, tensor in random_layer(config, seed=heads * kv_heads).items()}
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(10, config.hidden_size, generator=draw, dtype=torch.float64)
    before = run_layer(config, tensors, x)
    folded = dict(tensors)
    for fold in resolve(config, 0, names):
        columns = tensors[f"{fold.consumers[0].name}.weight"].shape[1]
        channels = len(fold.narrow(torch.ones(columns)))
        apply(fold, folded, torch.rand(channels, generator=draw, dtype=torch.float64) * 3 + 0.1)
    changed = [key for key in tensors if not torch.equal(tensors[key], folded[key])]
    assert len(changed) >= 4
    torch.testing.assert_close(run_layer(config, folded, x), before, rtol=1e-10, atol=1e-10)


def test_the_table_reaches_every_linear_once():
    resolved = resolve(small_config(), 0, list(FOLDS))
    names = [target.name for fold in resolved for target in fold.consumers]
    assert len(names) == len(set(names)) == 14
    assert [fold.name for fold in resolved] == [
        "und.input_norm",
        "gen.input_norm",
        "und.post_attention_norm",
        "gen.post_attention_norm",
        "und.up_down",
        "gen.up_down",
        "both.v_o",
    ]
