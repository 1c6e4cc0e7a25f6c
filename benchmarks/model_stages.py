"""Stages of full_size.py that run the model alone: make, load, forward, generate."""

import statistics
from collections.abc import Callable

import torch
from bench import GB, Bench, gigabytes, held_to, host, wait
from make_full_size import MakeConfig, make
from meter import Meter

from lance_quant.checkpoint.fill import fill
from lance_quant.model import sampler
from lance_quant.model.cache import KVCache
from lance_quant.model.inputs import prepare
from lance_quant.model.lance import build_lance, complete, separate_parts
from lance_quant.model.request import Request
from lance_quant.model.routing import Routing
from lance_quant.runtime.generate import GenerationConfig

CARD_GB, CONTEXT_GB = 24.0, 0.8  # of a card, and what CUDA itself takes of it
PROMPT = "A photograph of two astronauts who ride bicycles along a beach at sunset, in the style of an old postcard."
EAGER_MS = {"denoising forward, 2,306 tokens": 30.6, "decode step, 1,000 cached": 10.8}  # earlier figures on one H100


def stage_make(bench: Bench) -> dict:
    settings = bench.settings
    with Meter() as meter:
        made = make(
            MakeConfig(variant=settings.variant, out=settings.folder, scale=settings.scale, device=settings.device)
        )
    bench.tell("random checkpoint written", f"{made['seconds']['all']} s, {made['bytes'] / GB:.3f} GB")
    return made | host(meter)


def stage_load(bench: Bench) -> dict:
    """The two steps of `load_lance`, measured apart."""
    bench.forget()
    checkpoint, device, dtype = bench.checkpoint, bench.device, torch.bfloat16
    found = {}
    lance = build_lance(checkpoint, dtype)
    with Meter() as meter:
        started = wait()
        fill(lance, checkpoint.model_file, device, dtype, elsewhere=separate_parts(checkpoint))
        found["seconds_model_file"] = round(wait() - started, 2)
        if torch.cuda.is_available():
            found["gpu_model_file"] = torch.cuda.max_memory_allocated()
        bench.generator.lance = complete(lance, checkpoint, device, dtype)
        found["seconds"] = round(wait() - started, 2)
    found |= host(meter)
    size = checkpoint.model_file.stat().st_size
    bench.tell("load F32 -> bf16", f"{found['seconds']} s ({size / GB / found['seconds_model_file']:.1f} GB/s)")
    bench.tell("max_memory_allocated, the model's file", gigabytes(found.get("gpu_model_file")))
    bench.tell("max_memory_allocated, with the vision tower", gigabytes(meter.gpu_bytes))
    bench.tell("host memory while loading", gigabytes(meter.host_bytes + meter.pinned_bytes))
    return found


@torch.inference_mode()
def stage_forward(bench: Bench) -> dict:
    """Eager times, medians. A guided step is two forwards; as one batch it has twice the rows."""
    lance, edge = bench.generator.lance, 64 if bench.tiny else 768
    request = Request(task="t2i", name="forward", prompt=PROMPT, height=edge, width=edge)
    sample = prepare(request, bench.generator.tokenizer, bench.checkpoint.edges("t2i"))
    state = sampler.initial_state(sample, 0, bench.checkpoint.config.latent_channels, lance.dtype, bench.device)
    flow = sampler.start_flow(lance, sample, state, sampler.FlowConfig())
    t = torch.tensor(0.9)
    velocities = flow.velocities(state, t, True)
    finite = all(bool(part.isfinite().all()) for part in velocities)
    times = {"denoising forward, 2,306 tokens": milliseconds(lambda: flow.velocities(state, t, False))}
    times["guided step, one batch of two"] = milliseconds(lambda: flow.velocities(state, t, True))
    together, sampler.TOGETHER_ROWS = sampler.TOGETHER_ROWS, 0
    times["guided step, two calls"] = milliseconds(lambda: flow.velocities(state, t, True))
    sampler.TOGETHER_ROWS = together

    decoder, cached = lance.language_model.model, 1000
    cache = KVCache(bench.checkpoint.config, cached + 1, 1, bench.device, lance.dtype)
    cache.length = cached
    hidden = torch.randn(1, 1, bench.checkpoint.config.hidden_size, device=bench.device, dtype=lance.dtype)
    at = torch.full((3, 1), cached, device=bench.device)

    def decode() -> None:
        lance.language_model.lm_head(decoder(hidden, at, Routing(), cache=cache, keep=False))

    times["decode step, 1,000 cached"] = milliseconds(decode)
    for name, value in times.items():
        earlier = f" (earlier figure {EAGER_MS[name]} ms)" if name in EAGER_MS else ""
        bench.tell(name, f"{value:.1f} ms{earlier}")
    return {"ms": times, "tokens": len(flow.rows) + 2, "finite": finite}


def milliseconds(call: Callable[[], object], runs: int = 15) -> float:
    times = []
    for _ in range(runs + 3):
        started = wait()
        call()
        times.append(1000 * (wait() - started))
    return round(statistics.median(times[3:]), 2)


def stage_generate(bench: Bench) -> dict:
    """One request of the variant's own kind at full size, and the decoding of a long clip beside the model."""
    generator, found = bench.generator, {}
    generator.lance  # noqa: B018 - loaded outside the measurement
    drawn = {"image": dict(task="t2i", height=768, width=768), "video": dict(task="t2v", height=480, width=848)}
    wanted = drawn[bench.settings.variant] | ({"height": 64, "width": 64} if bench.tiny else {})
    frames = 1 if wanted["task"] == "t2i" else 9 if bench.tiny else 50
    cfg = GenerationConfig(flow=sampler.FlowConfig(steps=2 if bench.tiny else 30))
    with Meter() as meter:
        result = generator.run(Request(name="full size", prompt=PROMPT, frames=frames, **wanted), cfg)
    name = f"{wanted['task']} {wanted['width']} x {wanted['height']}, {len(result.frames)} frames"
    seconds = {part: round(value, 2) for part, value in result.seconds.items()}
    found |= host(meter) | {"request": name, "seconds": seconds, "rate": result.rate}
    found["contrast"] = float(result.frames.std())  # 0 where a NaN was drawn
    bench.tell(f"{name}, {cfg.flow.steps} steps", f"{result.rate['seconds_per_step']:.3f} s a step")
    bench.tell("its VAE decode", f"{seconds['decode']} s")
    bench.tell("its GPU memory", f"{gigabytes(meter.gpu_bytes)}, reserved {gigabytes(meter.gpu_reserved_bytes)}")

    grid = (2, 4, 5) if bench.tiny else (31, 30, 53)
    latents = torch.randn(*grid, bench.checkpoint.config.latent_channels, device=bench.device)
    generator.vae  # noqa: B018 - loaded outside the measurement
    with held_to(CARD_GB - CONTEXT_GB), Meter() as meter:
        started = wait()
        clip = generator.vae.decode_frames(latents)
        seconds = round(wait() - started, 2)
    found["clip"] = {"frames": len(clip), "seconds": seconds} | host(meter)
    bench.tell(
        f"decode of {len(clip)} frames of {clip.shape[2]} x {clip.shape[1]} beside the model",
        f"{seconds} s, {gigabytes(meter.gpu_bytes)}, reserved {gigabytes(meter.gpu_reserved_bytes)} of {CARD_GB:g} GB",
    )
    return found
