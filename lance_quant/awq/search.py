"""`search_layer`: one layer, both paths: read its weights, search a scale for each fold, fold, round, write.

1. read    the layer's linears, biases and norms, by name, from the source file
2. search  for each fold, every (family, alpha); the first strict minimum of the recipe's score wins, identity included
3. fold    into the tensors at once, so that later folds see what earlier ones did
4. round   every linear to the recipe's grid
5. write   layer.safetensors, losses.parquet, linears.parquet

Layers know nothing of each other: any number of workers gives the same bytes.
"""

from dataclasses import dataclass, field
from math import inf, sqrt
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.grid import Grid, Rounded, grid_of, quantize
from lance_quant.awq.limits import PACKED_BITS, check_bits, check_group_size, fallback_group
from lance_quant.awq.score import SCORES, Evidence, OutputError, evidence, mean_activation
from lance_quant.awq.topology import ResolvedFold, apply, resolve
from lance_quant.calibration.activations import read_layer
from lance_quant.checkpoint.layout import NORMS, PATHS, Checkpoint, Target, layer_targets, norm_name
from lance_quant.checkpoint.native import FOLDED, PLAIN, UNSEEN, pack_nibbles
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.checkpoint.writer import TensorSpec, TensorWriter
from lance_quant.errors import LanceQuantError

LAYER_FILE = "layer.safetensors"
LOSSES_FILE = "losses.parquet"
LINEARS_FILE = "linears.parquet"
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
        ("error_kind", pa.string()),  # "output": relative L2 on captured rows, each task alike; "weight": relative L2
        ("error_before", pa.float64()),  # rounded without any fold
        ("error_after", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class LayerJob:
    """One unit of search. capture: the capture artifact's folder, None for recipes that need none.

    seed: for recipes that draw; those that ship draw nothing of their own.
    """

    checkpoint: Checkpoint
    layer: int
    capture: Path | None
    recipe: RecipeConfig
    group_size: int
    bits: int = 4
    seed: int = 0


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
    """A searched and rounded layer. norms and biases: those that a fold changed, bf16, keyed as in the source file."""

    rounded: dict[str, Rounded] = field(default_factory=dict)
    folded_tensors: dict[str, Tensor] = field(default_factory=dict)
    found: list[FoundScale] = field(default_factory=list)
    linears: list[dict] = field(default_factory=list)


def scale_of(family: str, alpha: float, activation: Tensor, weight: Tensor) -> Tensor:
    """activation^alpha / weight^(1 - alpha), or without the weight term; its extremes made reciprocal.

    activation: mean |x|; weight: largest |w| of the column, both per channel (AWQ, arXiv 2306.00978).
    """
    scale = activation.pow(alpha)
    if family == "activation_over_weight":
        scale = scale / weight.pow(1 - alpha)
    scale = scale.clamp(min=1e-5)
    return scale / (scale.max() * scale.min()).sqrt()


def search_fold(
    fold: ResolvedFold, tensors: dict[str, Tensor], known: Evidence, recipe: RecipeConfig, grid: Grid
) -> FoundScale:
    """Score every (family, alpha) of the recipe and, unless the recipe is the published one, identity."""
    score = SCORES[recipe.scoring](fold, tensors, known, grid)
    activation = fold.narrow(mean_activation(fold, known))
    maxima = [tensors[f"{target.name}.weight"].abs().amax(0).clamp(min=1e-5) for target in fold.consumers]
    weight = fold.narrow(torch.stack(maxima).mean(0))
    candidates = [
        (family, step / (recipe.alphas - 1), scale_of(family, step / (recipe.alphas - 1), activation, weight))
        for family in recipe.families
        for step in range(recipe.alphas)
    ]
    if recipe.scoring == "captured":
        candidates.insert(0, (IDENTITY, 0.0, torch.ones_like(activation)))
    best, best_scale, trials = Trial(IDENTITY, 0.0, inf), torch.ones_like(activation), []
    for family, alpha, scale in candidates:
        trial = Trial(family, alpha, score(scale))
        trials.append(trial)
        if trial.loss < best.loss:
            best, best_scale = trial, scale
    if best.loss == inf:
        raise LanceQuantError(
            f"no scale of fold {fold.name} before {fold.consumers[0].name} has a finite error: its captured rows hold "
            "NaN or infinity; delete the capture artifact and look at the calibration samples"
        )
    return FoundScale(fold, best_scale, best, trials)


def quantize_layer(
    tensors: dict[str, Tensor], folds: list[ResolvedFold], known: Evidence, job: LayerJob
) -> LayerResult:
    """Search, fold and round one layer.

    tensors: source key -> float32, on the device; left as they are. Returns everything that is written.
    """
    targets = layer_targets(job.checkpoint.config, job.layer)
    source, tensors = tensors, dict(tensors)
    result = LayerResult()
    for fold in folds:
        if any(target.name in known.mean_abs for target in fold.consumers):
            grid = grid_of(job.recipe, job.bits, job.group_size)
            check_group_size(fold.consumers, job.group_size)  # the published search does not fall back here either
            found = search_fold(fold, tensors, known, job.recipe, grid)
            result.found.append(found)
            if found.best.family != IDENTITY:
                apply(fold, tensors, found.scale)
    scales = {target.name: found for found in result.found for target in found.fold.consumers}
    for target in targets:
        group = job.group_size
        if job.recipe.group_fallback:
            group = fallback_group(target.in_features, job.group_size)
        grid = grid_of(job.recipe, job.bits, group)
        rounded = quantize(tensors[f"{target.name}.weight"], grid)
        result.rounded[target.name] = rounded
        wanted = any(target in fold.consumers for fold in folds)
        result.linears.append(
            describe(target, source[f"{target.name}.weight"], rounded, grid, result.found, known)
            | {"scheme": scheme(scales.get(target.name), wanted)}
        )
    weights = {f"{target.name}.weight" for target in targets}
    result.folded_tensors = {
        key: tensor.to(torch.bfloat16)
        for key, tensor in tensors.items()
        if key not in weights and tensor is not source[key]
    }
    return result


def scheme(found: FoundScale | None, wanted: bool) -> str:
    if found is None:
        return UNSEEN if wanted else PLAIN
    return PLAIN if found.best.family == IDENTITY else FOLDED


def unfold(target: Target, weight: Tensor, found: list[FoundScale]) -> Tensor:
    """A folded weight as it acts in the unfolded layer."""
    for each in found:
        if target in each.fold.consumers:
            weight = weight / each.fold.widen(each.scale)
        if target.name in each.fold.producers:
            weight = weight * each.scale[:, None]
    return weight


def describe(
    target: Target, weight: Tensor, rounded: Rounded, grid: Grid, found: list[FoundScale], known: Evidence
) -> dict:
    """A row of linears.parquet, the scheme aside."""
    after = unfold(target, rounded.dequantize(), found)
    columns = next((each for each in found if target in each.fold.consumers), None)
    before = quantize(weight, grid).dequantize()
    site = known.rows_of(target)
    if site is None:
        norm = weight.norm().clamp(min=1e-30)
        errors = [((value - weight).norm() / norm).item() for value in (before, after)]
    else:
        error = OutputError(weight, site)
        errors = [sqrt(error(value - weight)) for value in (before, after)]
    return {
        "layer": target.layer,
        "path": target.path,
        "name": target.name,
        "site": target.site,
        "group_size": grid.group_size,
        "bits": grid.bits,
        "out_features": target.out_features,
        "in_features": target.in_features,
        "fold": columns and columns.fold.fold.name,
        "family": columns and columns.best.family,
        "alpha": columns and columns.best.alpha,
        "error_kind": "weight" if site is None else "output",
        "error_before": errors[0],
        "error_after": errors[1],
    }


def read_tensors(job: LayerJob, device: str) -> dict[str, Tensor]:
    """Weights, biases and norms of the layer, float32 on the device. Raises LanceQuantError for NaN or infinity."""
    config = job.checkpoint.config
    targets = layer_targets(config, job.layer)
    keys = [f"{target.name}.weight" for target in targets]
    keys += [f"{target.name}.bias" for target in targets if target.bias]
    keys += [f"{norm_name(job.layer, path, norm)}.weight" for path in PATHS for norm in NORMS]
    tensors = {}
    with TensorReader(job.checkpoint.model_file) as reader:
        for key in keys:
            tensor = reader.read(key)
            if job.recipe.source_bf16:
                tensor = tensor.to(torch.bfloat16)
            tensors[key] = tensor.to(device).float()
            if not tensors[key].isfinite().all():
                file = job.checkpoint.model_file
                raise LanceQuantError(f"{file}: '{key}' holds NaN or infinity: fetch the file again")
    return tensors


@torch.inference_mode()
def search_layer(job: LayerJob, out: Path, device: str) -> LayerSummary:
    """Search and round one layer into the empty folder `out`; holds about one layer.

    Raises LanceQuantError where the group size does not divide (recipes without fallback), where bits are out of range,
    where a recipe needs a capture and has none, and where the source holds NaN.
    """
    check_bits(job.bits)
    targets = layer_targets(job.checkpoint.config, job.layer)
    if not job.recipe.group_fallback:
        check_group_size(targets, job.group_size)
    known = Evidence()
    if job.capture is not None:
        sites = read_layer(job.capture, job.layer)
        known = evidence(sites, targets, by_token=job.recipe.scoring == "synthetic", device=device)
    elif job.recipe.needs_capture:
        raise LanceQuantError(f"recipe {job.recipe.name} scores captured activations: give search a capture artifact")
    folds = resolve(job.checkpoint.config, job.layer, job.recipe.folds)
    result = quantize_layer(read_tensors(job, device), folds, known, job)
    return write_layer(job, result, out)


def write_layer(job: LayerJob, result: LayerResult, out: Path) -> LayerSummary:
    tensors = dict(result.folded_tensors)
    tensors |= {f"scale.{found.fold.name}": found.scale for found in result.found}
    for name, rounded in result.rounded.items():
        codes = pack_nibbles(rounded.codes) if job.bits <= PACKED_BITS else rounded.codes
        tensors |= {f"{name}.qweight": codes, f"{name}.scales": rounded.scales, f"{name}.zeros": rounded.zeros}
    words = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
    specs = [TensorSpec(key, words[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()]
    with TensorWriter(out / LAYER_FILE, specs) as writer:
        for spec in writer.specs:
            writer.write(spec.name, tensors[spec.name])
    losses = [
        {
            "layer": job.layer,
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
    pq.write_table(pa.Table.from_pylist(losses, LOSSES), out / LOSSES_FILE)
    pq.write_table(pa.Table.from_pylist(result.linears, LINEARS), out / LINEARS_FILE)
    count = len(result.linears)
    return LayerSummary(
        layer=job.layer,
        linears=count,
        folded=sum(row["scheme"] == FOLDED for row in result.linears),
        error_before=sum(row["error_before"] for row in result.linears) / count,
        error_after=sum(row["error_after"] for row in result.linears) / count,
        bytes=(out / LAYER_FILE).stat().st_size,
    )
