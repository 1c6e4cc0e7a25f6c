"""Recipes on single layers, in minutes:  python benchmarks/layer_error.py GGUF [--recipes four_folds,fast,best]
    [--layers 5,17,26] [--group-size 64] [--calibration DIR] [--evaluation DIR] [--out layers.jsonl]

As `quality_lm.py`, but searches a few layers alone and prints the relative squared error of each one's output, per
token, times 10^4: on the sequences that it was fitted to and on held-out ones, which float states enter, those of
sequential recipes too. It ranks what is tried before a whole model is quantized; the gap between the two columns is
what more calibration text would buy.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from ablation import recipe_of
from quality_lm import (
    PIECE,
    check_args,
    check_groups,
    cut,
    in_a_sentence,
    integers,
    kept_of,
    parser_of,
    text_config,
    texts_of,
    written,
)

from lance_quant.awq.artifact import LAYER_FILE
from lance_quant.awq.block import Block
from lance_quant.awq.grid import Rounded
from lance_quant.awq.lessons import lessons, whole_loss
from lance_quant.awq.search import LayerJob, read_tensors, search_layer
from lance_quant.calibration.capture import capture
from lance_quant.calibration.sequences import read_sequences
from lance_quant.checkpoint.layout import layer_targets
from lance_quant.checkpoint.native import unpack_nibbles
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.errors import LanceQuantError

AT_ONCE = 4096  # tokens


def rounded_layer(job: LayerJob, folder: Path, source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The source's layer with what a search artifact holds in place of it, float32."""
    layer = dict(source)
    device = next(iter(source.values())).device
    with TensorReader(folder / LAYER_FILE) as reader:
        for key in reader.names():
            if key in layer:
                layer[key] = reader.read(key).to(device).float()
        for target in layer_targets(job.checkpoint.config, job.layer):
            codes, scales, zeros = (
                reader.read(f"{target.name}.{part}").to(device) for part in ("qweight", "scales", "zeros")
            )
            layer[f"{target.name}.weight"] = Rounded(unpack_nibbles(codes), scales, zeros).dequantize()
    return layer


def main(args) -> None:
    in_a_sentence(compare, args)


@torch.no_grad()
def compare(args) -> None:
    check_args(args)
    layers = dict.fromkeys(integers("--layers", args.layers))  # each once
    recipes = [replace(recipe_of(label), sequential=False) for label in dict.fromkeys(args.recipes.split(","))]
    kept = kept_of(args, recipes)
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        work = Path(scratch)
        checkpoint = written(args.gguf, work / "model", args.rotate)
        count = checkpoint.config.num_hidden_layers
        for layer in layers:
            if not 0 <= layer < count:
                raise LanceQuantError(f"--layers has {layer}, and the model's are 0 to {count - 1}")
        check_groups(checkpoint.config, recipes, args.group_size)
        texts = texts_of(args, checkpoint.config, work)
        fitted, held = (len(pieces) * PIECE for pieces in cut(checkpoint, texts))
        print(f"{fitted} of {texts[0][1]} calibration tokens, {held} of {texts[1][1]} held out")
        for name, text in zip(("fitted", "held"), texts, strict=True):
            (work / name).mkdir()
            capture(checkpoint, text_config(name, *text, **kept), work / name, args.device)
        print(
            "| recipe | "
            + " | ".join(f"layer {layer} fitted | held out" for layer in layers)
            + " | seconds a layer |\n"
            + "|---" * (2 + 2 * len(layers))
            + "|"
        )
        for recipe in recipes:
            row = {"model": args.gguf.name, "recipe": recipe.name, "group_size": args.group_size}
            row |= {"rotate": args.rotate, "errors": {}}
            started = time.monotonic()
            for layer in layers:
                job = LayerJob(
                    checkpoint=checkpoint,
                    layer=layer,
                    capture=work / "fitted" if recipe.needs_capture else None,
                    recipe=recipe,
                    group_size=args.group_size,
                    bits=args.bits,
                )
                out = work / f"{recipe.name}{layer}"
                out.mkdir()
                search_layer(job, out, args.device)
                row["errors"][layer] = errors(job, out, work, args.device)
            row["seconds"] = round((time.monotonic() - started) / len(layers), 1)
            values = " | ".join(f"{1e4 * value:.2f}" for pair in row["errors"].values() for value in pair)
            print(f"| {recipe.name} | {values} | {row['seconds']} |", flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def errors(job: LayerJob, folder: Path, work: Path, device: str) -> tuple[float, float]:
    """(fitted, held out)."""
    source = read_tensors(job, device)
    layer = rounded_layer(job, folder, source)
    found = []
    for name in ("fitted", "held"):
        block = Block(job.checkpoint.config, job.layer, read_sequences(work / name, job.layer), device)
        found.append(whole_loss(block, layer, lessons(block, source, {}), AT_ONCE))
    return found[0], found[1]


def parser_of_layers() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.set_defaults(recipes="nearest,two_folds,four_folds,four_folds_group_clip,gptq_group_clip,fast,best")
    parser.add_argument("--layers", default="5,17,26")
    return parser


if __name__ == "__main__":
    main(parser_of_layers().parse_args())
