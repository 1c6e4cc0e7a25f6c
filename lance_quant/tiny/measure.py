"""`python -m lance_quant.tiny stage=measure out=DIR` tells the held-out bars of the checkpoints in DIR, in bf16.

Understanding: share of questions whose whole answer is right (teacher-forced: the same as greedy decoding). Drawing:
share of pictures and clips that show what was asked for (`judge.RULES`), as the reader sees them; the reader's own
share on true frames and on their VAE round trip stands beside, and of t2v what went wrong first (`judge.clip_fault`).
`tasks=t2v guidance=2 seed=101 scenes=64` tries settings on other scenes, and writes nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.layout import open_checkpoint
from lance_quant.model.lance import Lance, load_lance
from lance_quant.model.prompts import load_tokenizer
from lance_quant.model.request import CLIP_TASKS, GENERATION, TASKS, UNDERSTANDING
from lance_quant.model.sampler import FlowConfig
from lance_quant.tiny import autoencoder, export
from lance_quant.tiny.batched import PLAIN, Kernels, Prompts, Runner, Working, matmul_dtype, working_weights
from lance_quant.tiny.judge import RULES, clip_fault, seen, wanted
from lance_quant.tiny.layouts import SIDE, layout_of
from lance_quant.tiny.pools import Pool, build_pools
from lance_quant.tiny.reader import read
from lance_quant.tiny.recipes import MeasureRecipe
from lance_quant.tiny.texts import MEDIA, ROWS, PoolPlan

BARS = {
    **dict.fromkeys(UNDERSTANDING, 0.90),
    "t2i": 0.80,
    **dict.fromkeys(("t2v", "i2v", "image_edit", "video_edit"), 0.70),
    **{f"reader_{what}/{medium}": 0.99 for what in ("true", "round_trip") for medium in MEDIA},
}
MEASURED = "measured.json"
CHUNK = 256
EDITS = ("image_edit", "video_edit")


def runners(lance: Lance, tokenizer: Tokenizer, kernels: Kernels = PLAIN) -> dict[str, Runner]:
    source = tokenizer.to_str()
    return {task: Runner(lance, layout_of(task, source), kernels) for task in TASKS}


def medium_of(task: str) -> str:
    return "clips" if task in CLIP_TASKS else "pictures"


@torch.no_grad()
def held_out_scores(
    tasks: dict[str, Runner], pools: dict[str, Pool], vae, cfg: FlowConfig, *, autocast: bool = False, seed: int = 42
) -> dict[str, float]:
    """Share of right ones over pools of held-out scenes: by task, by `task/row` of what was asked, and the reader's;
    `t2v/wrong: fault` is the share of all clips that are wrong so."""
    lance = next(iter(tasks.values())).lance
    work = working_weights(lance, matmul_dtype(lance))
    context = torch.autocast(lance.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    scores, rows = {}, {}
    for task, runner in tasks.items():
        hits, faults = defaultdict(list), Counter()
        pool = pools[medium_of(task)]
        for start, part in enumerate(pool.words[task].able.split(CHUNK)):
            with context:
                score = _answer if task in UNDERSTANDING else _draw
                for row, right, fault in score(runner, pool, part, vae, cfg, work, seed + start):
                    hits[ROWS[row]].append(right)
                    faults[fault] += 1
        scores[task] = sum(map(sum, hits.values())) / sum(map(len, hits.values()))
        rows |= {f"{task}/{row}": sum(hits[row]) / len(hits[row]) for row in ROWS if hits[row]}
        rows |= {f"{task}/wrong: {fault}": count / faults.total() for fault, count in sorted(faults.items()) if fault}
    for medium, pool in pools.items():
        scores |= {f"reader_{what}/{medium}": share for what, share in _reader(pool, vae).items()}
    return scores | {name: round(share, 4) for name, share in rows.items()}


def _prompts(runner: Runner, pool: Pool, part: torch.Tensor, place: int, work: Working):
    """Prompts of those scenes, and marks [B, 3]."""
    words = pool.words[runner.layout.task]
    marks = words.marks[part, place].long()
    looked = runner.look(pool.small[part], work)
    return Prompts(words.ids[part, place].long(), marks[:, 0], looked), marks


def _answer(runner: Runner, pool: Pool, part, vae, cfg, work, seed) -> list[tuple[int, bool, str]]:
    out = []
    for place in range(pool.words[runner.layout.task].ids.shape[1]):
        prompts, marks = _prompts(runner, pool, part, place, work)
        exact = runner.exact(prompts, marks[:, 1], work)
        out += [(row, right, "") for row, right in zip(marks[:, 2].tolist(), exact.tolist(), strict=True)]
    return out


def _draw(runner: Runner, pool: Pool, part, vae, cfg, work, seed) -> list[tuple[int, bool, str]]:
    task, device = runner.layout.task, part.device
    prompts, marks = _prompts(runner, pool, part, 0, work)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(len(part), runner.layout.latents, 48, generator=generator, device=device)
    state = runner.start(noise, given_latents(pool, part, task))
    drawn = runner.draw(prompts, state, cfg, work)
    true = wanted(pool.edited_scenes if task in EDITS else pool.scenes, part)
    made = _read_latents(vae, drawn)
    shown = [seen(*made, index) for index in range(len(part))]
    right = [RULES[task](one, asked) for one, asked in zip(shown, true, strict=True)]
    faults = [clip_fault(one, asked) if task == "t2v" else "" for one, asked in zip(shown, true, strict=True)]
    return list(zip(marks[:, 2].tolist(), right, faults, strict=True))


def given_latents(pool: Pool, part: torch.Tensor, task: str) -> torch.Tensor | None:
    """Latents [B, latents, 48] that are clean where the task has any: an edit's source, i2v's first frame."""
    data = pool.latents[part].float()
    if task in EDITS:
        return torch.cat((data, torch.zeros_like(data)), 1)
    return data if task == "i2v" else None


def _read_latents(vae, latents: torch.Tensor):
    """Readings of the first and the last frame."""
    frames = frames_of_latents(vae, latents)
    first = read(frames[:, 0])
    return first, first if frames.shape[1] == 1 else read(frames[:, -1])


def frames_of_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents [B, t * 64, 48] -> uint8 frames [B, 1 + 4 (t - 1), 3, 128, 128]."""
    mean, std = (part.unsqueeze(2) for part in autoencoder.constants(latents.device))
    raw = latents.float().transpose(1, 2).unflatten(2, (-1, SIDE, SIDE)) * std + mean
    with torch.autocast(latents.device.type, enabled=False):
        if raw.shape[2] == 1:
            parts = [autoencoder.decode_frames(vae, chunk[:, :, 0])[:, :, None] for chunk in raw.split(64)]
        else:
            parts = [autoencoder.decode_clips(vae, chunk) for chunk in raw.split(64)]
    return autoencoder.to_bytes(torch.cat(parts)).transpose(1, 2)


def _reader(pool: Pool, vae) -> dict[str, float]:
    """How often true frames, and their VAE round trip, are read right in every respect."""
    hits = {"true": 0, "round_trip": 0}
    indices = torch.arange(len(pool.small), device=pool.small.device)
    for part in indices.split(CHUNK):
        true = wanted(pool.scenes, part)
        frames = pool.scenes.frames(part)
        for what, (first, last) in (
            ("true", (read(frames[:, 0]), read(frames[:, -1]))),
            ("round_trip", _read_latents(vae, pool.latents[part])),
        ):
            hits[what] += sum(seen(first, last, index) == true[index] for index in range(len(part)))
    return {what: count / len(pool.small) for what, count in hits.items()}


def held_out_pools(
    tokenizer: Tokenizer, vae, scenes: int, seed: int, device: str, workers: int, media: Iterable[str] = MEDIA
) -> dict[str, Pool]:
    plans = [PoolPlan(medium=medium, scenes=scenes, unseen=True, seed=seed) for medium in media]
    return dict(zip(media, build_pools(tokenizer, vae, plans, device, workers), strict=True))


def run_measure(recipe: MeasureRecipe, *, out: Path, device: str) -> dict[str, float]:
    """Measure the checkpoint of the video layout in `out` and print; of all tasks, write `measured.json` too."""
    path, vae_file = out / export.FOLDERS["video"], out / autoencoder.FILE
    checkpoint = open_checkpoint(CheckpointConfig(path=str(path), vae=str(vae_file)))
    lance = load_lance(checkpoint, device, torch.bfloat16)
    tokenizer = load_tokenizer(checkpoint.folder)
    vae = autoencoder.load_vae(vae_file, device)
    cfg = FlowConfig(steps=recipe.steps, timestep_shift=recipe.shift, guidance=recipe.guidance)
    asked = {task: runner for task, runner in runners(lance, tokenizer).items() if task in recipe.named}
    media = dict.fromkeys(map(medium_of, asked))
    pools = held_out_pools(tokenizer, vae, recipe.scenes, recipe.seed, device, recipe.workers, media)
    scores = held_out_scores(asked, pools, vae, cfg)
    for name, bar in BARS.items():
        if name in scores:
            met = "met" if scores[name] >= bar else "MISSED"
            print(f"{name:26} {scores[name]:.4f}  bar {bar:.2f}  {met}", flush=True)
    if not recipe.tasks:
        (out / MEASURED).write_text(json.dumps({"scenes": recipe.scenes, **scores}, indent=1) + "\n")
    print(json.dumps(scores))
    return scores


assert set(RULES) == set(GENERATION)
