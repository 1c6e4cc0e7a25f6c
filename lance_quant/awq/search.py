"""`search_layer`: one layer, both paths: read its weights, search a scale for each fold, fold, round, write.

1. read    the layer's linears, biases and norms, by name, from the source file; what its inputs were, from the capture
2. search  for each fold, every (family, alpha); the first strict minimum of the recipe's score wins, identity included
3. fold    into the tensors at once, so that later folds see what earlier ones did
4. round   every linear to the recipe's grid: to nearest, and then by the recipe's further ingredients (`refine.py`)
5. write   layer.safetensors, losses.parquet, linears.parquet, ingredients.parquet (`artifact.py`)

Any number of workers gives the same bytes: layers know nothing of each other, save in sequential recipes what the
rounded layer before leaves of the kept sequences.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from pathlib import Path

import torch
from torch import Tensor

from lance_quant.awq.artifact import IDENTITY, PREFIX_FILE, FoundScale, LayerResult, LayerSummary, Trial, write_layer
from lance_quant.awq.block import Block, ReadRows, SiteInputs
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.grid import Grid, grid_of, quantize
from lance_quant.awq.lessons import Lesson, lessons, weighed_lessons
from lance_quant.awq.limits import check_bits, check_group_size, fallback_group
from lance_quant.awq.moments import Split, split_rows
from lance_quant.awq.outputs import OutputMoments, gradient_moments
from lance_quant.awq.refine import Refinement, Stage, judged, refine
from lance_quant.awq.rounding import draft
from lance_quant.awq.score import SCORES, TINY, Evidence, evidence, mean_activation
from lance_quant.awq.topology import ResolvedFold, apply, resolve
from lance_quant.calibration.activations import SiteActivations, read_layer
from lance_quant.calibration.sequences import KeptSequence, read_gradients, read_sequences
from lance_quant.checkpoint.layout import (
    NORMS,
    PATHS,
    SUFFIX,
    Checkpoint,
    Target,
    layer_prefix,
    layer_targets,
    norm_name,
)
from lance_quant.checkpoint.native import FOLDED, PLAIN, UNSEEN
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.checkpoint.writer import TensorSpec, TensorWriter
from lance_quant.devices import current
from lance_quant.errors import LanceQuantError
from lance_quant.memory import release_memory
from lance_quant.seeds import seed_of


@dataclass(frozen=True, kw_only=True)
class LayerJob:
    """One unit of search. capture: the capture artifact's folder, None for recipes that need none.

    before: the search artifact of the layer before, for sequential recipes. seed: of the order in which learned
    rounding sees the kept sequences; the other ingredients draw nothing.
    """

    checkpoint: Checkpoint
    layer: int
    capture: Path | None
    recipe: RecipeConfig
    group_size: int
    bits: int = 4
    seed: int = 0
    before: Path | None = None


Sites = dict[tuple[str, str], SiteActivations]  # (path, site) -> what it saw


@dataclass(frozen=True)
class Capture:
    """What lies on disk of a layer's inputs, on the CPU, and of gradients at its outputs (`read_gradients`)."""

    sites: Sites
    sequences: list[KeptSequence] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """What is known of a layer's inputs: evidence that choices are made by, rows that rounding makes up for, and its
    kept sequences with what should come out of them; outputs: linear -> what errors of its outputs count.
    """

    judged: Evidence = field(default_factory=Evidence)
    splits: dict[tuple[str, str], Split] = field(default_factory=dict)
    block: Block | None = None
    taught: list[Lesson] = field(default_factory=list)
    outputs: dict[str, OutputMoments] = field(default_factory=dict)

    @classmethod
    def of(cls, known: Evidence) -> "Inputs":
        """Rows alone, none held out."""
        return cls(known, {key: Split(rows, rows) for key, rows in known.rows.items()})


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
    losses = torch.stack([score(scale) for _, _, scale in candidates]).tolist()
    best, best_scale, trials = Trial(IDENTITY, 0.0, inf), torch.ones_like(activation), []
    for (family, alpha, scale), loss in zip(candidates, losses, strict=True):
        trial = Trial(family, alpha, loss)
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
    tensors: dict[str, Tensor], folds: list[ResolvedFold], known: Evidence | Inputs, job: LayerJob
) -> LayerResult:
    """Search, fold and round one layer.

    tensors: source key -> float32, on the device; left as they are. Returns everything that is written.
    """
    inputs = Inputs.of(known) if isinstance(known, Evidence) else known
    targets = layer_targets(job.checkpoint.config, job.layer)
    source, tensors, result = tensors, dict(tensors), LayerResult()
    for fold in folds:
        if can_judge(fold, inputs.judged, job.recipe):
            grid = grid_of(job.recipe, job.bits, job.group_size)
            check_group_size(fold.consumers, job.group_size)  # the published search does not fall back here either
            found = search_fold(fold, tensors, inputs.judged, job.recipe, grid)
            result.found.append(found)
            if found.best.family != IDENTITY:
                apply(fold, tensors, found.scale)
    drafts = {target.name: draft(tensors[f"{target.name}.weight"], target_grid(target, job)) for target in targets}
    work = refinement(source, tensors, result, inputs, job)
    stages = refine(work, drafts)
    for target in targets:
        result.rounded[target.name] = stages[-1][1][target.name].rounded()
        wanted = any(target in fold.consumers for fold in folds)
        describe(target, stages, work, result, wanted)
    if work.losses:
        place = {"layer": job.layer, "path": "both", "name": "layer", "error_kind": "output"}
        result.ingredients += bought({name: {"error": sqrt(loss)} for name, loss in work.losses.items()}, place)
    weights = {f"{target.name}.weight" for target in targets}
    result.folded_tensors = {
        key: tensor.to(torch.bfloat16)
        for key, tensor in tensors.items()
        if key not in weights and tensor is not source[key]
    }
    return result


def can_judge(fold: ResolvedFold, known: Evidence, recipe: RecipeConfig) -> bool:
    """Whether tokens came, and, where a score needs them, rows, which a path that no sequence takes may lack."""
    seen = [target for target in fold.consumers if target.name in known.mean_abs]
    return any(recipe.scoring != "captured" or known.rows_of(target) for target in seen)


def target_grid(target: Target, job: LayerJob) -> Grid:
    """What a linear is rounded to: at the job's group size or, where that does not divide it, the recipe's fallback."""
    group = job.group_size
    if job.recipe.group_fallback:
        group = fallback_group(target.in_features, job.group_size)
    return grid_of(job.recipe, job.bits, group)


def refinement(
    source: dict[str, Tensor], folded: dict[str, Tensor], result: LayerResult, inputs: Inputs, job: LayerJob
) -> Refinement:
    """What the ingredients after nearest work with."""
    targets = layer_targets(job.checkpoint.config, job.layer)
    columns, rows = {}, {}
    for target in targets:
        weight = source[f"{target.name}.weight"]
        columns[target.name] = torch.ones(target.in_features, device=weight.device)
        rows[target.name] = torch.ones(target.out_features, device=weight.device)
    for found in result.found:
        for target in found.fold.consumers:
            columns[target.name] = columns[target.name] * found.fold.widen(found.scale)
        for producer in set(found.fold.producers) & set(rows):
            rows[producer] = rows[producer] * found.scale
    return Refinement(
        targets=targets,
        recipe=job.recipe,
        seed=seed_of(job.seed, job.layer),
        source=source,
        folded=folded,
        columns=columns,
        rows=rows,
        splits=inputs.splits,
        block=inputs.block,
        taught=inputs.taught,
        outputs=inputs.outputs,
    )


def scheme(found: FoundScale | None, wanted: bool) -> str:
    """What the native layout calls a linear. found: the search of its fold; wanted: whether the recipe has one."""
    if found is None:
        return UNSEEN if wanted else PLAIN
    return PLAIN if found.best.family == IDENTITY else FOLDED


def describe(target: Target, stages: list[Stage], work: Refinement, result: LayerResult, wanted: bool) -> None:
    """A linear's row of linears.parquet and its rows of ingredients.parquet."""
    weight, grid = work.weight(target), stages[0][1][target.name].grid
    split, outputs = work.splits.get((target.path, target.site)), work.outputs.get(target.name)
    measures = {"error": relative_error(weight, split)}
    if split is not None and outputs is not None:
        measures["weighed"] = relative_error(weight, split, outputs)
    change = quantize(weight, grid).dequantize() - weight
    after = {"minmax": {name: measure(change) for name, measure in measures.items()}}
    for ingredient, drafts in stages:
        change = work.unfolded(target, drafts[target.name].weight()) - weight
        after[ingredient] = {name: measure(change) for name, measure in measures.items()}
    first, last = after["minmax"], after[stages[-1][0]]
    kind = "weight" if split is None else "output"
    found = next((each for each in result.found if target in each.fold.consumers), None)
    low, high = work.clips.get(target.name, (None, None))
    place = {"layer": target.layer, "path": target.path, "name": target.name}
    result.linears.append(
        place
        | {
            "site": target.site,
            "scheme": scheme(found, wanted),
            "group_size": grid.group_size,
            "bits": grid.bits,
            "out_features": target.out_features,
            "in_features": target.in_features,
            "fold": found and found.fold.fold.name,
            "family": found and found.best.family,
            "alpha": found and found.best.alpha,
            "clip_low": low,
            "clip_high": high,
            "error_kind": kind,
            "error_before": first["error"],
            "error_after": last["error"],
            "weighed_before": first.get("weighed"),
            "weighed_after": last.get("weighed"),
        }
    )
    result.ingredients += bought(after, place | {"error_kind": kind})


def relative_error(
    weight: Tensor, split: Split | None, outputs: OutputMoments | None = None
) -> Callable[[Tensor], float]:
    """Change of a weight [O, I], unfolded -> relative L2 error of the linear's outputs on held-out rows, as they count
    where `outputs` are given; of the weight itself where there are no rows."""
    if split is None:
        norm = weight.norm().clamp(min=TINY)
        return lambda change: (change.norm() / norm).item()
    squared = judged(weight, split, outputs)
    return lambda change: sqrt(squared(change))


def bought(after: dict[str, dict[str, float]], place: dict) -> list[dict]:
    """Rows of ingredients.parquet from the errors after each ingredient, the first one without any."""
    rows, first, before = [], next(iter(after.values())), None
    for ingredient, errors in after.items():
        row = place | {"ingredient": ingredient} | errors
        for name, share in (("error", "share"), ("weighed", "weighed_share")):
            known = before is not None and name in errors
            row[share] = (before[name] - errors[name]) / max(first[name], TINY) if known else None
        rows.append(row)
        before = errors
    return rows


def read_tensors(job: LayerJob, device: str) -> dict[str, Tensor]:
    """Weights, biases and norms of the layer, float32 on the device. Raises LanceQuantError for NaN or infinity."""
    config = job.checkpoint.config
    targets = layer_targets(config, job.layer)
    keys = [f"{target.name}.weight" for target in targets]
    keys += [f"{target.name}.bias" for target in targets if target.bias]
    keys += [f"{norm_name(job.layer, path, norm)}.weight" for path in PATHS for norm in NORMS]
    if job.recipe.needs_sequences and config.qk_norm:
        prefix = f"{layer_prefix(job.layer)}self_attn."
        keys += [f"{prefix}{leaf}{SUFFIX[path]}.weight" for path in PATHS for leaf in ("q_norm", "k_norm")]
    dtype = torch.bfloat16 if job.recipe.source_bf16 else torch.float32
    with TensorReader(job.checkpoint.model_file) as reader:
        tensors = {key: torch.empty(reader.shape(key), dtype=dtype, device=device) for key in keys}
        reader.read_all(tensors)
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    if not all(finite):
        key = list(tensors)[finite.index(False)]
        raise LanceQuantError(f"{job.checkpoint.model_file}: '{key}' holds NaN or infinity: fetch the file again")
    return tensors


def read_capture(job: LayerJob) -> Capture:
    """What the recipe looks at of the layer's capture. Raises LanceQuantError where wanted sequences are missing."""
    if not job.recipe.needs_sequences:
        return Capture(read_layer(job.capture, job.layer))
    with ThreadPoolExecutor(1) as pool:
        sequences = pool.submit(read_sequences, job.capture, job.layer)
        sites = read_layer(job.capture, job.layer)
    if not sequences.result():
        raise LanceQuantError(
            f"recipe {job.recipe.name} runs kept sequences and the capture has none: set calibration.sequences=2"
        )
    gradients = read_gradients(job.capture, job.layer) if job.recipe.gradients else {}
    if job.recipe.gradients and not gradients:
        raise LanceQuantError(
            f"recipe {job.recipe.name} weighs errors by gradients and the capture has none: set "
            "calibration.gradient_tokens=32000, or recipe.gradients=false"
        )
    return Capture(sites, sequences.result(), gradients)


def inputs_of(job: LayerJob, capture: Capture, tensors: dict[str, Tensor], device: str) -> Inputs:
    """What was captured on the device, and what the layer makes of its kept sequences."""
    recipe, sites = job.recipe, capture.sites
    block, taught, computed, outputs = None, [], {}, {}
    if recipe.needs_sequences:
        block = Block(job.checkpoint.config, job.layer, capture.sequences, device)
        counts = {(task, key[0]): weight for key, site in sites.items() for task, weight in site.weights.items()}
        if capture.gradients:
            moments = gradient_moments(block, tensors, capture.gradients, counts)
            outputs = {name: OutputMoments.of(one, recipe.gradient_damping) for name, one in moments.items()}
            outputs = {name: one for name, one in outputs.items() if one is not None}
        if recipe.sequential and job.layer:
            taught = lessons(block, tensors, counts)
            block.enter(read_prefix(job))
            taught = [replace(lesson, batch=batch) for lesson, batch in zip(taught, block.batches, strict=True)]
            computed = block.site_rows(tensors)
        else:
            traced, computed = block.read(tensors)
            taught = lessons(block, tensors, counts, traced)
        if capture.gradients:
            taught = weighed_lessons(taught, capture.gradients, recipe.gradient_share)
    if recipe.evidence == ["rows"]:
        computed.clear()
        known = gather(job, sites, device)
    else:
        known = gather(job, with_computed(sites, computed, recipe, device), device)
    return replace(known, block=block, taught=taught, outputs=outputs)


def with_computed(sites: Sites, computed: SiteInputs, recipe: RecipeConfig, device: str) -> Sites:
    """The captured sites with the rows that kept sequences bring, which go from `computed`; in place of the captured
    ones where the recipe looks at sequences alone."""
    whole = {}
    for key, site in sites.items():
        read = computed.pop(key, ReadRows(site.rows[:0], [], []))
        rows, tasks, samples = read.rows, read.tasks, read.samples
        if "rows" in recipe.evidence and len(site.rows):
            rows = torch.cat([site.rows.to(device), rows.to(device)])
            tasks, samples = [*site.row_tasks, *tasks], [*site.row_samples, *samples]
        whole[key] = replace(site, rows=rows, row_tasks=tasks, row_samples=samples)
    return whole


def gather(job: LayerJob, sites: Sites, device: str) -> Inputs:
    """The evidence and the rows."""
    targets = layer_targets(job.checkpoint.config, job.layer)
    known = evidence(sites, targets, by_token=job.recipe.scoring == "synthetic", device=device)
    del sites
    splits = {}
    for key in list(known.rows):  # a site's rows are copied where some are held out: not all of them at a time
        splits[key] = split_rows(known.rows.pop(key), job.recipe.heldout)
    judged = Evidence(known.mean_abs, {key: split.judge for key, split in splits.items()})
    return Inputs(judged, splits)


def read_prefix(job: LayerJob) -> dict[int, Tensor]:
    """What the layer before, rounded, left of each kept sequence. Raises LanceQuantError where it is not there."""
    if job.before is None:
        raise LanceQuantError(
            f"recipe {job.recipe.name} is sequential: give search the artifact of layer {job.layer - 1}"
        )
    with TensorReader(job.before / PREFIX_FILE) as reader:
        return {int(name): reader.read(name) for name in reader.names()}


def write_prefix(states: dict[int, Tensor], out: Path) -> None:
    """prefix.safetensors, which `read_prefix` reads; states: sequence number -> bf16 [tokens, hidden]."""
    specs = [TensorSpec(str(number), "BF16", tuple(state.shape)) for number, state in states.items()]
    with TensorWriter(out / PREFIX_FILE, specs) as writer:
        for spec in writer.specs:
            writer.write(spec.name, states[int(spec.name)])


@torch.no_grad()
def search_layer(job: LayerJob, out: Path, device: str) -> LayerSummary:
    """Search and round one layer into the empty folder `out`; holds about one layer.

    Raises LanceQuantError where the group size does not divide (recipes without fallback), where bits are out of range,
    where a recipe needs a capture and has none, and where the source holds NaN.
    """
    check_bits(job.bits)
    targets = layer_targets(job.checkpoint.config, job.layer)
    if not job.recipe.group_fallback:
        check_group_size(targets, job.group_size)
    if job.capture is None and job.recipe.needs_capture:
        raise LanceQuantError(f"recipe {job.recipe.name} scores captured activations: give search a capture artifact")
    with current(device):
        with ThreadPoolExecutor(1) as pool:  # the capture is decoded while the weights go to the device
            capture = None if job.capture is None else pool.submit(read_capture, job)
            tensors = read_tensors(job, device)
        inputs = Inputs() if capture is None else inputs_of(job, capture.result(), tensors, device)
        del capture  # all that is wanted of it is on the device
        release_memory()
        folds = resolve(job.checkpoint.config, job.layer, job.recipe.folds)
        result = quantize_layer(tensors, folds, inputs, job)
        if job.recipe.sequential:
            rounded = {f"{name}.weight": one.dequantize() for name, one in result.rounded.items()}
            folded = {key: value.float() for key, value in result.folded_tensors.items()}
            write_prefix(inputs.block.leave(tensors | folded | rounded), out)
        return write_layer(job.layer, job.bits, result, out)
