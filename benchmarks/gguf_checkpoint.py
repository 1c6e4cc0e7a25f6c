"""A language model out of a GGUF file, as a checkpoint of the text layout:  write_checkpoint(gguf, folder)

Any llama- or qwen2-type file with a byte-pair vocabulary and plain rotary positions; what the text layout cannot hold
is refused. Keys that the format lets be absent take its defaults. The generation experts are copies of the
understanding ones, which no text reaches. Needs the extra `quality`.
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
NORMAL, SPECIAL = 1, 3  # token types: plain, control
ANY_TOKEN = 0  # the end of text where the file names none: nothing is generated here

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2_WORDS = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def words_of(pattern: str) -> list:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


SPLITS = {  # tokenizer.ggml.pre -> how text is cut before pairs are merged
    "gpt-2": GPT2_WORDS,
    "smollm": [pre_tokenizers.Digits(individual_digits=True), *GPT2_WORDS],
    "qwen2": words_of(QWEN2_WORDS),
    "deepseek-r1-qwen": words_of(QWEN2_WORDS),
    "llama-bpe": words_of(LLAMA3_WORDS),
}
WHOLE_FIRST = ("llama-bpe",)  # a word that is in the vocabulary is one token, whatever its merges make of it


class Source:
    """A GGUF file: `field` of a key, `value` of a key of its architecture, `tensor` as float32.

    taken: names of the tensors that were asked for.
    Raises LanceQuantError, which names the file, where what is asked for is missing or cannot be read.
    """

    def __init__(self, path: Path):
        try:
            from gguf import GGML_QUANT_SIZES, GGUFReader
        except ImportError:
            raise LanceQuantError("reading a GGUF file needs the package gguf: pip install -e '.[quality]'") from None
        if not Path(path).is_file():
            raise LanceQuantError(f"there is no GGUF file at {path}")
        self.path, self.taken = path, set()
        blocks = {kind.value: (kind.name, block) for kind, (block, _) in GGML_QUANT_SIZES.items()}

        class Reader(GGUFReader):
            def _build_tensors(reader, start: int, fields: list) -> None:
                """Of a type that it cannot take the library does not say which tensor has it."""
                for field in fields:
                    _, name, _, sizes, kind, _ = field.parts
                    self.check_stored(bytes(name).decode(), int(sizes[0]), int(kind[0]), blocks)
                super()._build_tensors(start, fields)

        try:
            reader = Reader(str(path))
        except (ValueError, KeyError, IndexError) as error:  # the library checks nothing but the first bytes
            raise LanceQuantError(f"{path} is not a whole GGUF file ({error}): fetch it again") from None
        self.fields = {field.name: field for field in reader.fields.values()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self.field("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise self.refusal(f"is a model of type {self.architecture}: give one of type {' or '.join(ARCHITECTURES)}")

    def check_stored(self, name: str, width: int, kind: int, blocks: dict[int, tuple[str, int]]) -> None:
        """Refuse a tensor whose type is unknown, or of blocks that its rows do not consist of."""
        if kind not in blocks:
            raise self.refusal(
                f"holds {name} as type {kind}, which gguf does not know: update gguf, or give a file of another type"
            )
        called, block = blocks[kind]
        if width % block:
            raise self.refusal(
                f"holds {name} as {called}, whose blocks of {block} do not divide its width of {width}: "
                "convert the model anew"
            )

    def refusal(self, why: str) -> LanceQuantError:
        return LanceQuantError(f"{self.path} {why}")

    def field(self, key: str, default=None):
        """What a key holds; the default where it is absent, refused where there is none."""
        if key in self.fields:
            return self.fields[key].contents()
        if default is None:
            raise self.refusal(f"lacks the key {key}: convert the model anew")
        return default

    def value(self, name: str, default: float | None = None) -> float:
        """A number of the architecture."""
        found = self.field(f"{self.architecture}.{name}", default)
        if isinstance(found, list):
            raise self.refusal(f"has another {name} in each layer: give a model whose layers are alike")
        return found

    def stored(self, name: str):
        """A tensor as the library has it."""
        if name not in self.tensors:
            raise self.refusal(f"lacks the tensor {name}: give a model of plain attention and MLP layers")
        self.taken.add(name)
        return self.tensors[name]

    def tensor(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        found = self.stored(name)
        try:
            value = dequantize(found.data, found.tensor_type)
        except NotImplementedError:
            raise self.refusal(f"holds {name} as {found.tensor_type.name}, which gguf does not decode") from None
        return torch.from_numpy(np.array(value, dtype=np.float32))


def write_checkpoint(gguf: Path, folder: Path, rotate: bool = False) -> dict:
    """Write model.safetensors (F32), llm_config.json and tokenizer.json into `folder`; returns the config. rotate: see
    `rotate_values`.

    Raises LanceQuantError for a file that is none, or whose model the text layout would not be equal to.
    """
    source = Source(gguf)
    config, tokenizer = read_config(source), read_tokenizer(source)
    tensors = read_tensors(source, config)
    if rotate:
        rotate_values(tensors, config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "llm_config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    return config


def read_config(source: Source) -> dict:
    hidden, heads = int(source.value("embedding_length")), int(source.value("attention.head_count"))
    head_dim = int(source.value("attention.key_length", hidden // heads))
    check_attention(source, hidden // heads, head_dim)
    return {
        "hidden_size": hidden,
        "intermediate_size": int(source.value("feed_forward_length")),
        "num_hidden_layers": int(source.value("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(source.value("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "rms_norm_eps": float(source.value("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(source.value("rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "vocab_size": int(source.stored("token_embd.weight").shape[-1]),
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
        "qk_norm": False,
        "eos_token_id": int(source.field("tokenizer.ggml.eos_token_id", ANY_TOKEN)),
    }


def check_attention(source: Source, usual: int, head_dim: int) -> None:
    """Refuse heads of two sizes, heads that turn in part, and rotary frequencies that are scaled; usual: head size
    where the file does not say."""
    for name, default in (("attention.value_length", usual), ("rope.dimension_count", head_dim)):
        if source.value(name, default) != head_dim:
            raise source.refusal(
                f"has heads of {head_dim} and {name}={source.value(name, default)}: give a model where they agree"
            )
    scaling = f"{source.architecture}.rope.scal"  # ...ing.type, ...ing.factor and the older ...e_linear
    found = [key for key in source.fields if key.startswith(scaling)]
    if source.field(f"{scaling}ing.type", "linear") == "none":
        found = []
    found += [name for name in source.tensors if name.startswith("rope_f")]  # rope_freqs, rope_factors_long
    if found:
        raise source.refusal(f"scales its rotary frequencies ({found[0]}), which is not supported: give another model")


def read_tensors(source: Source, config: dict) -> dict[str, torch.Tensor]:
    """Under upstream's names. The file interleaves the two halves of q's and k's heads where its type is llama.

    Raises LanceQuantError where the file holds a tensor that would be left out.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {"language_model.model.embed_tokens.weight": source.tensor("token_embd.weight")}
    head = "output.weight" if "output.weight" in source.tensors else "token_embd.weight"
    tensors["language_model.lm_head.weight"] = source.tensor(head)
    for path in PATHS:
        suffix = "" if path == "und" else "_moe_gen"
        tensors[f"language_model.model.norm{suffix}.weight"] = source.tensor("output_norm.weight")
        for layer in range(config["num_hidden_layers"]):
            for row in LINEARS:
                for part in ("weight", "bias") if row.bias and config["attention_bias"] else ("weight",):
                    value = source.tensor(f"blk.{layer}.{LEAVES[row.leaf]}.{part}")
                    if source.architecture == "llama" and row.leaf in heads:
                        value = value.unflatten(0, (heads[row.leaf], -1, 2)).transpose(1, 2).flatten(0, 2)
                    tensors[f"{linear_name(layer, path, row.block, row.leaf)}.{part}"] = value.contiguous()
            for norm in NORMS:
                tensors[f"{norm_name(layer, path, norm)}.weight"] = source.tensor(
                    f"blk.{layer}.{NORM_LEAVES[norm]}.weight"
                )
    left = [name for name in source.tensors if name not in source.taken]
    if left:
        raise source.refusal(f"holds {left[0]}, which the text layout has no place for: give another model")
    return tensors


def rotate_values(tensors: dict[str, torch.Tensor], config: dict) -> None:
    """Turn each head's values by one rotation, rows and biases of v_proj, and o_proj's columns back. What attention
    puts out is linear in them, so the model stays the same, but for rounding."""
    head = config["head_dim"]
    turn = rotation(head)
    for layer in range(config["num_hidden_layers"]):
        for path in PATHS:
            v, o = (linear_name(layer, path, "self_attn", leaf) for leaf in ("v_proj", "o_proj"))
            for key in (f"{v}.weight", f"{v}.bias") if config["attention_bias"] else (f"{v}.weight",):
                values = tensors[key].double().reshape(-1, head, tensors[key][0].numel())
                tensors[key] = (turn @ values).reshape(tensors[key].shape).float()
            read = tensors[f"{o}.weight"].double().unflatten(1, (-1, head))
            tensors[f"{o}.weight"] = (read @ turn.T).flatten(1).float()


def rotation(size: int) -> torch.Tensor:
    """Orthogonal float64 [size, size]: Hadamard's where size is a power of two, else a drawn one."""
    if size & (size - 1):
        draw = torch.Generator().manual_seed(0)
        return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw)).Q
    turn = torch.ones(1, 1, dtype=torch.float64)
    while len(turn) < size:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    return turn / size**0.5


def read_tokenizer(source: Source) -> Tokenizer:
    """The file's byte-pair tokenizer. Raises LanceQuantError for other kinds and for an unknown way to cut text."""
    kind = source.field("tokenizer.ggml.model")
    if kind != "gpt2":
        raise source.refusal(
            f"has a vocabulary of kind '{kind}' (SentencePiece is 'llama'): give a model with byte pairs, kind 'gpt2'"
        )
    cut = source.field("tokenizer.ggml.pre")
    if cut not in SPLITS:
        raise source.refusal(
            f"cuts its text as tokenizer.ggml.pre='{cut}' says, which is not supported: give a model of one of "
            f"{', '.join(SPLITS)}"
        )
    words = source.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in source.field("tokenizer.ggml.merges")]
    kinds = source.field("tokenizer.ggml.token_type", [NORMAL] * len(words))
    vocab = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut in WHOLE_FIRST))
    made.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[cut])
    made.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == SPECIAL]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return made
