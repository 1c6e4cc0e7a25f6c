"""Recipes on a language model:  python benchmarks/quality_lm.py GGUF [--recipes minmax,published,awq,best]
    [--group-size 64] [--seeds 0,1] [--calibration DIR] [--evaluation DIR] [--rotate] [--out results.jsonl]

Writes the GGUF file (llama or qwen2 type) as a checkpoint of the text layout, and runs the product's own capture,
search and pack on plain text for each recipe and seed; each packed folder is dequantized and its next-token
distributions compared with the bf16 model's. Prints a row a run; --out appends them as JSON lines.

Without DIRs of .txt or .md files the texts are those that lie in the Python installation (`plain_texts.py`). A seed
draws the pieces of calibration text; what is evaluated is always the same. Files shorter than a piece are joined.
--recipes also takes the rows of ABLATION.
The products of an evaluation run in float32 on weights rounded to bf16.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from ablation import recipe_of
from gguf_checkpoint import write_checkpoint
from meter import Meter
from plain_texts import write_texts

from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.limits import check_group_size, check_packable
from lance_quant.awq.pack import PackJob, pack
from lance_quant.awq.search import LayerJob, search_layer
from lance_quant.calibration.capture import capture
from lance_quant.calibration.config import CalibrationConfig
from lance_quant.calibration.samples import text_pieces
from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.fill import set_parameter
from lance_quant.checkpoint.layout import Checkpoint, layer_prefix, layer_targets, open_checkpoint
from lance_quant.checkpoint.native import unpack_nibbles
from lance_quant.devices import choose_device
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import LanceConfig
from lance_quant.model.decoder import Decoder
from lance_quant.model.lance import Lance, load_lance
from lance_quant.model.prompts import load_tokenizer
from lance_quant.model.routing import Routing
from lance_quant.runtime.packed import PackedFolder

ROOT = Path(__file__).resolve().parents[1]
PIECE = 512  # tokens
BATCH = 8  # pieces at a time
NARROW, NARROW_TOKENS = 768, 65536  # more text is closer; wider models are given half, or a CPU takes hours


def integers(option: str, words: str) -> list[int]:
    """Whole numbers with commas between. Raises LanceQuantError, which names the option, for anything else."""
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise LanceQuantError(f"{option}={words} must be whole numbers with commas between, such as 0,1") from None


def check_args(args) -> None:
    """What can be said before the model is read; `--device` is resolved. Raises LanceQuantError."""
    check_packable(args.bits)
    args.device = choose_device(args.device)
    for option, least in (("rows", 1), ("gradient_tokens", 0)):
        if getattr(args, option) < least:
            raise LanceQuantError(f"{flag(option)}={getattr(args, option)} must be at least {least}")
    for option in ("calibration_tokens", "evaluation_tokens"):
        value = getattr(args, option)
        if value is not None and value < PIECE:
            raise LanceQuantError(f"{flag(option)}={value} makes no piece: give {PIECE} or more")
    if args.work and not args.work.is_dir():
        raise LanceQuantError(f"--work={args.work} is no folder: make it first")
    if args.out and not args.out.absolute().parent.is_dir():
        raise LanceQuantError(f"--out={args.out} lies in no folder: make {args.out.parent} first")
    if args.out and args.out.is_dir():
        raise LanceQuantError(f"--out={args.out} is a folder: name a file in it, such as {args.out / 'results.jsonl'}")


def flag(option: str) -> str:
    """An option as it is given."""
    return f"--{option.replace('_', '-')}"


def seeds_of(words: str) -> list[int]:
    """Raises LanceQuantError for what no seed may be."""
    seeds = integers("--seeds", words)
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise LanceQuantError(f"--seeds has {seed}, which must lie between 0 and 2**32 - 1")
    return seeds


def check_groups(config: LanceConfig, recipes: list[RecipeConfig], group_size: int) -> None:
    """Raises LanceQuantError for a group size that some recipe cannot take, before hours of capture and search."""
    if group_size < 2 or not all(recipe.group_fallback for recipe in recipes):
        check_group_size(layer_targets(config, 0), group_size)


def text_config(name: str, path: Path, tokens: int, seed: int = 0, **changes) -> CalibrationConfig:
    return CalibrationConfig(
        name=name, source="text", path=str(path), samples=tokens // PIECE, text_tokens=PIECE, seed=seed, **changes
    )


def kept_of(args, recipes: list[RecipeConfig]) -> dict[str, int]:
    """What a capture keeps: every sequence, and gradients where a recipe looks at them.

    Raises LanceQuantError where these are wanted and none are kept.
    """
    looks = next((recipe.name for recipe in recipes if recipe.gradients), None)
    if looks and not args.gradient_tokens:
        raise LanceQuantError(
            f"recipe {looks} weighs errors by gradients, and --gradient-tokens=0 keeps none: raise it"
        )
    gradients = args.gradient_tokens if looks else 0
    return {"rows_per_site": args.rows, "sequences": 10**6, "sequence_tokens": 10**9, "gradient_tokens": gradients}


def texts_of(args, config: LanceConfig, work: Path) -> list[tuple[Path, int]]:
    """(folder, tokens wanted) of calibration and of evaluation: folders given, else `plain_texts.py`, inside `work`."""
    given, tokens = (args.calibration, args.evaluation), (tokens_for(args, config), args.evaluation_tokens)
    made = given if all(given) else write_texts(work / "texts")
    return [(Path(one or other), count) for one, other, count in zip(given, made, tokens, strict=True)]


def cut(checkpoint: Checkpoint, texts: list[tuple[Path, int]]) -> list[list[list[int]]]:
    """The pieces of each text, as many as are wanted or as there are. Raises LanceQuantError where there is none."""
    tokenizer = load_tokenizer(checkpoint.folder)
    return [text_pieces(tokenizer, text_config("text", *text)) for text in texts]


@dataclass(frozen=True)
class Held:
    """Held-out pieces [n, tokens] and the bf16 model's last hidden states for them [n, tokens, H]."""

    pieces: torch.Tensor
    states: torch.Tensor


@dataclass(frozen=True)
class Scores:
    """Means over held-out tokens; kl_error: standard error of the mean, from the means of the pieces."""

    tokens: int
    kl: float
    kl_error: float
    top1: float
    perplexity_bf16: float
    perplexity: float


def states_of(decoder: Decoder, pieces: torch.Tensor) -> torch.Tensor:
    """Final-normed states of the understanding path."""
    positions = torch.arange(pieces.shape[1], device=pieces.device).expand(3, -1)
    spans = [(0, pieces.shape[1], "causal")]
    parts = [decoder(decoder.embed_tokens(part), positions, Routing(), spans) for part in pieces.split(BATCH)]
    return torch.cat(parts)


def bf16_model(checkpoint: Checkpoint, device: str) -> Lance:
    """Weights rounded to bf16, products in float32."""
    lance = load_lance(checkpoint, device, torch.bfloat16).float()
    lance.language_model.model.rope_inv_freq_bf16 = True  # as the bf16 model has it
    return lance


def put_packed(lance: Lance, folder: Path, layers: int) -> None:
    """Replace the layers' weights by those of a packed folder, dequantized to bf16; norms and biases too."""
    with PackedFolder(folder) as packed:
        reader, device = packed.reader, lance.device
        for name, weight in packed.weights.items():
            codes = unpack_nibbles(reader.read(f"{name}.qweight").to(device)).unflatten(-1, (-1, weight.group_size))
            scales, zeros = (reader.read(f"{name}.{part}").to(device).float() for part in ("scales", "zeros"))
            value = ((codes - zeros[..., None]) * scales[..., None]).flatten(1)
            set_parameter(lance, f"{name}.weight", value.to(torch.bfloat16).float())
        names = set(packed.weights)
        for key, _ in list(lance.named_parameters()):
            if (
                any(key.startswith(layer_prefix(layer)) for layer in range(layers))
                and key[: -len(".weight")] not in names
            ):
                set_parameter(lance, key, reader.read(key).to(device).float())


def score(lance: Lance, held: Held) -> Scores:
    head = lance.language_model.lm_head.weight
    states = states_of(lance.language_model.model, held.pieces)
    kl, same, loss, loss_bf16 = [], [], [], []
    for ids, bf16, ours in zip(held.pieces, held.states, states, strict=True):
        p, q = ((part[:-1] @ head.T).log_softmax(-1) for part in (bf16, ours))
        kl.append((p.exp() * (p - q)).sum(-1).double().mean().item())
        same.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
        for part, into in ((p, loss_bf16), (q, loss)):
            into.append(-part.gather(-1, ids[1:, None]).double().mean().item())
    mean = torch.tensor([kl, same, loss_bf16, loss], dtype=torch.float64)
    return Scores(
        tokens=held.pieces.shape[0] * (held.pieces.shape[1] - 1),
        kl=mean[0].mean().item(),
        kl_error=(mean[0].std() / math.sqrt(len(kl))).item(),
        top1=mean[1].mean().item(),
        perplexity_bf16=math.exp(mean[2].mean()),
        perplexity=math.exp(mean[3].mean()),
    )


def quantize(checkpoint: Checkpoint, captured: Path, recipe: RecipeConfig, args, seed: int, work: Path) -> Path:
    """Search and pack into a folder inside `work`."""
    folders = []
    for layer in range(checkpoint.config.num_hidden_layers):
        folder = work / f"layer{layer}"
        folder.mkdir(parents=True)
        job = LayerJob(
            checkpoint=checkpoint,
            layer=layer,
            capture=captured if recipe.needs_capture else None,
            recipe=recipe,
            group_size=args.group_size,
            bits=args.bits,
            seed=seed,
            before=folders[-1] if folders and recipe.sequential else None,
        )
        search_layer(job, folder, args.device)
        folders.append(folder)
        show(f"{recipe.name}: layer {layer + 1} of {checkpoint.config.num_hidden_layers}")
    show("")
    job = PackJob(
        checkpoint=checkpoint,
        layers=folders,
        recipe=recipe,
        group_size=args.group_size,
        bits=args.bits,
        tasks_calibrated=["text"],
    )
    out = work / "packed"
    out.mkdir()
    pack(job, out)
    return out


def show(progress: str) -> None:
    """On one line, written over by the next, where a terminal shows it."""
    if sys.stderr.isatty():
        print(f"\r{progress:60}\r", end="", file=sys.stderr)


def main(args) -> None:
    in_a_sentence(compare, args)


def in_a_sentence(work: Callable, args) -> None:
    """Bad input ends the script with what is wrong alone."""
    try:
        work(args)
    except LanceQuantError as error:
        sys.exit(f"error: {error}")


def written(gguf: Path, folder: Path, rotate: bool = False) -> Checkpoint:
    """The GGUF file as a checkpoint in `folder`."""
    write_checkpoint(gguf, folder, rotate)
    return open_checkpoint(CheckpointConfig(name="text", path=str(folder)))


@torch.no_grad()
def compare(args) -> None:
    check_args(args)
    recipes, seeds = [recipe_of(label) for label in args.recipes.split(",")], seeds_of(args.seeds)
    kept = kept_of(args, recipes)
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        work = Path(scratch)
        checkpoint = written(args.gguf, work / "model")
        config = checkpoint.config
        check_groups(config, recipes, args.group_size)
        texts = texts_of(args, config, work)
        fitted, pieces = cut(checkpoint, texts)
        if len(pieces) < 2:
            raise LanceQuantError(f"{texts[1][0]} gives one piece of {PIECE} tokens to evaluate with: +- needs two")
        print(
            f"{Path(args.gguf).name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
            f"{config.num_attention_heads}/{config.num_key_value_heads} heads{', rotated values' * args.rotate}; "
            f"{args.bits} bits, group size {args.group_size}, on {args.device}; {len(fitted) * PIECE} of "
            f"{texts[0][1]} calibration tokens, {len(pieces) * PIECE} of {texts[1][1]} to evaluate with"
        )
        pieces = torch.tensor(pieces, device=args.device)
        lance = bf16_model(checkpoint, args.device)
        held = Held(pieces, states_of(lance.language_model.model, pieces))
        if args.rotate:  # what is compared with stays the model as it came
            checkpoint = written(args.gguf, work / "model", rotate=True)
        print(HEADER)
        for seed in seeds:
            captured = work / f"capture{seed}"
            captured.mkdir()
            capture(checkpoint, text_config("text", *texts[0], seed, **kept), captured, args.device)
            for recipe in recipes:
                started = time.monotonic()
                with Meter() as meter:
                    packed = quantize(checkpoint, captured, recipe, args, seed, work / "run")
                seconds = time.monotonic() - started
                put_packed(lance, packed, config.num_hidden_layers)
                row = {"model": Path(args.gguf).name, "recipe": recipe.name, "seed": seed, "bits": args.bits}
                row |= {"group_size": args.group_size, "calibration_tokens": len(fitted) * PIECE, "rotate": args.rotate}
                row |= {**asdict(score(lance, held)), "seconds": round(seconds, 1)}
                row |= {"host_bytes": meter.host_bytes, "gpu_bytes": meter.gpu_bytes, "device": args.device}
                tell(row, args.out)
                shutil.rmtree(work / "run")
            shutil.rmtree(captured)


HEADER = (
    "| recipe | seed | mean KL | +- | top-1 | perplexity | change | seconds | peak memory GB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def tell(row: dict, out: Path | None) -> None:
    change = row["perplexity"] / row["perplexity_bf16"] - 1
    memory = f"{row['host_bytes'] / 1e9:.2f}"
    if row["gpu_bytes"]:
        memory += f" + {row['gpu_bytes'] / 1e9:.2f} GPU"
    print(
        f"| {row['recipe']} | {row['seed']} | {row['kl']:.4f} | {row['kl_error']:.4f} | {row['top1']:.4f} | "
        f"{row['perplexity']:.3f} | {change:+.2%} | {row['seconds']:.0f} | {memory} |",
        flush=True,
    )
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def tokens_for(args, config: LanceConfig) -> int:
    """Of calibration, as asked for or by the model's width."""
    return args.calibration_tokens or (NARROW_TOKENS if config.hidden_size <= NARROW else NARROW_TOKENS // 2)


def parser_of(text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--recipes", default="minmax,published,awq,best")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--calibration", help="folder of .txt or .md files")
    parser.add_argument("--evaluation", help="folder of .txt or .md files")
    parser.add_argument("--calibration-tokens", type=int, help=f"{NARROW_TOKENS}; half above a width of {NARROW}")
    parser.add_argument("--evaluation-tokens", type=int, default=20480)
    parser.add_argument("--gradient-tokens", type=int, default=16384, help="about so many of them with gradients")
    parser.add_argument("--rows", type=int, default=2048, help="rows captured of a site, beside the sequences")
    parser.add_argument(
        "--rotate",
        action="store_true",
        help="quantize an equal model whose values are rotated within each head; compared with the file's own",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="where the working folder goes")
    parser.add_argument("--out", type=Path, help="JSON lines, appended")
    return parser


if __name__ == "__main__":
    main(parser_of(__doc__).parse_args())
