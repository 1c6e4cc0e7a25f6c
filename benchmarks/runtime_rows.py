"""Rows of runtime.py. Each takes a `Run`, puts its numbers into `run.table` and returns them."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from runtime_models import Models, decode_bytes, held_bytes, to_device

from lance_quant.model.cache import KVCache
from lance_quant.model.inputs import prepare
from lance_quant.model.lance import Lance
from lance_quant.model.prompts import load_tokenizer
from lance_quant.model.request import Request
from lance_quant.model.resolution import Preset
from lance_quant.model.routing import Routing
from lance_quant.model.sampler import CachedFlow, FlowConfig, initial_state, run_flow, start_flow
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import answer
from lance_quant.runtime.accelerate import accelerate
from lance_quant.runtime.graphs import Decoding, Recorded, RecordedFlow
from lance_quant.runtime.swap import load_packed

BYTES_PER_SECOND = 3.0e12  # of a copy, as measured on an H100
PROMPT = "A photograph of two astronauts who ride bicycles along a beach at sunset, in the style of an old postcard."
FORMS = ("bf16", "int4", "reference")
T = 0.9


@dataclass
class Run:
    """table: (what, form) -> number and unit, in order. plain: what the plain bf16 and reference paths gave."""

    models: Models
    out: Path
    rows: Sequence[str]
    table: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)
    plain: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def real(self) -> bool:
        return self.models.size == "real"

    @property
    def cached(self) -> int:
        return 100 if self.models.size == "tiny" else 1000

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.models.tokenizer_folder)

    def form(self, name: str) -> Lance:
        return getattr(self.models, name)

    def put(self, what: str, form: str, value: float, unit: str) -> None:
        self.table[what, form] = (value, unit)
        print(f"  {what} | {form} | {value:.4g} {unit}", flush=True)

    def sample(self, task: str, edge: int, frames: int = 1, prompt: str = PROMPT) -> Sample:
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (edge, edge, 3), dtype=np.uint8))
        request = Request(task=task, name="it", prompt=prompt, image=picture, height=edge, width=edge, frames=frames)
        edges = Preset(edge, 672 if self.real else 56)
        return prepare(request, self.tokenizer, edges)

    def drawing(self, task: str = "t2i", frames: int = 1) -> tuple[Sample, torch.Tensor]:
        sample = self.sample(task, 768 if self.real else 64, frames)
        state = initial_state(sample, 0, self.models.config.latent_channels, torch.bfloat16, self.models.device)
        return sample, state


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(call: Callable[[], object], device: str, runs: int = 15, warm: int = 3) -> float:
    """Median of single calls, each waited for."""
    times = []
    for _ in range(warm + runs):
        started = now(device)
        call()
        times.append(1000 * (now(device) - started))
    return statistics.median(times[warm:])


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    ours, theirs = ours.float(), theirs.float()
    return {
        "max_relative": float((ours - theirs).abs().max() / theirs.abs().max()),
        "relative_l2": float((ours - theirs).norm() / theirs.norm()),
        "finite": bool(ours.isfinite().all()),
    }


# ---------------------------------------------------------------- the same result as the plain path


def check_inputs(run: Run, lance: Lance) -> dict[str, torch.Tensor]:
    """Decoding logits of some tokens behind a picture-less context, and guided velocities."""
    sample, state = run.drawing()
    text = text_sample(run, 32)
    found = answer(lance, text, 6, keep_logits=True)
    flow = start_flow(lance, sample, state, FlowConfig())
    for _ in range(3):  # plain, recorded, replayed
        conditional, unconditional = flow.velocities(state, torch.tensor(T), True)
    return {
        "tokens": torch.tensor(found.tokens),
        "logits": found.logits,
        "conditional": conditional,
        "unconditional": unconditional,
    }


def check_plain(run: Run) -> dict:
    for form in ("bf16", "reference"):
        run.plain[form] = check_inputs(run, run.form(form))
    return {"int4 against bf16": distance(run.plain["reference"]["conditional"], run.plain["bf16"]["conditional"])}


def row_check(run: Run) -> dict:
    """How far the accelerated forms are from the plain ones. Random weights: near ties in logits are common."""
    found = {}
    for form, plain in (("bf16", "bf16"), ("int4", "reference")):
        ours, theirs = check_inputs(run, run.form(form)), run.plain[plain]
        found[form] = {
            "first logits": distance(ours["logits"][0], theirs["logits"][0]),
            "conditional velocity": distance(ours["conditional"], theirs["conditional"]),
            "unconditional velocity": distance(ours["unconditional"], theirs["unconditional"]),
            "same tokens": f"{int((ours['tokens'] == theirs['tokens']).sum())} of {len(ours['tokens'])}",
        }
        print(f"  {form}: {found[form]}", flush=True)
        run.put("velocity, distance from the plain path", form, found[form]["conditional velocity"]["relative_l2"], "")
        run.put("logits, distance from the plain path", form, found[form]["first logits"]["relative_l2"], "")
    return found


def text_sample(run: Run, tokens: int) -> Sample:
    """A text prompt of so many tokens, as a context to answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(1000, run.models.config.vocab_size), (tokens,), generator=generator)
    none = torch.zeros(0, dtype=torch.int64)
    return Sample(
        task="text", ids=ids, split_lens=(tokens,), split_modes=("causal",), modality=torch.zeros_like(ids), grids=(),
        vit_indexes=none, vae_indexes=none, mse_indexes=none, context_length=tokens,
    )  # fmt: skip


# ---------------------------------------------------------------- decoding


def filled(lance: Lance, batch: int, lengths: Sequence[int], graphs: bool) -> Decoding:
    decoding = Decoding(lance, batch, 512 if max(lengths) < 300 else 2048, graphs)
    decoding.cache.keys.normal_()
    decoding.cache.values.normal_()
    restart(decoding, lengths)
    return decoding


def restart(decoding: Decoding, lengths: Sequence[int]) -> None:
    kept = torch.tensor(lengths, device=decoding.token.device)
    decoding.cache.lengths.copy_(kept)
    decoding.position.copy_(kept[:, None, None].expand_as(decoding.position))
    decoding.upcoming.copy_(kept[:, None, None] + 1)


def tokens_per_second(decoding: Decoding, lengths: Sequence[int], device: str, steps: int) -> float:
    """Of all answers together, the host far ahead of the device."""
    for _ in range(3):
        decoding.run()
    best = 0.0
    for _ in range(3):
        restart(decoding, lengths)
        started = now(device)
        for _ in range(steps):
            decoding.run()
        best = max(best, steps * len(lengths) / (now(device) - started))
    return best


def layer_milliseconds(decoding: Decoding, lance: Lance, device: str) -> float:
    decoder = lance.language_model.model
    hidden = torch.randn(1, 1, lance.config.hidden_size, device=device, dtype=torch.bfloat16)
    return milliseconds(lambda: decoder.step(hidden, decoding.position, decoding.cache), device)


def plain_decode(run: Run, lance: Lance) -> Callable[[], torch.Tensor]:
    """One token behind the cached ones through the plain decoder, always the same place."""
    device, config = run.models.device, run.models.config
    cache = KVCache(config, run.cached + 1, 1, device, torch.bfloat16)
    cache.keys.normal_()
    cache.length = run.cached
    hidden = torch.randn(1, 1, config.hidden_size, device=device, dtype=torch.bfloat16)
    at = torch.full((3, 1), run.cached, device=device)
    model = lance.language_model
    return lambda: model.lm_head(model.model(hidden, at, Routing(), cache=cache, keep=False))


def row_decode(run: Run) -> dict:
    device, cached = run.models.device, run.cached
    steps = 64 if device != "cpu" else 4
    for form in ("bf16", "int4"):
        for graphs in (True, False) if device != "cpu" else (False,):
            decoding = filled(run.form(form), 1, [cached], graphs)
            rate = tokens_per_second(decoding, [cached], device, steps)
            run.put(f"decode, {cached} cached, {'graph' if graphs else 'eager'}", form, rate, "tokens/s")
            bound = BYTES_PER_SECOND / decode_bytes(run.form(form), cached)
            if graphs:
                run.put("decode, bound by bytes at 3.0 TB/s", form, bound, "tokens/s")
                run.put("decode, share of that bound", form, 100 * rate / bound, "%")
        if run.models.size == "layer":
            value = layer_milliseconds(decoding, run.form(form), device)
            run.put(f"one layer, one token, {cached} cached, without the head", form, value, "ms")
    work = plain_decode(run, run.form("reference"))
    for graphs in (True, False) if device != "cpu" else (False,):
        recorded = Recorded(torch.device(device), graphs)
        rate = 1000 / milliseconds(lambda recorded=recorded: recorded(work), device, runs=10 if device != "cpu" else 3)
        run.put(f"decode, {cached} cached, {'graph' if graphs else 'eager'}", "reference", rate, "tokens/s")
    return {}


def row_batch(run: Run) -> dict:
    device, cached = run.models.device, run.cached
    lengths = [cached // 2 + index * cached // 16 for index in range(8)]
    for form in ("bf16", "int4"):
        decoding = filled(run.form(form), 8, lengths, True)
        rate = tokens_per_second(decoding, lengths, device, 64 if device != "cpu" else 4)
        run.put("8 answers together, 500 to 940 cached" if run.real else "8 answers together", form, rate, "tokens/s")
    return {"lengths": lengths}


# ---------------------------------------------------------------- denoising


def row_step(run: Run) -> dict:
    return steps(run, guided=False)


def row_pair(run: Run) -> dict:
    return steps(run, guided=True)


def steps(run: Run, guided: bool) -> dict:
    sample, state = run.drawing()
    t, device = torch.tensor(T), run.models.device
    for form in FORMS:
        flow = CachedFlow(run.form(form), sample, state, FlowConfig())
        rows = (2 if guided else 1) * (len(flow.rows) + 2)
        what = f"{'guided pair' if guided else 'denoising step'}, {rows:,} rows, {flow.caches[0].length} cached"
        for graphs in (True, False) if device != "cpu" else (False,):
            recorded = RecordedFlow(flow, graphs)
            value = milliseconds(lambda flow=recorded: flow.velocities(state, t, guided), device)
            run.put(f"{what}, {'graph' if graphs else 'eager'}", form, value, "ms")
    return {}


def row_long(run: Run) -> dict:
    sample, state = run.drawing("t2v", 50 if run.real else 5)
    t, device = torch.tensor(T), run.models.device
    for form in FORMS:
        flow = CachedFlow(run.form(form), sample, state, FlowConfig(guidance=1.0))
        value = milliseconds(lambda flow=flow: flow.velocities(state, t, False), device, runs=3, warm=1)
        run.put(f"denoising forward, {len(flow.rows):,} latents", form, value, "ms")
    return {}


# ---------------------------------------------------------------- whole tasks


def row_answer(run: Run) -> dict:
    sample, device = run.sample("x2t_image", 768 if run.real else 64), run.models.device
    tokens = 100 if run.real else 8
    for form in FORMS:
        lance = run.form(form)
        value = milliseconds(lambda lance=lance: answer(lance, sample, tokens), device, runs=2, warm=2)
        run.put(f"answer of {tokens} tokens to a picture, context {sample.context_length}", form, value / 1000, "s")
    return {}


def row_t2i(run: Run) -> dict:
    sample, state = run.drawing()
    device, cfg = run.models.device, FlowConfig(steps=30 if run.real else 2)
    found = {}
    try:
        vae = run.models.make_vae()
    except ImportError as error:
        vae, found["vae"] = None, f"left out: {error}"
        print(f"  VAE left out: {error}", flush=True)
    for form in FORMS:
        lance = run.form(form)

        def draw(lance=lance) -> None:
            final = run_flow(start_flow(lance, sample, state, cfg), state, cfg)
            if vae is not None:
                vae.decode_frames(sample.drawn_latents(final))

        value = milliseconds(draw, device, runs=2, warm=1 if form != "reference" else 0)
        run.put(f"t2i, {cfg.steps} steps guided, VAE {'included' if vae else 'left out'}", form, value / 1000, "s")
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            draw()
            more = torch.cuda.max_memory_allocated() - before
            held = held_bytes(lance, *(() if vae is None else (vae,)))
            run.put("t2i, GPU memory: weights with ViT and VAE, and what the run adds", form, (held + more) / 1e9, "GB")
    return found


def row_load(run: Run) -> dict:
    """From a packed folder, just written and thus in the page cache, to the first token of 32 of text."""
    models, text = run.models, text_sample(run, 32)
    for _ in range(2):
        started = now(models.device)
        lance = models.empty(eyes=False)
        load_packed(lance, run.out / "packed", models.device)
        to_device(lance, models.device)
        loaded = now(models.device)
        answer(accelerate(lance, "on"), text, 1)
        done = now(models.device)
        size = held_bytes(lance)
        del lance
    run.put("load, packed folder to weights on the device", "int4", loaded - started, "s")
    run.put("load to the first token of a 32-token prompt", "int4", done - started, "s")
    return {"bytes": size}


def row_memory(run: Run) -> dict:
    for form in ("bf16", "int4"):
        lance = run.form(form)
        eyes = held_bytes(lance.vit_model) if hasattr(lance, "vit_model") else 0
        run.put("weights without the vision tower", form, (held_bytes(lance) - eyes) / 1e9, "GB")
    return {}


# ---------------------------------------------------------------- where the time goes


def row_profile(run: Run) -> dict:
    device = run.models.device
    sample, state = run.drawing()
    t = torch.tensor(T)
    for form in ("bf16", "int4"):
        decoding = filled(run.form(form), 1, [run.cached], device != "cpu")
        flow = RecordedFlow(CachedFlow(run.form(form), sample, state, FlowConfig()), device != "cpu")
        works = {"decode": decoding.run, "denoise": lambda flow=flow: flow.velocities(state, t, False)}
        for name, work in works.items():
            profiled(work, run.out / f"profile_{name}_{form}.txt", device)
    return {"folder": str(run.out)}


def profiled(work: Callable[[], object], path: Path, device: str, runs: int = 5) -> None:
    activity = torch.profiler.ProfilerActivity
    for _ in range(3):
        work()
    now(device)
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * (device != "cpu")) as profile:
        for _ in range(runs):
            work()
        now(device)
    key = "self_cuda_time_total" if device != "cpu" else "self_cpu_time_total"
    averages = profile.key_averages()
    text = averages.table(sort_by=key, row_limit=15, max_name_column_width=90)
    path.write_text(f"{runs} runs\n{text}\n")
    print(f"  {path}\n{text[:3500]}", flush=True)


ROWS = {
    "check": row_check,
    "memory": row_memory,
    "decode": row_decode,
    "step": row_step,
    "pair": row_pair,
    "batch": row_batch,
    "load": row_load,
    "answer": row_answer,
    "t2i": row_t2i,
    "profile": row_profile,
    "long": row_long,
}


def table_of(run: Run, device: str) -> str:
    """All numbers, one line a measurement, and the ratio of int4 to bf16."""
    lines = [f"| {run.models.variant}, group {run.models.group_size}, {device} | {' | '.join(FORMS)} | int4 / bf16 |"]
    lines.append("|---" * (len(FORMS) + 2) + "|")
    for what in dict.fromkeys(what for what, _ in run.table):
        cells = [run.table.get((what, form)) for form in FORMS]
        shown = ["" if cell is None else f"{cell[0]:.4g} {cell[1]}".strip() for cell in cells]
        ratio = f"{cells[1][0] / cells[0][0]:.3f}" if cells[0] and cells[1] and cells[0][0] else ""
        lines.append(f"| {what} | {' | '.join(shown)} | {ratio} |")
    return "\n".join(lines) + "\n"
