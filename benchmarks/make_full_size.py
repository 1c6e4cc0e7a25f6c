"""Random checkpoints of the real size:  python benchmarks/make_full_size.py variant=image out=/big/disk

variant: image (24.74 GB, 1,021 tensors) or video (28.42 GB, 1,411 tensors). Beside the model's folder come the vision
tower's and the VAE file. Keys, shapes, dtypes and token ids are the published ones (Lance spec sec. 1 to 4); values are
drawn from `seed` on `device`, scaled so that activations stay finite, with outlier channels as trained models have.
scale=tiny writes two narrow layers by the same code.
"""

import json
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from settings import settings_of
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lance_quant.checkpoint.layout import POSITION_TABLE, VIT_PREFIX, expected_shapes, vision_shapes
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.checkpoint.writer import TensorSpec, TensorWriter
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import LanceConfig
from lance_quant.model.embedders import latent_positions
from lance_quant.model.prompts import SYSTEM
from lance_quant.model.request import INSTRUCTIONS
from lance_quant.model.vae import build_vae, upstream_key
from lance_quant.tiny.tokenizer import SPLIT

FOLDERS = {"image": "Lance_3B", "video": "Lance_3B_Video"}
PUBLISHED = {"image": (1021, 6_185_205_808), "video": (1411, 7_105_548_336)}  # tensors, parameters
PUBLISHED_EYES, PUBLISHED_VAE = (390, 668_684_288), (196, 704_688_668)
TABLE_FRAMES = {"image": 1, "video": 31}
TABLE_SIDE = 64

OUTLIERS = 24  # channels of a norm's 2048 that are 10 to 50 times the others
OUTLIER_GAINS = (10.0, 50.0)
PIECE_ELEMENTS = 2**25

BASE_VOCABULARY = 151_643
ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
KNOWN_IDS = {"system": 8948, "user": 872, "assistant": 77091}  # of the words that the templates hold

LLM_CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "vocab_size": 151_936,
    "max_position_embeddings": 128_000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
    "vision_token_id": 151_654,
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "tie_word_embeddings": True,  # as published; the file stores an lm_head of its own
    "torch_dtype": "float32",
}
VISION = {
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "in_chans": 3,
    "patch_size": 14,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "tokens_per_second": 2,
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the three parts. vae: base widths of encoder and decoder."""

    decoder: dict
    vision: dict
    vae: tuple[int, int]


SCALES = {
    "real": Scale(
        decoder={
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "max_window_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        vision={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        vae=(160, 256),
    ),
    "tiny": Scale(
        decoder={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "max_window_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        },
        vision={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        vae=(6, 8),
    ),
}


@dataclass(frozen=True, kw_only=True)
class MakeConfig:
    """What the command takes as key=value. device: where values are drawn; auto: a GPU where there is one."""

    variant: str = "image"
    out: str = ""
    scale: str = "real"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (("variant", FOLDERS), ("scale", SCALES)):
            if getattr(self, name) not in known:
                raise LanceQuantError(f"{name}={getattr(self, name)} is unknown: take one of {', '.join(known)}")
        if not self.out:
            raise LanceQuantError("out=FOLDER is missing: where the checkpoint goes")


def make(cfg: MakeConfig) -> dict:
    """Write the whole checkpoint; returns what was written and how long it took. Parts that are there are kept."""
    started = time.monotonic()
    scale, out = SCALES[cfg.scale], Path(cfg.out)
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    draw = Draw(device, cfg.seed, scale.decoder["num_hidden_layers"])
    folder, eyes = out / FOLDERS[cfg.variant], out / "Qwen2.5-VL-ViT"
    for path in (folder, eyes):
        path.mkdir(parents=True, exist_ok=True)
    vision = VISION | scale.vision
    write_json(folder / "llm_config.json", LLM_CONFIG | scale.decoder | {"vision_config": vision})
    generation = {"bos_token_id": 151_643, "eos_token_id": [151_645, 151_643], "pad_token_id": 151_643}
    write_json(folder / "generation_config.json", generation)
    write_json(eyes / "config.json", vision)
    write_tokenizer(folder)

    tower = vision_shapes(vision)
    shapes = expected_shapes(LanceConfig.from_folder(folder))
    if cfg.variant == "video":
        shapes |= {VIT_PREFIX + name: shape for name, shape in tower.items()}
    shapes[POSITION_TABLE] = (TABLE_FRAMES[cfg.variant] * TABLE_SIDE**2, scale.decoder["hidden_size"])
    seconds = {"model": written(folder / "model.safetensors", shapes, "F32", draw)}
    if cfg.variant == "image":
        seconds["vision tower"] = written(eyes / "vit.safetensors", tower, "BF16", draw)
    seconds["vae"] = written_vae(out / "Wan2.2_VAE.pth", scale.vae, draw)
    found = check(cfg, folder, eyes, out)
    return found | {"seconds": seconds | {"all": round(time.monotonic() - started, 1)}, "device": device}


def check(cfg: MakeConfig, folder: Path, eyes: Path, out: Path) -> dict:
    """Counts of what is on disk. Raises LanceQuantError where a real-size file is not of the published totals."""
    counted = {"model": count(folder / "model.safetensors")}
    if cfg.variant == "image":
        counted["vision tower"] = count(eyes / "vit.safetensors")
    vae = torch.load(out / "Wan2.2_VAE.pth", map_location="cpu", weights_only=True, mmap=True)
    counted["vae"] = (len(vae), sum(tensor.numel() for tensor in vae.values()))
    wanted = {"model": PUBLISHED[cfg.variant], "vision tower": PUBLISHED_EYES, "vae": PUBLISHED_VAE}
    for part, found in counted.items():
        if cfg.scale == "real" and found != wanted[part]:
            raise LanceQuantError(f"{part} holds {found} tensors and parameters, the published one {wanted[part]}")
    tensors, parameters = counted["model"]
    size = (folder / "model.safetensors").stat().st_size
    return {"folder": str(folder), "tensors": tensors, "parameters": parameters, "bytes": size}


def count(path: Path) -> tuple[int, int]:
    with TensorReader(path) as reader:
        return len(reader.names()), sum(prod(reader.shape(name)) for name in reader.names())


# ---------------------------------------------------------------- values


class Draw:
    """Values of a tensor by its name, from one seed and the order of asking.

    Linears and convolutions keep the scale of what they read; what is added to the residual stream is scaled by the
    depth. Norms lie around one, save the outlier channels, the same in all layers of a path.
    """

    def __init__(self, device: str, seed: int, layers: int):
        self.device = device
        self.seed = seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self.residual = (2 * layers) ** -0.5

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """Float32 on the device, blocks of rows."""
        if name == POSITION_TABLE:
            yield from table_frames(shape)
            return
        gains = self.gains(name, shape)
        rows = max(1, PIECE_ELEMENTS // max(1, prod(shape[1:])))
        for start in range(0, shape[0], rows):
            block = (min(rows, shape[0] - start), *shape[1:])
            values = torch.randn(block, generator=self.generator, device=self.device)
            if is_norm(name):
                values.mul_(0.1).add_(1)
            else:
                values.mul_(self.spread(name, shape))
            if gains is not None:
                values *= gains[start : start + block[0]].view(-1, *[1] * (len(shape) - 1))
            yield values

    def spread(self, name: str, shape: tuple[int, ...]) -> float:
        if len(shape) == 1:
            return 0.02
        if "embed_tokens" in name:
            return 0.05
        residual = ("o_proj" in name or "down_proj" in name) and name.startswith("language_model.")
        return prod(shape[1:]) ** -0.5 * (self.residual if residual else 1.0)

    def gains(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Factors [rows]: outlier channels of the norms before linears, and fewer and smaller ones of v and up."""
        layered = name.startswith("language_model.model.layers.") and name.endswith(".weight")
        if not layered:
            return None
        path = 1 if "_moe_gen" in name else 0
        if "layernorm" in name:
            return self.outliers(shape[0], OUTLIERS * shape[0] // 2048 or 1, OUTLIER_GAINS, path)
        if "up_proj" in name or "v_proj" in name:
            return self.outliers(shape[0], shape[0] // 256 or 1, (4.0, 10.0), 2 + path)
        return None

    def outliers(self, channels: int, number: int, gains: tuple[float, float], stream: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + stream)
        low, high = gains
        factors = torch.ones(channels)
        strength = torch.rand(number, generator=generator)
        factors[torch.randperm(channels, generator=generator)[:number]] = low * (high / low) ** strength
        return factors.to(self.device)


def is_norm(name: str) -> bool:
    return "norm" in name or "ln_q" in name or name.endswith("gamma")


def table_frames(shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """The real position table frame by frame; nobody reads it, the model computes its rows (Lance spec sec. 11)."""
    frames, hidden = shape[0] // TABLE_SIDE**2, shape[1]
    over_time = hidden // 3 // 2 * 2
    frame = latent_positions((1, TABLE_SIDE, TABLE_SIDE), hidden)
    for row in latent_positions((frames, 1, 1), hidden):
        frame[:, :over_time] = row[:over_time]
        yield frame.clone()


# ---------------------------------------------------------------- files


def written(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, draw: Draw) -> float | str:
    """Stream a safetensors file; drawing and copying run ahead of the disk. Seconds, or that it was there."""
    if path.exists():
        return "kept"
    started = time.monotonic()
    torch_dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    with TensorWriter(path, [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]) as writer:
        made = (
            (spec.name, piece.to(torch_dtype).cpu())
            for spec in writer.specs
            for piece in draw.pieces(spec.name, spec.shape)
        )
        for name, piece in ahead(made):
            writer.write(name, piece)
    return round(time.monotonic() - started, 1)


def written_vae(path: Path, widths: tuple[int, int], draw: Draw) -> float | str:
    """A plain state dict as upstream's, in F32."""
    if path.exists():
        return "kept"
    started = time.monotonic()
    with torch.device("meta"):
        shapes = {upstream_key(name): tuple(value.shape) for name, value in build_vae(*widths).state_dict().items()}
    state = {name: torch.cat([piece.cpu() for piece in draw.pieces(name, shape)]) for name, shape in shapes.items()}
    draft = path.with_name(path.name + ".partial")
    torch.save(state, draft)
    draft.replace(path)
    return round(time.monotonic() - started, 1)


def ahead(items: Iterable, depth: int = 2) -> Iterator:
    """The same items, made in a thread up to `depth` before they are asked for."""
    made: queue.Queue = queue.Queue(depth)
    end = object()

    def work() -> None:
        try:
            for item in items:
                made.put((item, None))
            made.put((end, None))
        except BaseException as error:
            made.put((end, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        item, error = made.get()
        if error is not None:
            raise error
        if item is end:
            return
        yield item


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 151,665 ids whose special tokens have the published ids (Lance spec sec. 4).

    Bytes and the template's words have their published ids too; what else was learnt from the templates has the next
    free ones, and all others stand for their own number. Text takes about three times as many tokens as published.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [*SYSTEM.values(), *INSTRUCTIONS.values(), *(f"{word}\n" for word in KNOWN_IDS)]
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts * 2, trainer)
    content = json.loads(tokenizer.to_str())
    words = [word for word in content["model"]["vocab"] if word not in alphabet]
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | KNOWN_IDS
    taken = set(vocabulary.values())
    free = (index for index in range(BASE_VOCABULARY) if index not in taken)
    vocabulary |= {word: next(free) for word in words if word not in KNOWN_IDS}
    vocabulary |= {f"Ġ{index}": index for index in free}
    content["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [
        {"id": BASE_VOCABULARY + index, "content": text, **plain, "special": text.startswith("<|")}
        for index, text in enumerate(ADDED_TOKENS)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    write_json(folder / "vocab.json", content["model"]["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings)


def main(arguments: list[str]) -> None:
    try:
        print(json.dumps(make(MakeConfig(**settings_of(arguments, MakeConfig))), indent=1))
    except LanceQuantError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
