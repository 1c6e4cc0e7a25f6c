"""A tiny language model as a GGUF file, as llama.cpp's converter writes it:  write_gguf(file)"""

import random
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD = 64, 128, 2, 4, 2, 16
WORDS = ("the", "and", "of", "cat", "dog", "house", "red", "blue", "stands", "near")
MERGED = [f"Ġ{word}" for word in WORDS] + ["1234"]
UNMERGED = "Ġzebra"  # in the vocabulary, and no merges make it
CONTROL = ("<|endoftext|>", "<|im_end|>")
LEAVES = {  # name in transformers -> (in the file, outputs, inputs)
    "self_attn.q_proj": ("attn_q", "query", "hidden"),
    "self_attn.k_proj": ("attn_k", "value", "hidden"),
    "self_attn.v_proj": ("attn_v", "value", "hidden"),
    "self_attn.o_proj": ("attn_output", "hidden", "query"),
    "mlp.gate_proj": ("ffn_gate", "inner", "hidden"),
    "mlp.up_proj": ("ffn_up", "inner", "hidden"),
    "mlp.down_proj": ("ffn_down", "hidden", "inner"),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def vocabulary() -> tuple[list[str], list[str]]:
    """(tokens, merges): all bytes, then `MERGED` letter by letter, then what no merge makes."""
    tokens, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in MERGED:
        for end in range(1, len(word)):
            if word[: end + 1] not in tokens:
                tokens.append(word[: end + 1])
                merges.append(f"{word[:end]} {word[end]}")
    return [*tokens, UNMERGED, *CONTROL], merges


def text(words: int, seed: int = 0) -> str:
    """About a token a word."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """A llama's q or k as the file has it: a head's two halves row by row."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path,
    architecture: str = "llama",
    keys: dict | None = None,
    tensors: dict | None = None,
    without: tuple[str, ...] = (),
    heads: tuple[int, int] = (KV_HEADS, HEAD),
) -> dict[str, Tensor]:
    """Write the file; returns the tensors under the names and in the order of rows that transformers uses.

    keys, tensors: what is put in beside or in place of the usual; without: keys and tensors that are left out; heads:
    how many of keys and values the tensors have, and their size.
    """
    import gguf

    kv_heads, head = heads
    tokens, merges = vocabulary()
    made = model_tensors(len(tokens), kv_heads, head, biased=architecture == "qwen2")
    written = {name: value.numpy() for name, value in as_stored(made, architecture, kv_heads).items()} | (tensors or {})
    values = {f"{architecture}.{name}": value for name, value in sizes(kv_heads).items()}
    values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens}
    values |= {"tokenizer.ggml.merges": merges, "tokenizer.ggml.eos_token_id": len(tokens) - 1}
    values |= {"tokenizer.ggml.token_type": [3 if token in CONTROL else 1 for token in tokens]}
    writer = gguf.GGUFWriter(file, architecture)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in (values | (keys or {})).items():
        if key not in without:
            add[type(value)](key, value)
    for name, value in written.items():
        if name not in without:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def sizes(kv_heads: int) -> dict:
    return {
        "block_count": LAYERS,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e5,
    }


def model_tensors(vocab: int, kv_heads: int, head: int, biased: bool) -> dict[str, Tensor]:
    size = {"hidden": HIDDEN, "inner": INNER, "query": HEADS * head, "value": kv_heads * head}
    draw = torch.Generator().manual_seed(0)
    made = {"model.embed_tokens.weight": torch.randn(vocab, HIDDEN, generator=draw)}
    made["lm_head.weight"] = torch.randn(vocab, HIDDEN, generator=draw) * 0.5
    made["model.norm.weight"] = 1 + 0.1 * torch.randn(HIDDEN, generator=draw)
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        for name, (leaf, outputs, inputs) in LEAVES.items():
            shape = (size[outputs], size[inputs])
            made[f"{place}.{name}.weight"] = torch.randn(shape, generator=draw) * size[inputs] ** -0.5
            if biased and leaf in ("attn_q", "attn_k", "attn_v"):
                made[f"{place}.{name}.bias"] = torch.randn(size[outputs], generator=draw)
        for name in NORMS:
            made[f"{place}.{name}.weight"] = 1 + 0.1 * torch.randn(HIDDEN, generator=draw)
    return made


def as_stored(made: dict[str, Tensor], architecture: str, kv_heads: int) -> dict[str, Tensor]:
    """Under the file's names, rows in its order."""
    stored = {"token_embd.weight": made["model.embed_tokens.weight"], "output.weight": made["lm_head.weight"]}
    stored["output_norm.weight"] = made["model.norm.weight"]
    names = {name: leaf for name, (leaf, _, _) in LEAVES.items()} | NORMS
    for key, value in made.items():
        if key.startswith("model.layers."):
            _, _, layer, rest = key.split(".", 3)
            name, part = rest.rsplit(".", 1)
            heads = {"attn_q": HEADS, "attn_k": kv_heads}.get(names[name])
            if architecture == "llama" and heads:
                value = interleaved(value, heads)
            stored[f"blk.{layer}.{names[name]}.{part}"] = value
    return stored
