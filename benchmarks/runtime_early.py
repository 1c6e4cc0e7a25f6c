"""A row of runtime.py: kernels that start before their predecessors end: does it pay, and is the result the same?"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from runtime_check import COMPARED, TOLERANCE, check_inputs
from runtime_rows import Run, T, distance, filled, milliseconds, tokens_per_second

from lance_quant.model.lance import Lance
from lance_quant.model.sampler import CachedFlow, FlowConfig
from lance_quant.runtime.fused import use_early
from lance_quant.runtime.graphs import RecordedFlow


def row_early(run: Run) -> dict:
    """A denoising step, and decoding."""
    device, cached = run.models.device, run.cached
    sample, state = run.drawing()
    t = torch.tensor(T)
    for form in ("bf16", "int4"):
        flow = CachedFlow(run.form(form), sample, state, FlowConfig())
        for early in (False, True):
            with early_of(run.form(form), early):
                recorded = RecordedFlow(flow)
                value = milliseconds(lambda flow=recorded: flow.velocities(state, t, False), device)
                run.put(f"denoising step, early {'on' if early else 'off'}", form, value, "ms")
    for form in ("bf16", "int4"):
        for batch in (1, 8):
            for early in (False, True):
                with early_of(run.form(form), early):
                    decoding = filled(run.form(form), batch, [cached] * batch, True)
                    rate = tokens_per_second(decoding, [cached] * batch, device, 64 if device != "cpu" else 4)
                run.put(f"decode, {batch} answers, early {'on' if early else 'off'}", form, rate, "tokens/s")
    return same(run)


def same(run: Run) -> dict:
    """Held against one after another. Raises ArithmeticError where the result is another."""
    found = {}
    for form, plain in (("bf16", "bf16"), ("int4", "reference")):
        lance = run.form(form)
        with early_of(lance, False):
            usual = check_inputs(run, lance)
        with early_of(lance, True):
            ours = check_inputs(run, lance)
        for name in COMPARED:
            found[f"{form} {name}"] = gap = distance(ours[name], usual[name])["relative_l2"]
            allowed = TOLERANCE * run.floor.get(plain, {}).get(name, 0.05)
            if not gap <= allowed:
                raise ArithmeticError(f"early: {form} {name} is {gap:.2g} off, allowed {allowed:.2g}")
    return found


@contextmanager
def early_of(lance: Lance, on: bool) -> Iterator[None]:
    """For what is recorded within, decoding steps made anew; afterwards as it was by default."""
    use_early(lance.language_model.model, on)
    lance.fast.decodings.clear()
    try:
        yield
    finally:
        use_early(lance.language_model.model, True)
        lance.fast.decodings.clear()
