"""The search artifact of one layer, and what it is made of: tables as Parquet, tensors as safetensors.

    layer.safetensors     <linear>.qweight .scales .zeros, folded norms and biases, scale.<path>.<fold>
    losses.parquet        the loss of every scale that was tried
    linears.parquet       a row a linear: how it was scaled, clipped and rounded, its error before and after
    ingredients.parquet   a row a linear and ingredient: its error from there on
    prefix.safetensors    of sequential recipes: each kept sequence as it leaves the rounded layer, bf16

Errors of linears are those of their own outputs on the rows that choices are made by (`Split.judge`), kept sequences'
among them; tasks count by calibration.weights. Inputs are the float model's, save those of kept sequences in sequential
recipes, which are as the rounded layers before leave them. The residual and learned rounding answer for the whole layer
and may raise one linear's error to lower the layer's; gradients raise `error`, which counts all directions of the
outputs alike, to lower `weighed`, which counts what they do to velocities and logits (`outputs.py`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lance_quant.awq.grid import Rounded
from lance_quant.awq.limits import PACKED_BITS
from lance_quant.awq.topology import ResolvedFold
from lance_quant.checkpoint.native import FOLDED, pack_nibbles
from lance_quant.checkpoint.writer import TensorSpec, TensorWriter

LAYER_FILE = "layer.safetensors"
LOSSES_FILE = "losses.parquet"
LINEARS_FILE = "linears.parquet"
INGREDIENTS_FILE = "ingredients.parquet"
PREFIX_FILE = "prefix.safetensors"
IDENTITY = "identity"  # the family of the scale that is 1 everywhere

LOSSES = pa.schema(
    [
        ("layer", pa.int32()),
        ("path", pa.string()),
        ("fold", pa.string()),
        ("family", pa.string()),
        ("alpha", pa.float64()),
        ("loss", pa.float64()),
        ("chosen", pa.bool_()),
    ]
)
LINEARS = pa.schema(
    [
        ("layer", pa.int32()),
        ("path", pa.string()),
        ("name", pa.string()),
        ("site", pa.string()),
        ("scheme", pa.string()),
        ("group_size", pa.int32()),
        ("bits", pa.int32()),
        ("out_features", pa.int32()),
        ("in_features", pa.int32()),
        ("fold", pa.string()),  # whose scale its columns carry; null where none
        ("family", pa.string()),
        ("alpha", pa.float64()),
        ("clip_low", pa.float64()),  # share of its groups' low ends that is kept, the mean; null where none was sought
        ("clip_high", pa.float64()),
        # "output": relative L2 of its outputs on held-out rows, tasks by their weights; "weight": of itself
        ("error_kind", pa.string()),
        ("error_before", pa.float64()),  # rounded to nearest without any fold
        ("error_after", pa.float64()),
        ("weighed_before", pa.float64()),  # of outputs as gradients weigh them; null where none tells
        ("weighed_after", pa.float64()),
    ]
)
INGREDIENTS = pa.schema(
    [
        ("layer", pa.int32()),
        ("path", pa.string()),  # "both" of the layer as a whole
        ("name", pa.string()),  # "layer" of the layer as a whole, on its kept sequences
        ("ingredient", pa.string()),  # minmax, folds, clip, gptq, residual, learned: with all those before it
        ("error_kind", pa.string()),
        ("error", pa.float64()),
        ("share", pa.float64()),  # of minmax's error, what this ingredient took off; null of minmax itself
        ("weighed", pa.float64()),  # as in LINEARS; null of the layer as a whole
        ("weighed_share", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """error_before, error_after: means over the layer's linears, as in linears.parquet. bytes: of layer.safetensors."""

    layer: int
    linears: int
    folded: int
    error_before: float
    error_after: float
    bytes: int


@dataclass(frozen=True)
class Trial:
    """One candidate scale of a fold and its score."""

    family: str
    alpha: float
    loss: float


@dataclass(frozen=True)
class FoundScale:
    """What the search of one fold found; scale float32, one value per producer channel."""

    fold: ResolvedFold
    scale: Tensor
    best: Trial
    trials: list[Trial]


@dataclass
class LayerResult:
    """A searched and rounded layer. folded_tensors: norms and biases that a fold changed, bf16, under source keys."""

    rounded: dict[str, Rounded] = field(default_factory=dict)
    folded_tensors: dict[str, Tensor] = field(default_factory=dict)
    found: list[FoundScale] = field(default_factory=list)
    linears: list[dict] = field(default_factory=list)
    ingredients: list[dict] = field(default_factory=list)


def write_layer(layer: int, bits: int, result: LayerResult, out: Path) -> LayerSummary:
    """The layer's tensors and tables into the folder `out`; codes of more than 4 bits take a byte each."""
    tensors = dict(result.folded_tensors)
    tensors |= {f"scale.{found.fold.name}": found.scale for found in result.found}
    for name, rounded in result.rounded.items():
        codes = pack_nibbles(rounded.codes) if bits <= PACKED_BITS else rounded.codes
        tensors |= {f"{name}.qweight": codes, f"{name}.scales": rounded.scales, f"{name}.zeros": rounded.zeros}
    words = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
    specs = [TensorSpec(key, words[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()]
    with TensorWriter(out / LAYER_FILE, specs) as writer:
        for spec in writer.specs:
            writer.write(spec.name, tensors[spec.name])
    losses = [
        {
            "layer": layer,
            "path": found.fold.path,
            "fold": found.fold.fold.name,
            "family": trial.family,
            "alpha": trial.alpha,
            "loss": trial.loss,
            "chosen": trial is found.best,
        }
        for found in result.found
        for trial in found.trials
    ]
    tables = {LOSSES_FILE: (losses, LOSSES), LINEARS_FILE: (result.linears, LINEARS)}
    tables |= {INGREDIENTS_FILE: (result.ingredients, INGREDIENTS)}
    for file, (rows, schema) in tables.items():
        pq.write_table(pa.Table.from_pylist(rows, schema), out / file)
    count = len(result.linears)
    return LayerSummary(
        layer=layer,
        linears=count,
        folded=sum(row["scheme"] == FOLDED for row in result.linears),
        error_before=sum(row["error_before"] for row in result.linears) / count,
        error_after=sum(row["error_after"] for row in result.linears) / count,
        bytes=(out / LAYER_FILE).stat().st_size,
    )
