"""`python -m lance_quant.tiny stage=measure out=DIR` tells the held-out bars of a written checkpoint, in bf16.

x2t: share of questions whose whole answer is right (teacher-forced: the same as greedy decoding). t2i: share of
pictures that show exactly the caption's things in their colours, judged by the reader; the reader's own share on
true pictures and on their VAE round trip stands beside.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from pathlib import Path

import torch

from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.model.lance import load_lance
from lance_quant.model.prompts import load_tokenizer
from lance_quant.model.sampler import FlowConfig
from lance_quant.tiny import autoencoder, export, world
from lance_quant.tiny.batched import Asker, Drawer
from lance_quant.tiny.layouts import LATENTS, AskLayout, DrawLayout
from lance_quant.tiny.pools import Pool, build_pool
from lance_quant.tiny.reader import read
from lance_quant.tiny.recipes import MeasureRecipe
from lance_quant.tiny.texts import ROWS, PoolPlan

BARS = {"x2t_exact": 0.90, "t2i_correct": 0.80, "reader_true": 0.99, "reader_round_trip": 0.99}


@torch.no_grad()
def held_out_scores(
    asker: Asker, drawer: Drawer, pool: Pool, vae, cfg: FlowConfig, *, autocast: bool = False, seed: int = 42
) -> dict[str, float]:
    """Scores over a pool of held-out scenes: x2t per question row and over all, t2i, and the reader's own."""
    device = pool.small.device
    right, asked = defaultdict(int), defaultdict(int)
    correct = true = trip = drawn = 0
    context = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    for start in range(0, len(pool.small), 256):
        part = slice(start, start + 256)
        with context:
            for place in range(pool.text.shape[1]):
                exact = asker.exact(pool.small[part], pool.text[part, place].long(), pool.spans[part, place])
                for row, hit in zip(pool.rows[part, place].tolist(), exact.tolist(), strict=True):
                    right[ROWS[row]] += hit
                    asked[ROWS[row]] += 1
            captions, lengths = pool.captions[part, 0].long(), pool.lengths[part, 0].long()
            generator = torch.Generator(device).manual_seed(seed + start)
            noise = torch.randn(len(captions), 64, 48, generator=generator, device=device)
            latents = drawer.draw(captions, lengths, noise, cfg)
        batch = world.SceneBatch(*(column[part] for column in pool.batch))
        pictures = world.render(batch)
        made, again = (read(picture_of(vae, x)) for x in (latents, pool.latents[part]))
        here = read(pictures)
        for i, wanted in enumerate(contents(batch)):
            drawn += 1
            true += exactly(here, i) == wanted
            trip += exactly(again, i) == wanted
            correct += things(made, i) == sorted(pair[:2] for pair in wanted)
    scores = {"x2t_exact": sum(right.values()) / sum(asked.values()), "t2i_correct": correct / drawn}
    scores |= {"reader_true": true / drawn, "reader_round_trip": trip / drawn}
    return scores | {f"x2t_exact/{row}": round(right[row] / asked[row], 4) for row in ROWS if asked[row]}


def picture_of(vae, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents [B, 64, 48] -> uint8 pictures [B, 3, 128, 128]."""
    mean, std = autoencoder.constants(latents.device)
    raw = latents.float().transpose(1, 2).unflatten(2, LATENTS) * std + mean
    return torch.cat([autoencoder.to_bytes(autoencoder.decode_frames(vae, chunk)) for chunk in raw.split(64)])


def contents(batch: world.SceneBatch) -> list[list[tuple[int, ...]]]:
    """(kind, colour, size, cell) of every thing of every scene, sorted."""
    spacing = world.CENTRES[1] - world.CENTRES[0]
    cell = ((batch.y - world.CENTRES[0]).float() / spacing).round() * world.GRID
    cell = (cell + ((batch.x - world.CENTRES[0]).float() / spacing).round()).long()
    table = torch.stack((batch.kind, batch.colour, batch.size, cell), -1).tolist()
    return [sorted(tuple(thing) for thing in row if thing[0] >= 0) for row in table]


def exactly(reading, index: int) -> list[tuple[int, ...]]:
    """As `contents`, of a picture that was read; an unreadable thing has kind -2."""
    cells = range(world.GRID**2)
    columns = (reading.kind[index], reading.colour[index], reading.size[index])
    return sorted(
        (*(int(column[cell]) for column in columns), cell) for cell in cells if reading.kind[index, cell] != -1
    )


def things(reading, index: int) -> list[tuple[int, int]]:
    return sorted(thing[:2] for thing in exactly(reading, index))


def run_measure(
    recipe: MeasureRecipe,
    *,
    out: Path,
    minutes: float = 0,
    total_minutes: float = 0,
    device: str,
    compiled: bool = False,
) -> dict[str, float]:
    """Measure the checkpoint in `out`, print and write `measured.json`."""
    checkpoint = open_checkpoint(CheckpointConfig(path=str(out / export.FOLDER), vae=str(out / autoencoder.FILE)))
    lance = load_lance(checkpoint, device, torch.bfloat16)
    tokenizer = load_tokenizer(checkpoint.folder)
    vae = autoencoder.load_vae(out / autoencoder.FILE, device)
    plan = PoolPlan(scenes=recipe.scenes, unseen=True, seed=recipe.seed, captions=1)
    pool = build_pool(tokenizer, vae, plan, device, recipe.workers)
    cfg = FlowConfig(steps=recipe.steps, timestep_shift=recipe.shift, guidance=recipe.guidance)
    asker, drawer = Asker(lance, AskLayout(tokenizer)), Drawer(lance, DrawLayout(tokenizer))
    scores = held_out_scores(asker, drawer, pool, vae, cfg)
    for name, bar in BARS.items():
        print(f"{name:18} {scores[name]:.4f}  bar {bar:.2f}  {'met' if scores[name] >= bar else 'MISSED'}", flush=True)
    (out / "measured.json").write_text(json.dumps({"scenes": recipe.scenes, **scores}, indent=1) + "\n")
    print(json.dumps(scores))
    return scores
