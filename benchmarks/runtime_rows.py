"""Decoding and denoising rows of runtime.py, and what all rows share: each takes a `Run` and fills `run.table`."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from runtime_models import Models, decode_bytes

from lance_quant.model.cache import KVCache
from lance_quant.model.inputs import prepare
from lance_quant.model.lance import Lance
from lance_quant.model.prompts import load_tokenizer
from lance_quant.model.request import Request
from lance_quant.model.resolution import Preset
from lance_quant.model.routing import Routing
from lance_quant.model.sampler import CachedFlow, FlowConfig, initial_state
from lance_quant.model.sequence import Sample
from lance_quant.runtime.graphs import Decoding, Recorded, RecordedFlow

BYTES_PER_SECOND = 3.0e12  # of a copy, as measured on an H100
PROMPT = "A photograph of two astronauts who ride bicycles along a beach at sunset, in the style of an old postcard."
FORMS = ("bf16", "int4", "reference")
T = 0.9


@dataclass
class Run:
    """table: (what, form) -> number and unit, in order. plain: what the plain bf16 and reference paths gave,
    floor: how far they moved with the last bit of their inputs."""

    models: Models
    out: Path
    rows: Sequence[str]
    forms: Sequence[str] = FORMS
    table: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)
    plain: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    floor: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def real(self) -> bool:
        return self.models.size == "real"

    @property
    def fused(self) -> list[str]:
        """The forms asked for but the reference, whose layers are plain: only fused ones decode in a batch."""
        return [form for form in self.forms if form != "reference"]

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

    def sample(self, task: str, size: tuple[int, int], frames: int = 1) -> Sample:
        """size: height and width in pixels."""
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        request = Request(
            task=task, name="it", prompt=PROMPT, image=picture, height=size[0], width=size[1], frames=frames
        )
        return prepare(request, self.tokenizer, Preset(max(size), 672 if self.real else 56))

    def drawing(
        self, task: str = "t2i", frames: int = 1, size: tuple[int, int] = (768, 768)
    ) -> tuple[Sample, torch.Tensor]:
        sample = self.sample(task, size if self.real else (64, 64), frames)
        state = initial_state(sample, 0, self.models.config.latent_channels, torch.bfloat16, self.models.device)
        return sample, state


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(call: Callable[[], object], device: str, runs: int = 15, warm: int = 3) -> float:
    """Median of single calls, each waited for."""
    return by_turns({"alone": call}, device, 1, runs, warm)["alone"]


def by_turns(
    calls: Mapping[str, Callable[[], object]], device: str, rounds: int = 5, runs: int = 5, warm: int = 3
) -> dict[str, float]:
    """Median milliseconds of each call: `runs` of one, then of the next, and again, so that what a GPU's clock and a
    host do meanwhile meets all of them."""
    for call in calls.values():
        for _ in range(warm):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(runs):
                started = now(device)
                call()
                times[name].append(1000 * (now(device) - started))
    return {name: statistics.median(found) for name, found in times.items()}


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    ours, theirs = ours.float(), theirs.float()
    return {
        "max_relative": float((ours - theirs).abs().max() / theirs.abs().max()),
        "relative_l2": float((ours - theirs).norm() / theirs.norm()),
        "finite": bool(ours.isfinite().all()),
    }


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
    for form in run.fused:
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
    if "reference" not in run.forms:
        return {}
    work = plain_decode(run, run.form("reference"))
    for graphs in (True, False) if device != "cpu" else (False,):
        recorded = Recorded(torch.device(device), graphs)
        rate = 1000 / milliseconds(lambda recorded=recorded: recorded(work), device, runs=10 if device != "cpu" else 3)
        run.put(f"decode, {cached} cached, {'graph' if graphs else 'eager'}", "reference", rate, "tokens/s")
    return {}


def row_batch(run: Run) -> dict:
    device, cached = run.models.device, run.cached
    lengths = [cached // 2 + index * cached // 16 for index in range(8)]
    for form in run.fused:
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
    flows = {form: CachedFlow(run.form(form), sample, state, FlowConfig()) for form in run.forms}
    flow = flows[run.forms[0]]
    rows = (2 if guided else 1) * (len(flow.rows) + 2)
    what = f"{'guided pair' if guided else 'denoising step'}, {rows:,} rows, {flow.caches[0].length} cached"
    for graphs in (True, False) if device != "cpu" else (False,):
        recorded = {form: RecordedFlow(flow, graphs) for form, flow in flows.items()}
        calls = {form: lambda flow=recorded[form]: flow.velocities(state, t, guided) for form in run.forms}
        for form, value in by_turns(calls, device).items():
            run.put(f"{what}, {'graph' if graphs else 'eager'}", form, value, "ms")
    return {}


def row_long(run: Run) -> dict:
    sample, state = run.drawing("t2v", 50 if run.real else 5)
    t, device = torch.tensor(T), run.models.device
    for form in run.forms:
        flow = CachedFlow(run.form(form), sample, state, FlowConfig(guidance=1.0))
        value = milliseconds(lambda flow=flow: flow.velocities(state, t, False), device, runs=3, warm=1)
        run.put(f"denoising forward, {len(flow.rows):,} latents", form, value, "ms")
    return {}


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
