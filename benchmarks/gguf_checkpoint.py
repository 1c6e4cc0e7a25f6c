"""A language model out of a GGUF file, as a checkpoint of the text layout:  write_checkpoint(gguf, folder)

Any llama- or qwen2-type file. The generation experts are copies of the understanding ones, which no text reaches.
Needs the extra `quality`.
"""

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lance_quant.checkpoint.layout import LINEARS, NORMS, PATHS, linear_name, norm_name
from lance_quant.errors import LanceQuantError

ARCHITECTURES = ("llama", "qwen2")
LEAVES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"} | {
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"
}  # fmt: skip
NORM_LEAVES = dict(zip(NORMS, ("attn_norm", "ffn_norm"), strict=True))
SPECIAL = 3  # token type of control tokens
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Source:
    """A GGUF file: `value` of a key of its architecture, `tensor` as float32."""

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError:
            raise LanceQuantError("reading a GGUF file needs the package gguf: pip install -e '.[quality]'") from None
        if not Path(path).is_file():
            raise LanceQuantError(f"there is no GGUF file at {path}")
        reader = GGUFReader(str(path))
        self.fields = {field.name: field for field in reader.fields.values()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self.fields["general.architecture"].contents()
        if self.architecture not in ARCHITECTURES:
            raise LanceQuantError(
                f"{path} is a model of type {self.architecture}: give one of type {' or '.join(ARCHITECTURES)}"
            )

    def value(self, name: str):
        return self.fields[f"{self.architecture}.{name}"].contents()

    def tensor(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        found = self.tensors[name]
        return torch.from_numpy(np.array(dequantize(found.data, found.tensor_type), dtype=np.float32))


def write_checkpoint(gguf: Path, folder: Path) -> dict:
    """Write model.safetensors (F32), llm_config.json and tokenizer.json into `folder`; returns the config."""
    source = Source(gguf)
    folder.mkdir(parents=True, exist_ok=True)
    config = read_config(source)
    save_file(read_tensors(source, config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "llm_config.json").write_text(json.dumps(config, indent=1) + "\n")
    read_tokenizer(source).save(str(folder / "tokenizer.json"))
    return config


def read_config(source: Source) -> dict:
    hidden, heads = int(source.value("embedding_length")), int(source.value("attention.head_count"))
    return {
        "hidden_size": hidden,
        "intermediate_size": int(source.value("feed_forward_length")),
        "num_hidden_layers": int(source.value("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(source.value("attention.head_count_kv")),
        "head_dim": hidden // heads,
        "rms_norm_eps": float(source.value("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(source.value("rope.freq_base")),
        "rope_scaling": None,
        "vocab_size": int(source.tensors["token_embd.weight"].shape[-1]),
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
        "qk_norm": False,
        "eos_token_id": int(source.fields["tokenizer.ggml.eos_token_id"].contents()),
    }


def read_tensors(source: Source, config: dict) -> dict[str, torch.Tensor]:
    """Under upstream's names. The file interleaves the two halves of q's and k's heads where its type is llama."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {"language_model.model.embed_tokens.weight": source.tensor("token_embd.weight")}
    head = "output.weight" if "output.weight" in source.tensors else "token_embd.weight"
    tensors["language_model.lm_head.weight"] = source.tensor(head)
    for path in PATHS:
        suffix = "" if path == "und" else "_moe_gen"
        tensors[f"language_model.model.norm{suffix}.weight"] = source.tensor("output_norm.weight")
        for layer in range(config["num_hidden_layers"]):
            for row in LINEARS:
                for part in ("weight", "bias"):
                    key = f"blk.{layer}.{LEAVES[row.leaf]}.{part}"
                    if key in source.tensors and (part == "weight" or row.bias):
                        value = source.tensor(key)
                        if source.architecture == "llama" and row.leaf in heads:
                            value = value.unflatten(0, (heads[row.leaf], -1, 2)).transpose(1, 2).flatten(0, 2)
                        tensors[f"{linear_name(layer, path, row.block, row.leaf)}.{part}"] = value.contiguous()
            for norm in NORMS:
                tensors[f"{norm_name(layer, path, norm)}.weight"] = source.tensor(
                    f"blk.{layer}.{NORM_LEAVES[norm]}.weight"
                )
    return tensors


def read_tokenizer(source: Source) -> Tokenizer:
    """The file's byte-pair tokenizer."""
    words = source.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in source.fields["tokenizer.ggml.merges"].contents()]
    kinds = source.fields["tokenizer.ggml.token_type"].contents()
    made = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    whole_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps = [pre_tokenizers.Digits(individual_digits=True), whole_words]
    if source.fields["tokenizer.ggml.pre"].contents() == "qwen2":
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == SPECIAL]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return made
