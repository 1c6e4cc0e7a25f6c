"""`pack`: the source file and the searched layers -> one folder in the native layout, streamed tensor by tensor.

Each key of the source comes over as bf16, save that a quantized weight becomes qweight, scales and zeros, and that
what a fold changed (norms, biases) is taken from the layer's search artifact.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch

from lance_quant.awq.artifact import LAYER_FILE, LINEARS_FILE
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.limits import check_packable
from lance_quant.checkpoint.layout import Checkpoint, targets
from lance_quant.checkpoint.native import FOLDED, META_FILE, PARTS, STATE_FILE, packed_specs
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.checkpoint.writer import TensorWriter
from lance_quant.errors import LanceQuantError
from lance_quant.progress import Progress


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """layers: the search artifacts' folders, in layer order. tasks_calibrated: for the meta file."""

    checkpoint: Checkpoint
    layers: list[Path]
    recipe: RecipeConfig
    group_size: int
    bits: int
    tasks_calibrated: list[str]


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """bytes: of the tensor file, header included; tensor_bytes: without it."""

    tensors: int
    bytes: int
    tensor_bytes: int
    awq_linears: int
    plain_linears: int


def read_linears(job: PackJob) -> dict[str, dict]:
    """linears.parquet of all layers, by linear name. Raises LanceQuantError where a linear or a layer is missing."""
    rows = {}
    for folder in job.layers:
        rows |= {row["name"]: row for row in pq.read_table(folder / LINEARS_FILE).to_pylist()}
    for target in targets(job.checkpoint.config):
        row = rows.get(target.name)
        if row is None:
            raise LanceQuantError(f"no search artifact holds {target.name}: search layer {target.layer} again")
        if row["bits"] != job.bits:
            raise LanceQuantError(f"{target.name} was searched at bits={row['bits']}, pack was asked for {job.bits}")
    return rows


def packed_meta(job: PackJob, linears: dict[str, dict]) -> dict:
    """awq_meta.json: the published fields, and `recipe` with its settings, which readers may ignore."""
    folded = sum(row["scheme"] == FOLDED for row in linears.values())
    return {
        "n_bit": job.bits,
        "group_size": job.group_size,
        "scheme": FOLDED,
        "awq_linears": folded,
        "plain_linears": len(linears) - folded,
        "tasks_calibrated": list(job.tasks_calibrated),
        "per_weight": {
            f"{name}.weight": {
                "shape": [row["out_features"], row["in_features"]],
                "n_bit": row["bits"],
                "group_size": row["group_size"],
                "scheme": row["scheme"],
            }
            for name, row in linears.items()
        },
        "recipe": asdict(job.recipe),
    }


def places(job: PackJob, linears: dict[str, dict]) -> dict[str, Path]:
    """Packed key -> the layer file that holds it, for every key that does not come from the source as it is."""
    found = {}
    for folder in job.layers:
        with TensorReader(folder / LAYER_FILE) as reader:
            found |= {key: folder / LAYER_FILE for key in reader.names() if not key.startswith("scale.")}
    for name in linears:
        for part in PARTS:
            if f"{name}.{part}" not in found:
                raise LanceQuantError(f"no {LAYER_FILE} holds {name}.{part}: search its layer again")
    return found


def pack(job: PackJob, out: Path, progress: Progress | None = None) -> PackSummary:
    """Write the packed tensors and the meta file into the empty folder `out`. Holds a piece of a tensor.

    Raises LanceQuantError for bits above 4 and for search artifacts that do not cover the checkpoint.
    """
    check_packable(job.bits)
    linears = read_linears(job)
    searched = places(job, linears)
    source = job.checkpoint.model_file
    with TensorReader(source) as reader:
        shapes = [(key, reader.shape(key)) for key in reader.names()]
    specs = packed_specs(shapes, {name: row["group_size"] for name, row in linears.items()})
    with contextlib.ExitStack() as opened:
        writer = opened.enter_context(TensorWriter(out / STATE_FILE, specs))
        readers = {path: opened.enter_context(TensorReader(path)) for path in (source, *set(searched.values()))}
        for done, spec in enumerate(writer.specs):
            if progress:
                progress(done, len(specs), spec.name)
            for piece in readers[searched.get(spec.name, source)].pieces(spec.name):
                writer.write(spec.name, piece if spec.name in searched else piece.to(torch.bfloat16))
    meta = packed_meta(job, linears)
    (out / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")
    return PackSummary(
        tensors=len(specs),
        bytes=(out / STATE_FILE).stat().st_size,
        tensor_bytes=sum(spec.bytes for spec in specs),
        awq_linears=meta["awq_linears"],
        plain_linears=meta["plain_linears"],
    )
