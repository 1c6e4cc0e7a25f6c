"""A GGUF file becomes the model that transformers makes of the same weights, or one sentence says why it cannot."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks.gguf_checkpoint import rotation, write_checkpoint
from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.errors import LanceQuantError
from lance_quant.model.lance import load_lance
from lance_quant.model.prompts import encode, load_tokenizer
from lance_quant.model.routing import Routing
from tests.benchmarks.tiny_gguf import CONTROL, HEAD, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, vocabulary, write_gguf

pytest.importorskip("gguf")


def checkpoint_of(folder, **changes):
    """(opened, tensors as transformers has them)."""
    made = write_gguf(folder / "model.gguf", **changes)
    write_checkpoint(folder / "model.gguf", folder / "model")
    return open_checkpoint(CheckpointConfig(name="text", path=str(folder / "model"))), made


def logits_of(checkpoint, ids):
    lance = load_lance(checkpoint, dtype=torch.float32)
    model, positions = lance.language_model.model, torch.arange(len(ids)).expand(3, -1)
    with torch.inference_mode():
        states = model(model.embed_tokens(ids)[None], positions, Routing(), [(0, len(ids), "causal")])
        return lance.language_model.lm_head(states[0])


def logits_of_transformers(architecture, made, ids, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta", 1e5)}
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(made["lm_head.weight"]),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=False,
        **({"num_key_value_heads": KV_HEADS} | sizes),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(made)
    with torch.inference_mode():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_it_is_the_same_model(tmp_path, architecture):
    checkpoint, made = checkpoint_of(tmp_path, architecture=architecture)
    assert checkpoint.config.attention_bias == (architecture == "qwen2")
    with TensorReader(checkpoint.model_file) as reader:
        for key, value in made.items():
            assert torch.equal(reader.read(f"language_model.{key}"), value), key
    ids = torch.randint(0, checkpoint.config.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        logits_of(checkpoint, ids), logits_of_transformers(architecture, made, ids), rtol=1e-3, atol=1e-3
    )


OTHER_HEADS = {  # a size that is no power of two
    "heads": (KV_HEADS, 24),
    "keys": {
        f"qwen2.{name}": 24 for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    },
}


@pytest.mark.parametrize("changes", [{}, OTHER_HEADS], ids=["hadamard", "drawn"])
def test_rotated_values_leave_the_model_as_it_is(tmp_path, changes):
    checkpoint, made = checkpoint_of(tmp_path, architecture="qwen2", **changes)
    ids = torch.randint(0, checkpoint.config.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    expected = logits_of(checkpoint, ids)
    write_checkpoint(tmp_path / "model.gguf", tmp_path / "model", rotate=True)
    torch.testing.assert_close(logits_of(checkpoint, ids), expected, rtol=1e-4, atol=1e-4)
    with TensorReader(checkpoint.model_file) as reader:
        turned = {key for key, value in made.items() if not torch.equal(reader.read(f"language_model.{key}"), value)}
    parts = ("v_proj.weight", "v_proj.bias", "o_proj.weight")
    assert turned == {f"model.layers.{layer}.self_attn.{part}" for layer in range(LAYERS) for part in parts}


@pytest.mark.parametrize("size", [16, 24, 128])
def test_a_rotation_is_orthogonal(size):
    turn = rotation(size)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_config_is_the_files(tmp_path):
    config = checkpoint_of(tmp_path)[0].config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (HIDDEN, INNER, LAYERS)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD)
    tokens, _ = vocabulary()
    assert (config.vocab_size, config.tokenizer_length) == (len(tokens), len(tokens))
    assert (config.rope_theta, config.eos_token_id) == (1e5, len(tokens) - 1)
    assert config.rms_norm_eps == pytest.approx(1e-5)


def test_absent_keys_take_the_formats_defaults(tmp_path):
    absent = ("llama.attention.head_count_kv", "llama.rope.freq_base")
    absent += ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.token_type", "output.weight")
    checkpoint, made = checkpoint_of(tmp_path, without=absent, heads=(HEADS, HEAD))
    config = checkpoint.config
    assert (config.num_key_value_heads, config.rope_theta, config.eos_token_id) == (HEADS, 10000.0, 0)
    ids = torch.arange(40)
    made["lm_head.weight"] = made["model.embed_tokens.weight"]  # one table serves both ends
    expected = logits_of_transformers("llama", made, ids, num_key_value_heads=HEADS, rope_theta=1e4)
    torch.testing.assert_close(logits_of(checkpoint, ids), expected, rtol=1e-3, atol=1e-3)


def test_heads_may_be_of_another_size(tmp_path):
    keys = {"llama.attention.key_length": 32, "llama.attention.value_length": 32, "llama.rope.dimension_count": 32}
    checkpoint, made = checkpoint_of(tmp_path, keys=keys, heads=(KV_HEADS, 32))
    assert checkpoint.config.head_dim == 32
    ids = torch.arange(40)
    expected = logits_of_transformers("llama", made, ids, head_dim=32)
    torch.testing.assert_close(logits_of(checkpoint, ids), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("gpt-2", ["1234", "Ġ", "z", "e", "b", "r", "a", "!", "Ċ", "Ċ"]),
        ("smollm", ["1", "2", "3", "4", "Ġ", "z", "e", "b", "r", "a", "!", "Ċ", "Ċ"]),
        ("qwen2", ["1", "2", "3", "4", "Ġ", "z", "e", "b", "r", "a", "!", "Ċ", "Ċ"]),
        ("llama-bpe", ["123", "4", "Ġzebra", "!", "Ċ", "Ċ"]),
    ],
)
def test_text_is_cut_as_the_file_says(tmp_path, pre, expected):
    checkpoint, _ = checkpoint_of(tmp_path, keys={"tokenizer.ggml.pre": pre})
    tokenizer = load_tokenizer(checkpoint.folder)
    assert tokenizer.encode("1234 zebra!\n\n").tokens == expected
    assert tokenizer.encode("near the" + CONTROL[0]).tokens[-2:] == ["Ġthe", CONTROL[0]]
    assert tokenizer.decode(encode(tokenizer, "1234 zèbra!")) == "1234 zèbra!"


ONES = np.ones(HEAD // 2, dtype=np.float32)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"keys": {"tokenizer.ggml.model": "llama"}}, "vocabulary of kind 'llama' .*give a model with byte pairs"),
        ({"keys": {"tokenizer.ggml.pre": "tekken"}}, "tokenizer.ggml.pre='tekken' .*one of gpt-2, smollm, qwen2"),
        ({"without": ("tokenizer.ggml.pre",)}, "lacks the key tokenizer.ggml.pre"),
        ({"without": ("tokenizer.ggml.merges",)}, "lacks the key tokenizer.ggml.merges"),
        ({"without": ("llama.block_count",)}, "lacks the key llama.block_count"),
        ({"without": ("blk.1.ffn_gate.weight",)}, "lacks the tensor blk.1.ffn_gate.weight"),
        ({"tensors": {"rope_freqs.weight": ONES}}, r"scales its rotary frequencies \(rope_freqs.weight\)"),
        ({"tensors": {"blk.0.attn_q_norm.weight": ONES}}, "holds blk.0.attn_q_norm.weight, which .*no place for"),
        ({"tensors": {"blk.1.attn_output.bias": ONES}}, "holds blk.1.attn_output.bias"),
        ({"keys": {"llama.rope.scaling.factor": 8.0}}, r"rotary frequencies \(llama.rope.scaling.factor\)"),
        ({"keys": {"llama.rope.scale_linear": 8.0}}, r"rotary frequencies \(llama.rope.scale_linear\)"),
        ({"keys": {"llama.rope.dimension_count": 8}}, "heads of 16 and rope.dimension_count=8"),
        ({"keys": {"llama.attention.key_length": 32}}, "heads of 32 and attention.value_length=16"),
        ({"keys": {"llama.attention.head_count_kv": [2, 4]}}, "another attention.head_count_kv in each layer"),
        ({"architecture": "gemma"}, "of type gemma: give one of type llama or qwen2"),
    ],
)
def test_what_would_be_wrong_is_refused(tmp_path, changes, sentence):
    write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(LanceQuantError, match=sentence):
        write_checkpoint(tmp_path / "model.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_no_scaling_that_is_named_is_none(tmp_path):
    checkpoint, _ = checkpoint_of(tmp_path, keys={"llama.rope.scaling.type": "none"})
    assert json.loads(checkpoint.config_file.read_text())["rope_scaling"] is None


@pytest.mark.parametrize("share", [0, 0.0001, 0.5, 0.99])
def test_a_file_that_is_cut_off(tmp_path, share):
    file = tmp_path / "model.gguf"
    write_gguf(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LanceQuantError, match="is not a whole GGUF file"):
        write_checkpoint(file, tmp_path / "model")


@pytest.mark.parametrize(
    "kind, sentence",
    [
        (999, r"model.gguf holds blk.1.ffn_gate.weight as type 999, which gguf does not know: update gguf"),
        (12, "holds blk.1.ffn_gate.weight as Q4_K, whose blocks of 256 do not divide its width of 64: convert"),
    ],
)
def test_a_tensor_of_a_wrong_type(tmp_path, kind, sentence):
    file, name = tmp_path / "model.gguf", b"blk.1.ffn_gate.weight"
    write_gguf(file)
    whole = bytearray(file.read_bytes())
    at = (
        whole.index(name) + len(name) + 4 + 2 * 8
    )  # behind it: how many sizes uint32, two sizes uint64, the type uint32
    whole[at : at + 4] = kind.to_bytes(4, "little")
    file.write_bytes(whole)
    with pytest.raises(LanceQuantError, match=sentence):
        write_checkpoint(file, tmp_path / "model")


def test_other_files(tmp_path, monkeypatch):
    (tmp_path / "readme.md").write_text("# A model\n")
    with pytest.raises(LanceQuantError, match="readme.md is not a whole GGUF file"):
        write_checkpoint(tmp_path / "readme.md", tmp_path / "model")
    with pytest.raises(LanceQuantError, match="there is no GGUF file at"):
        write_checkpoint(tmp_path / "absent.gguf", tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gguf", None)  # as where it is not installed
    with pytest.raises(LanceQuantError, match="needs the package gguf: pip install"):
        write_checkpoint(tmp_path / "absent.gguf", tmp_path / "model")
