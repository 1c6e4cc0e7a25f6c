"""What a recipe costs on the published sizes:  python benchmarks/recipe_cost.py [--recipes fast,best] [--layers 6]

Random layers of Lance_3B's sizes with outlier channels, both experts, and an artificial capture: `--rows` rows a site,
and sequences of `--tokens` tokens in all, half of them questions, half pictures. Each layer is read, searched, rounded
and written as in a run; sequential recipes enter it by a prefix, as every layer of theirs but the first. Prints seconds
a layer (the first one apart: it warms up), what 36 layers make, and the peak memory of one layer more, since watching
it costs time. `--sizes tiny` tries the script itself. `--profile` runs two layers in a process of their own, each
launch waited for, and prints where the seconds of the second went, function by function.
"""

import argparse
import cProfile
import functools
import json
import multiprocessing
import os
import pstats
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ablation import recipe_of
from meter import Meter
from safetensors.torch import save_file

from lance_quant.awq.block import Block
from lance_quant.awq.search import LayerJob, read_tensors, search_layer, write_prefix
from lance_quant.calibration.activations import (
    GRADIENTS,
    HIDDEN,
    ROWS_SCHEMA,
    STATES_SCHEMA,
    STATISTICS_SCHEMA,
    bit_patterns,
    layer_file,
    states_file,
    table_writer,
    write_states,
)
from lance_quant.calibration.sequences import read_sequences
from lance_quant.checkpoint.layout import PATHS, SITES, Checkpoint, expected_shapes, layer_prefix
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import LanceConfig
from lance_quant.model.resolution import Preset

LAYERS = 36
LAYER = 1  # the one that is made and searched
OFF = 0.05  # share of another channel that the layers before left in each
CHANNELS = 48  # that what is drawn hangs on
OUTLIERS, GAIN = 24, 20.0  # channels of a norm that are larger, and by how much
SIZES = {
    "published": {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2}
    | {"rope_scaling": {"mrope_section": [16, 24, 24]}, "head_dim": 128},
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"rope_scaling": {"mrope_section": [4, 6, 6]}, "head_dim": 32},
}
REST = {"num_hidden_layers": LAYER + 1, "vocab_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "eos_token_id": 1}
REST |= {"vision_start_token_id": 2, "vision_end_token_id": 3, "video_token_id": 4}


def make_checkpoint(folder: Path, sizes: str, device: str) -> Checkpoint:
    """One random layer on disk, F32."""
    config = LanceConfig.from_dict(SIZES[sizes] | REST, tokenizer_length=64)
    draw = torch.Generator(device).manual_seed(0)
    tensors = {}
    for key, shape in expected_shapes(config, adapters=False).items():
        if not key.startswith(layer_prefix(LAYER)):
            continue
        value = torch.randn(shape, generator=draw, device=device)
        if len(shape) == 2:
            value /= shape[1] ** 0.5
        elif key.endswith(".weight"):
            value = 1 + 0.1 * value
            if "layernorm" in key:
                value[torch.randperm(len(value), generator=draw, device=device)[:OUTLIERS]] *= GAIN
        tensors[key] = value.cpu()
    file = folder / "model.safetensors"
    save_file(tensors, file)
    edges = Preset(768, 672)
    nowhere = folder / "absent"
    return Checkpoint(
        name=sizes,
        layout="image",
        folder=folder,
        model_file=file,
        config_file=nowhere,
        vit_file=None,
        vit_config_file=nowhere,
        vae_file=nowhere,
        config=config,
        pictures=edges,
        clips=edges,
        frames=1,
    )


def make_capture(folder: Path, checkpoint: Checkpoint, args) -> None:
    """A capture of the layer in the product's own schema: states drawn, rows computed by the layer itself."""
    length = args.length
    count = max(2, args.tokens // length)
    draw = torch.Generator().manual_seed(1)
    hidden = checkpoint.config.hidden_size
    gains = torch.ones(hidden)
    gains[torch.randperm(hidden, generator=draw)[: OUTLIERS // 2]] = 8.0
    mix = torch.randn(64, hidden, generator=draw) / 8
    sequences, states = [], []
    for number in range(count):
        picture = number % 2 == 1
        context = length // 8 if picture else length
        states.append(
            ((torch.randn(length, 64, generator=draw) @ mix + torch.randn(length, hidden, generator=draw)) * gains).to(
                torch.bfloat16
            )
        )
        order = np.arange(length)
        latent = order >= context
        sequences.append(
            {
                "sequence": np.full(length, number, dtype=np.int32),
                "sample": np.full(length, number, dtype=np.int32),
                "task": np.full(length, "t2i" if picture else "x2t_image", dtype=object),
                "timestep": np.full(length, 0.5 if picture else np.nan, dtype=np.float32),
                "token": order.astype(np.int32),
                **{axis: order.astype(np.int32) for axis in "thw"},
                "split": latent.astype(np.int32),
                "mode": np.where(latent, "noise", "causal").astype(object),
                "expert": np.where(latent, "gen", "und").astype(object),
                "output": np.where(latent, "velocity", "logits").astype(object),
            }
        )
    columns = {name: np.concatenate([one[name] for one in sequences]) for name in sequences[0]}
    pq.write_table(pa.table(columns), folder / "sequences.parquet")
    directions = torch.randn(CHANNELS, hidden, generator=draw)
    for kind, of in (
        (HIDDEN, lambda state: state),
        (GRADIENTS, lambda state: (torch.randn(len(state), CHANNELS, generator=draw) @ directions).to(torch.bfloat16)),
    ):
        with table_writer(states_file(folder, kind, LAYER), STATES_SCHEMA) as writer:
            for number, state in enumerate(states):
                write_states(writer, number, of(state))
    order = torch.randperm(hidden, generator=draw)
    prefix = [(state + OFF * state[:, order]).to(torch.bfloat16) for state in states]  # so that all is there to be done
    write_prefix(dict(enumerate(prefix)), folder)
    tensors = read_tensors(job_of("best", checkpoint, folder, args), args.device)
    kept = read_sequences(folder, LAYER)
    computed = Block(checkpoint.config, LAYER, kept, args.device).site_rows(tensors)
    coverage = []
    for path in PATHS:
        writers = {}
        for kind, schema in (("statistics", STATISTICS_SCHEMA), ("rows", ROWS_SCHEMA)):
            file = layer_file(folder, kind, path, LAYER)
            file.parent.mkdir(parents=True)
            writers[kind] = (pq.ParquetWriter(file, schema), schema)
        for site in SITES:
            read = computed[path, site]
            for task in dict.fromkeys(read.tasks):
                at = [place for place, one in enumerate(read.tasks) if one == task]
                seen = read.rows[torch.tensor(at, device=read.rows.device)].float().cpu()
                coverage.append(
                    {"task": task, "path": path, "layer": LAYER, "site": site, "tokens": len(seen), "weight": 1.0}
                )
                drawn = torch.randperm(len(seen), generator=draw)[: args.rows // len(set(read.tasks))].tolist()
                kept = seen[drawn]
                width = seen.shape[1]
                tables = {
                    "statistics": {
                        "task": [task] * width,
                        "site": [site] * width,
                        "channel": np.arange(width),
                        "mean_abs": seen.abs().mean(0).numpy(),
                        "mean_sq": seen.square().mean(0).numpy(),
                        "max_abs": seen.abs().amax(0).numpy(),
                    },
                    "rows": {
                        "task": [task] * len(kept),
                        "site": [site] * len(kept),
                        "sample": [read.samples[at[place]] for place in drawn],
                        "timestep": np.full(len(kept), np.nan),
                        "row": bit_patterns(kept.to(torch.bfloat16)),
                    },
                }
                for kind, (writer, schema) in writers.items():
                    writer.write_table(pa.table(tables[kind]).cast(schema))
        for writer, _ in writers.values():
            writer.close()
    pq.write_table(pa.Table.from_pylist(coverage), folder / "coverage.parquet")


def job_of(label: str, checkpoint: Checkpoint, captured: Path, args) -> LayerJob:
    recipe = recipe_of(label)
    return LayerJob(
        checkpoint=checkpoint,
        layer=LAYER,
        capture=captured if recipe.needs_capture else None,
        recipe=recipe,
        group_size=args.group_size,
        before=captured if recipe.sequential else None,
    )


def measure(job: LayerJob, args, work: Path) -> dict:
    """Seconds of each layer, and what they put on disk."""
    label, seconds = job.recipe.name, []
    for turn in range(args.layers + 2):
        out = work / f"{label}{turn}"
        out.mkdir()
        with nullcontext() if turn <= args.layers else Meter() as meter:
            started = time.monotonic()
            summary = search_layer(job, out, args.device)
            seconds.append(time.monotonic() - started)
    first, seconds = seconds[0], seconds[1:-1]
    typical = statistics.mean(seconds)
    return {
        "recipe": label,
        "seconds_first": round(first, 2),
        "seconds_layer": round(typical, 3),
        "seconds_spread": round(max(seconds) - min(seconds), 3),
        "minutes_model": round(typical * LAYERS / 60, 2),
        "error_before": round(summary.error_before, 4),
        "error_after": round(summary.error_after, 4),
        "gpu_bytes": meter.gpu_bytes,
        "host_bytes": meter.host_bytes,
    }


def profile(job: LayerJob, device: str, work: Path) -> None:
    """In a fresh process, that its launches are waited for: cumulative seconds of the functions that took the most."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # the driver reads it when the device is first used
    watched = cProfile.Profile()
    for call in (search_layer, functools.partial(watched.runcall, search_layer)):
        with tempfile.TemporaryDirectory(dir=work) as out:
            call(job, Path(out), device)
    pstats.Stats(watched).sort_stats("cumulative").print_stats(60)


def main(args) -> None:
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"{device}, {args.layers} layers of {args.sizes} sizes, both experts, group size {args.group_size}")
    print("| recipe | s a layer | spread | first | 36 layers, minutes | error before | after | GPU GB | host GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        work = Path(scratch)
        (work / "capture").mkdir()
        checkpoint = make_checkpoint(work, args.sizes, args.device)
        make_capture(work / "capture", checkpoint, args)
        for label in args.recipes.split(","):
            job = job_of(label, checkpoint, work / "capture", args)
            row = measure(job, args, work)
            print(
                f"| {label} | {row['seconds_layer']} | {row['seconds_spread']} | {row['seconds_first']} | "
                f"{row['minutes_model']} | {row['error_before']} | {row['error_after']} | "
                f"{(row['gpu_bytes'] or 0) / 1e9:.2f} | {row['host_bytes'] / 1e9:.2f} |",
                flush=True,
            )
            if args.profile:
                fresh = multiprocessing.get_context("spawn").Process(target=profile, args=(job, args.device, work))
                fresh.start()
                fresh.join()
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row | {"device": device, "layers": args.layers}) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="minmax,published,awq,fast,best")
    parser.add_argument("--layers", type=int, default=6, help="measured, after one to warm up")
    parser.add_argument("--profile", action="store_true", help="print where the time went, too")
    parser.add_argument("--sizes", choices=tuple(SIZES), default="published")
    parser.add_argument("--rows", type=int, default=1024, help="of a site, over both tasks")
    parser.add_argument("--tokens", type=int, default=32000, help="of all kept sequences")
    parser.add_argument("--length", type=int, default=1024, help="of a sequence")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="where the working folder goes")
    parser.add_argument("--out", type=Path, help="JSON lines, appended")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(arguments())
    except LanceQuantError as error:
        sys.exit(f"error: {error}")
