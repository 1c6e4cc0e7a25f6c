"""`python -m lance_quant.tiny stage=lance minutes=5 total_minutes=10 out=DIR [start=CHECKPOINTS]` trains vision tower
and decoder together on all seven tasks.

1. Build the model at its size (`export.DECODER`), go on from `DIR/lance_state` where there is one.
2. Fill pools of scenes and clips on the device (words by worker processes, latents by the tiny VAE of `DIR`).
3. Each step adds the gradients of every row of TASKS: answers by cross entropy, drawing by velocity.
4. When the time is over: save the state. `stage=export` writes the averaged weights in both published layouts.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.fill import set_parameter
from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import LanceConfig
from lance_quant.model.lance import Lance, load_lance
from lance_quant.model.request import UNDERSTANDING
from lance_quant.model.sampler import FlowConfig
from lance_quant.tiny import autoencoder, export
from lance_quant.tiny.batched import PLAIN, Kernels, Prompts, Runner, Working, matmul_dtype, working_weights
from lance_quant.tiny.measure import BARS, EDITS, MEASURED, held_out_pools, held_out_scores, medium_of, runners
from lance_quant.tiny.pools import Pool, build_pools
from lance_quant.tiny.recipes import ExportRecipe, LanceRecipe
from lance_quant.tiny.state import Schedule, Step, TrainingRun
from lance_quant.tiny.texts import PoolPlan
from lance_quant.tiny.tokenizer import train_tokenizer

UNSEEN_SEED = 1  # of the held-out scenes that training prints its progress on; `measure` uses others
STATE = "lance_state"


def build_lance(config: LanceConfig, vision: dict, device: str) -> Lance:
    """A Lance with fresh float32 weights, ready to train."""
    lance = Lance(config, vision, torch.float32)
    for name, parameter in list(lance.named_parameters()):
        set_parameter(lance, name, fresh_weight(name, parameter.shape, config))
    lance.to(device).train().requires_grad_(True)
    lance.language_model.model.rope_inv_freq_bf16 = True
    return lance


def fresh_weight(name: str, shape: torch.Size, config: LanceConfig) -> torch.Tensor:
    """Norms one, biases zero, matrices normal by fan-in; what adds to the residual stream is damped by depth."""
    if name.endswith("bias") or name.startswith("llm2vae"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if "embed_tokens" in name:
        return torch.randn(shape) * 0.3
    spread = math.prod(shape[1:]) ** -0.5
    if any(leaf in name for leaf in ("o_proj", "down_proj", "attn.proj")):
        spread /= (2 * config.num_hidden_layers) ** 0.5
    if "lm_head" in name:
        spread *= 0.5
    return torch.randn(shape) * spread


def start_from(lance: Lance, folder: Path) -> None:
    """Copy the weights of a checkpoint in `folder`, of the video layout if there is one."""
    names = [name for name in (export.FOLDERS["video"], export.FOLDERS["image"]) if (folder / name).is_dir()]
    if not names:
        raise LanceQuantError(f"start={folder} holds none of {', '.join(export.FOLDERS.values())}: give their folder")
    other = load_lance(open_checkpoint(CheckpointConfig(path=str(folder / names[0]))), lance.device, torch.float32)
    lance.load_state_dict(other.state_dict(), strict=False)


# ---------------------------------------------------------------- the losses of a step


class Task(NamedTuple):
    """A row of TASKS: samples a step in units of the recipe's batch, and what its loss weighs."""

    share: float
    weight: float = 1.0


TASKS = {
    "x2t_image": Task(0.35),
    "x2t_video": Task(0.5),
    "t2i": Task(1.0),
    "t2v": Task(4.0),
    "i2v": Task(0.75),
    "image_edit": Task(1.0),
    "video_edit": Task(1.0),
}


class Bench(NamedTuple):
    """What the tasks of a step share; pools by medium."""

    pools: dict[str, Pool]
    runners: dict[str, Runner]
    recipe: LanceRecipe


def _choose(bench: Bench, task: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes of the task's pool [B], and which of their texts [B]."""
    words, device = bench.pools[medium_of(task)].words[task], generator.device
    count = max(1, round(bench.recipe.batch * TASKS[task].share))
    able = torch.randint(len(words.able), (count,), generator=generator, device=device)
    return words.able[able], torch.randint(words.ids.shape[1], (count,), generator=generator, device=device)


def draw_answers(bench: Bench, task: str, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return _choose(bench, task, generator)


def loss_answers(bench: Bench, task: str, work: Working, index, which) -> torch.Tensor:
    """Mean cross entropy over answer tokens."""
    pool, runner = bench.pools[medium_of(task)], bench.runners[task]
    words = pool.words[task]
    ids, marks = words.ids[index, which].long(), words.marks[index, which].long()
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    inside = (place >= marks[:, 1:2]) & (place < marks[:, :1])
    labels = torch.where(inside, ids.roll(-1, 1), -100)
    logits = runner.logits(Prompts(ids, marks[:, 0], runner.look(pool.small[index], work)), work)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def draw_flow(bench: Bench, task: str, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Scenes, texts, noise [B, target, 48], a normal number and four even ones each."""
    index, which = _choose(bench, task, generator)
    count, device = len(index), generator.device
    target = bench.runners[task].layout.target
    noise = torch.randn(count, target, 48, generator=generator, device=device)
    normal = torch.randn(count, generator=generator, device=device)
    return index, which, noise, normal, torch.rand(4, count, generator=generator, device=device)


def loss_flow(bench: Bench, task: str, work: Working, index, which, noise, normal, chance) -> torch.Tensor:
    """Mean squared error of the moving latents' velocity at a random t."""
    pool, runner, recipe = bench.pools[medium_of(task)], bench.runners[task], bench.recipe
    words, layout = pool.words[task], runner.layout
    lengths = words.marks[index, which, 0].long()
    # a dropped prompt's tail keeps its positions in the cached flow (quirk Q3) and not in the uncached one: learn both
    dropped = chance[0] < recipe.drop_prompt
    context = torch.where(dropped & (chance[1] < 0.5), 0, lengths)
    lengths = torch.where(dropped, 0, lengths)
    even = torch.where(chance[2] < 0.25, chance[3], normal.sigmoid())
    t = recipe.time_shift * even / (1 + (recipe.time_shift - 1) * even)
    data = (pool.edited if task in EDITS else pool.latents)[index].float()
    moving = layout.moving[-layout.target :, None]
    state = torch.where(moving, data + t[:, None, None] * (noise - data), data)
    if task in EDITS:
        state = torch.cat((pool.latents[index].float(), state), 1)
    prompts = Prompts(words.ids[index, which].long(), lengths, runner.look(pool.small[index], work))
    made = runner.velocity(prompts, state, t, context, work)
    error = ((made.float() - (noise - data)) * moving).square()
    return error.mean() * (layout.target / runner.denoised)


class Losses:
    """The losses of all tasks over one flat list of inputs, as `Step` wants them."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.counts: list[int] = []

    def draw(self, generator: torch.Generator) -> list[torch.Tensor]:
        draws: dict[str, Callable] = {task: draw_answers if task in UNDERSTANDING else draw_flow for task in TASKS}
        parts = [draw(self.bench, task, generator) for task, draw in draws.items()]
        self.counts = [len(part) for part in parts]
        return [value for part in parts for value in part]

    def __call__(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        lance = next(iter(self.bench.runners.values())).lance
        device = lance.device.type
        losses, start = {}, 0
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            work = working_weights(lance, matmul_dtype(lance))
            for (task, row), count in zip(TASKS.items(), self.counts, strict=True):
                loss = loss_answers if task in UNDERSTANDING else loss_flow
                losses[task] = row.weight * loss(self.bench, task, work, *inputs[start : start + count])
                start += count
        return losses


# ---------------------------------------------------------------- the loop


def train_lance(
    recipe: LanceRecipe, *, out: Path, minutes: float, total_minutes: float, device: str, graph: bool = True
) -> Path:
    """Train, or go on training, for at most `minutes` (set-up included); returns the state's folder."""
    cuda = device.startswith("cuda")
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer()
    lance = build_lance(*export.architecture(tokenizer), device)
    if recipe.start:
        start_from(lance, Path(recipe.start))
    schedule = Schedule(steps=recipe.steps, minutes=total_minutes, peak=recipe.peak)
    run = TrainingRun(lance, schedule, folder=out, name=STATE, seed=recipe.seed, decay=0.02)
    run.resume()
    run.start(minutes)

    vae = autoencoder.load_vae(out / autoencoder.FILE, device)
    workers = recipe.workers or os.cpu_count() or 1
    counts = {"pictures": recipe.pictures, "clips": recipe.clips}
    plans = [PoolPlan(medium=medium, scenes=count, seed=recipe.seed) for medium, count in counts.items()]
    pools = dict(zip(counts, build_pools(tokenizer, vae, plans, device, workers), strict=True))
    unseen = held_out_pools(tokenizer, vae, recipe.looks, UNSEEN_SEED, device, 1)
    parameters = sum(p.numel() for p in lance.parameters())
    print(f"lance: {parameters} parameters, pools ready after {run.elapsed - run.seconds:.0f}s", flush=True)

    kernels = Kernels.compiled() if cuda and recipe.compile else PLAIN
    losses = Losses(Bench(pools, runners(lance, tokenizer, kernels), recipe))
    plain = runners(lance, tokenizer)
    step = Step(run, losses, graph=graph)
    said = looked = run.elapsed
    since = run.step
    sums: dict[str, torch.Tensor] = {}
    while not run.over:
        for name, loss in step(*losses.draw(run.begin_step())).items():
            sums[name] = sums.get(name, 0) + loss
        run.end_step()
        if run.step % 20 == 0 and run.elapsed - said > 10:
            steps = run.step - since
            words = " ".join(f"{name} {total.item() / steps:.4f}" for name, total in sums.items())
            print(f"lance step {run.step} {run.elapsed:.0f}s {steps / (run.elapsed - said):.1f}/s {words}", flush=True)
            sums, said, since = {}, run.elapsed, run.step
            if run.elapsed - looked > recipe.look_seconds:
                print(f"  held out: {json.dumps(look(run, plain, unseen, vae, recipe))}", flush=True)
                looked = said = run.elapsed
    run.save()
    scores = look(run, plain, unseen, vae, recipe)
    print(json.dumps({"stage": "lance", "step": run.step, "finished": run.finished, **scores}), flush=True)
    return out / STATE


def look(
    run: TrainingRun, plain: dict[str, Runner], unseen: dict[str, Pool], vae: nn.Module, recipe: LanceRecipe
) -> dict[str, float]:
    """Held-out scores of the averaged weights, the training weights put back afterwards."""
    kept = {name: value.detach().clone() for name, value in run.parameters.items()}
    run.load_average()
    scores = held_out_scores(plain, unseen, vae, FlowConfig(steps=recipe.look_steps), autocast=run.cuda)
    with torch.no_grad():
        for name, value in run.parameters.items():
            value.copy_(kept[name])
    return {name: round(scores[name], 4) for name in BARS}


def run_export(recipe: ExportRecipe, *, out: Path) -> list[Path]:
    """Write the averaged weights of a training state as checkpoints in both layouts, and the VAE and measurement that
    lie with it; returns their folders."""
    source = Path(recipe.state or out)
    path = source / STATE / "average.safetensors"
    if not path.exists():
        raise LanceQuantError(f"there is no training state at {path}: run stage=lance first, or give state=FOLDER")
    folders = export.write_checkpoints(load_file(path), train_tokenizer(), out)
    for name in (autoencoder.FILE, MEASURED):
        if source.resolve() != out.resolve() and (source / name).exists():
            shutil.copyfile(source / name, out / name)
    print(f"written: {', '.join(map(str, folders))}", flush=True)
    return folders
