"""`python -m lance_quant.tiny stage=lance minutes=9 total_minutes=18 out=DIR` trains vision tower and decoder
together.

1. Build the model at its size (`export.DECODER`), go on from `DIR/lance_state.*` where there is one.
2. Fill a pool of scenes on the device (words by worker processes, latents by the tiny VAE of `DIR`).
3. Each step adds the gradients of every row of TASKS: answers by cross entropy, drawing by velocity.
4. When the time is over: save the state, and the averaged weights as a checkpoint in the published layout.

A later task (edit, video) is a row of TASKS with its loss, and its words in the pool.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lance_quant.checkpoint.fill import set_parameter
from lance_quant.model.config import LanceConfig
from lance_quant.model.lance import Lance
from lance_quant.model.sampler import FlowConfig
from lance_quant.tiny import autoencoder, export
from lance_quant.tiny.batched import PLAIN, Asker, Drawer, Kernels
from lance_quant.tiny.layouts import AskLayout, DrawLayout
from lance_quant.tiny.measure import held_out_scores
from lance_quant.tiny.pools import Pool, build_pool
from lance_quant.tiny.recipes import LanceRecipe
from lance_quant.tiny.state import Schedule, Step, TrainingRun
from lance_quant.tiny.texts import PoolPlan
from lance_quant.tiny.tokenizer import train_tokenizer

UNSEEN_SEED = 1  # of the held-out scenes that training prints its progress on; `measure` uses others


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


# ---------------------------------------------------------------- the losses of a step


class Bench(NamedTuple):
    """What the tasks of a step share."""

    lance: Lance
    pool: Pool
    asker: Asker
    drawer: Drawer
    recipe: LanceRecipe
    kernels: Kernels


class Task(NamedTuple):
    """A row of TASKS: the recipe field that weighs it, the random tensors of a step (eager), and its loss of them."""

    weight: str
    draw: Callable[[Bench, torch.Generator], tuple[torch.Tensor, ...]]
    loss: Callable[..., torch.Tensor]


def _choose(words: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` scenes of the pool, and which of their texts [N, texts, ...]."""
    device = generator.device
    return tuple(torch.randint(size, (count,), generator=generator, device=device) for size in words.shape[:2])


def draw_x2t(bench: Bench, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return _choose(bench.pool.text, bench.recipe.batch, generator)


def loss_x2t(bench: Bench, index: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over answer tokens."""
    pool = bench.pool
    text, spans = pool.text[index, which].long(), pool.spans[index, which]
    place = torch.arange(1, text.shape[1] + 1, device=text.device)
    inside = (place >= spans[:, :1]) & (place < spans[:, 1:])
    labels = torch.where(inside, text.roll(-1, 1), -100)
    logits = bench.asker.logits(pool.small[index], text, bench.kernels)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def draw_t2i(bench: Bench, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Scenes, captions, noise [B, 64, 48], a normal number and four even ones each."""
    pool, count, device = bench.pool, bench.recipe.draw_batch, generator.device
    noise = torch.randn(count, *pool.latents.shape[1:], generator=generator, device=device)
    normal = torch.randn(count, generator=generator, device=device)
    return (
        *_choose(pool.captions, count, generator),
        noise,
        normal,
        torch.rand(4, count, generator=generator, device=device),
    )


def loss_t2i(bench: Bench, index, which, noise, normal, chance) -> torch.Tensor:
    """Mean squared error of the velocity at a random t."""
    pool, recipe, drawer = bench.pool, bench.recipe, bench.drawer
    captions, lengths = pool.captions[index, which].long(), pool.lengths[index, which].long()
    data = pool.latents[index].float()
    # a dropped caption's tail keeps its positions in the cached flow (quirk Q3) and not in the uncached one: learn both
    dropped = chance[0] < recipe.drop_caption
    tails = torch.where(dropped & (chance[1] < 0.5), 0, lengths)
    lengths = torch.where(dropped, 0, lengths)
    even = torch.where(chance[2] < 0.25, chance[3], normal.sigmoid())
    t = (recipe.time_shift * even / (1 + (recipe.time_shift - 1) * even))[:, None]
    noised = data + t[:, :, None] * (noise - data)
    made = drawer.velocity(captions, noised, t, drawer.branch(lengths, tails), bench.kernels)
    return (made.float() - (noise - data)).square().mean()


TASKS = {
    "x2t_image": Task("ask_weight", draw_x2t, loss_x2t),
    "t2i": Task("draw_weight", draw_t2i, loss_t2i),
}


class Losses:
    """The losses of all active tasks over one flat list of inputs, as `Step` wants them."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.tasks = {name: task for name, task in TASKS.items() if getattr(bench.recipe, task.weight) > 0}
        self.counts: list[int] = []

    def draw(self, generator: torch.Generator) -> list[torch.Tensor]:
        parts = [task.draw(self.bench, generator) for task in self.tasks.values()]
        self.counts = [len(part) for part in parts]
        return [value for part in parts for value in part]

    def __call__(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        device = inputs[0].device.type
        losses, start = {}, 0
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            for (name, task), count in zip(self.tasks.items(), self.counts, strict=True):
                weight = getattr(self.bench.recipe, task.weight)
                losses[name] = weight * task.loss(self.bench, *inputs[start : start + count])
                start += count
        return losses


# ---------------------------------------------------------------- the loop


def train_lance(
    recipe: LanceRecipe, *, out: Path, minutes: float, total_minutes: float, device: str, graph: bool = True
) -> Path:
    """Train, or go on training, for at most `minutes` (set-up included); returns the checkpoint's folder."""
    cuda = device.startswith("cuda")
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer()
    config, vision = export.architecture(tokenizer)
    lance = build_lance(config, vision, device)
    schedule = Schedule(steps=recipe.steps, minutes=total_minutes, peak=recipe.peak)
    run = TrainingRun(lance, schedule, folder=out, name="lance_state", seed=recipe.seed, decay=0.02)
    run.resume()
    run.start(minutes)

    vae = autoencoder.load_vae(out / autoencoder.FILE, device)
    workers = recipe.workers or os.cpu_count() or 1
    pool = build_pool(tokenizer, vae, PoolPlan(scenes=recipe.scenes, seed=recipe.seed), device, workers)
    unseen = build_pool(
        tokenizer, vae, PoolPlan(scenes=recipe.looks, unseen=True, seed=UNSEEN_SEED, captions=1), device, workers
    )
    parameters = sum(p.numel() for p in lance.parameters())
    print(f"lance: {parameters} parameters, pool ready after {run.elapsed - run.seconds:.0f}s", flush=True)

    asker, drawer = Asker(lance, AskLayout(tokenizer)), Drawer(lance, DrawLayout(tokenizer))
    kernels = Kernels.compiled() if cuda and recipe.compile else PLAIN
    bench = Bench(lance, pool, asker, drawer, recipe, kernels)
    losses = Losses(bench)
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
                print(f"  held out: {json.dumps(look(run, bench, unseen, vae, cuda))}", flush=True)
                looked = said = run.elapsed
    run.save()
    run.load_average()
    folder = export.write_checkpoint(lance, tokenizer, vision, out)
    scores = held_out_scores(asker, drawer, unseen, vae, FlowConfig(), autocast=cuda)
    print(json.dumps({"stage": "lance", "step": run.step, "finished": run.finished, **scores}), flush=True)
    return folder


def look(run: TrainingRun, bench: Bench, unseen: Pool, vae: nn.Module, cuda: bool) -> dict[str, float]:
    """Held-out scores of the averaged weights, the training weights put back afterwards."""
    kept = {name: value.detach().clone() for name, value in run.parameters.items()}
    run.load_average()
    scores = held_out_scores(bench.asker, bench.drawer, unseen, vae, FlowConfig(), autocast=cuda)
    with torch.no_grad():
        for name, value in run.parameters.items():
            value.copy_(kept[name])
    return {name: value for name, value in scores.items() if not name.startswith("x2t_exact/")}
