"""Rows of runtime.py that are whole tasks: answers, pictures, clips, loading; memory, and where the time goes."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from runtime_check import text_sample
from runtime_models import held_bytes, to_device
from runtime_rows import Run, T, by_turns, filled, milliseconds, now

from lance_quant.model.sampler import CachedFlow, FlowConfig, run_flow, start_flow
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import answer
from lance_quant.runtime.accelerate import accelerate
from lance_quant.runtime.dequantized import PIECE_ELEMENTS
from lance_quant.runtime.graphs import RecordedFlow
from lance_quant.runtime.kernels import splits
from lance_quant.runtime.swap import load_packed


def row_answer(run: Run) -> dict:
    sample, device = run.sample("x2t_image", (768, 768) if run.real else (64, 64)), run.models.device
    tokens = 100 if run.real else 8
    what = f"answer of {tokens} tokens to a picture, context {sample.context_length}"
    for form in run.forms:
        lance = run.form(form)
        value = milliseconds(lambda lance=lance: answer(lance, sample, tokens), device, runs=4, warm=2)
        run.put(what, form, value / 1000, "s")
        looks = milliseconds(lambda lance=lance: lance.look(sample.vit_patches, sample.vit_grids), device, runs=4)
        run.put(f"{what}: the picture alone, ViT", form, looks / 1000, "s")
        first = milliseconds(lambda lance=lance: answer(lance, sample, 1), device, runs=4)
        run.put(f"{what}: up to the first token", form, first / 1000, "s")
    return {}


def row_t2i(run: Run) -> dict:
    return drawn(run, "t2i", *run.drawing(), FlowConfig(steps=30 if run.real else 2), run.forms)


def row_parts(run: Run) -> dict:
    """Where the time of a drawing goes: its contexts and its first steps, each waited for; and what the host spends."""
    sample, state = run.drawing()
    t, device = torch.tensor(T), run.models.device
    for form in run.forms:
        lance, best = run.form(form), {}
        for _ in range(3):
            if lance.fast is not None:
                lance.fast.drawn.clear()  # as if this size had not been drawn before
            flow = timed("contexts", lambda lance=lance: start_flow(lance, sample, state, FlowConfig()), best, device)
            for number in ("first", "second", "third"):
                for guided in (True, False):
                    name = f"{number} {'guided' if guided else 'plain'} step"
                    timed(name, lambda guided=guided, flow=flow: flow.velocities(state, t, guided), best, device)
        for what, (host, whole) in best.items():
            run.put(f"t2i: {what}", form, 1000 * whole, "ms")
            run.put(f"t2i: {what}, the host's part", form, 1000 * host, "ms")
    return {}


def timed(name: str, work: Callable[[], object], best: dict[str, tuple[float, float]], device: str) -> object:
    """Runs it; the least seconds until it returns, and until it is done, go to `best`."""
    started = now(device)
    out = work()
    host = time.perf_counter() - started
    whole = now(device) - started
    best[name] = tuple(min(pair) for pair in zip(best.get(name, (host, whole)), (host, whole), strict=True))
    return out


def row_t2v(run: Run) -> dict:
    """Two steps: memory is the same in every step. The video model differs in its ViT being in its file."""
    sample, state = run.drawing("t2v", 50 if run.real else 5, (480, 848))
    return drawn(run, "t2v 480x848x50", sample, state, FlowConfig(steps=2), ("int4",))


def drawn(run: Run, what: str, sample: Sample, state: torch.Tensor, cfg: FlowConfig, forms) -> dict:
    """Time and peak of a drawing, VAE included; the peak as if nothing but this form's model were there."""
    device, found = run.models.device, {}
    try:
        vae = run.models.make_vae()
    except ImportError as error:
        vae, found["vae"] = None, f"left out: {error}"
        print(f"  VAE left out: {error}", flush=True)

    def steps(form: str) -> torch.Tensor:
        return run_flow(start_flow(run.form(form), sample, state, cfg), state, cfg)

    def decode(final: torch.Tensor) -> None:
        if vae is not None:
            vae.decode_frames(sample.drawn_latents(final))

    calls = {form: lambda form=form: decode(steps(form)) for form in forms}
    for form, value in by_turns(calls, device, rounds=5 if len(state) < 10_000 else 1, runs=1, warm=1).items():
        run.put(f"{what}, {cfg.steps} steps guided, VAE {'included' if vae else 'left out'}", form, value / 1000, "s")
    if device != "cpu":
        for form in forms:
            held = held_bytes(run.form(form), *(() if vae is None else (vae,))) + shared_bytes()
            final = None
            for part in ("steps", "VAE decode"):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                final = steps(form) if part == "steps" else decode(final)
                more = torch.cuda.max_memory_allocated() - before
                run.put(f"{what}, peak with ViT and VAE, {part}", form, (held + more) / 1e9, "GB")
    return found


def shared_bytes() -> int:
    """The buffers that the int4 kernels of a GPU share."""
    return 2 * PIECE_ELEMENTS + 4 * (splits.FLOATS + splits.TICKETS)


def row_first_token(run: Run) -> dict:
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
    run.put("first token of a 32-token prompt, from the call of load()", "int4", done - started, "s")
    return {"bytes": size}


def row_memory(run: Run) -> dict:
    for form in ("bf16", "int4"):
        lance = run.form(form)
        eyes = held_bytes(lance.vit_model) if hasattr(lance, "vit_model") else 0
        run.put("weights without the vision tower", form, (held_bytes(lance) - eyes) / 1e9, "GB")
    return {}


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
