"""Rows of runtime.py: what may run at a time (`fused.Streams`): does it pay, and is the result the same?"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from runtime_check import COMPARED, TOLERANCE, check_inputs
from runtime_rows import Run, T, distance, filled, milliseconds, tokens_per_second

from lance_quant.model.lance import Lance
from lance_quant.model.sampler import CachedFlow, FlowConfig
from lance_quant.runtime.accelerate import STREAMS as DEFAULT
from lance_quant.runtime.fused import Streams, use_streams
from lance_quant.runtime.graphs import RecordedFlow

DENOISING = (Streams(), Streams(early=True), Streams(beside=True))


def row_streams(run: Run) -> dict:
    """Denoising: early starts, or the experts side by side."""
    sample, state = run.drawing()
    t, device = torch.tensor(T), run.models.device
    for form in ("bf16", "int4"):
        flow = CachedFlow(run.form(form), sample, state, FlowConfig())
        for streams in DENOISING:
            with streams_of(run.form(form), streams):
                for guided in (False, True):
                    recorded = RecordedFlow(flow)
                    value = milliseconds(lambda flow=recorded, g=guided: flow.velocities(state, t, g), device)
                    on = [name for name in ("beside", "early") if getattr(streams, name)]
                    what = f"{'guided pair' if guided else 'denoising step'}, {' and '.join(on) or 'one by one'}"
                    run.put(what, form, value, "ms")
    return same(run, Streams(beside=True))


def row_early(run: Run) -> dict:
    """Kernels that start before their predecessors end: decoding, and a denoising step."""
    device, cached = run.models.device, run.cached
    sample, state = run.drawing()
    t = torch.tensor(T)
    for form in ("bf16", "int4"):
        flow = CachedFlow(run.form(form), sample, state, FlowConfig())
        for early in (False, True):
            with streams_of(run.form(form), Streams(early=early)):
                recorded = RecordedFlow(flow)
                value = milliseconds(lambda flow=recorded: flow.velocities(state, t, False), device)
                run.put(f"denoising step, early {'on' if early else 'off'}", form, value, "ms")
    for form in ("bf16", "int4"):
        for batch in (1, 8):
            for early in (False, True):
                with streams_of(run.form(form), Streams(early=early)):
                    decoding = filled(run.form(form), batch, [cached] * batch, True)
                    rate = tokens_per_second(decoding, [cached] * batch, device, 64 if device != "cpu" else 4)
                run.put(f"decode, {batch} answers, early {'on' if early else 'off'}", form, rate, "tokens/s")
    return same(run, Streams(early=True))


def same(run: Run, streams: Streams) -> dict:
    """Held against one thing after another. Raises ArithmeticError where the result is another."""
    found = {}
    for form, plain in (("bf16", "bf16"), ("int4", "reference")):
        lance = run.form(form)
        with streams_of(lance, Streams()):
            usual = check_inputs(run, lance)
        with streams_of(lance, streams):
            ours = check_inputs(run, lance)
        for name in COMPARED:
            found[f"{form} {name}"] = gap = distance(ours[name], usual[name])["relative_l2"]
            allowed = TOLERANCE * run.floor.get(plain, {}).get(name, 0.05)
            if not gap <= allowed:
                raise ArithmeticError(f"{streams}: {form} {name} is {gap:.2g} off, allowed {allowed:.2g}")
    return found


@contextmanager
def streams_of(lance: Lance, streams: Streams) -> Iterator[None]:
    """For what is recorded within, decoding steps made anew; afterwards as it was by default."""
    use_streams(lance.language_model.model, streams)
    lance.fast.decodings.clear()
    try:
        yield
    finally:
        use_streams(lance.language_model.model, DEFAULT)
        lance.fast.decodings.clear()
