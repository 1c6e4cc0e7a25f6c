"""Row `check` of runtime.py: the accelerated forms give what the plain ones do, or the script fails.

Random weights carry any rounding far, so that the plain path itself says how far is far: the same inputs with every
value moved by one step of bf16, up or down at random. TOLERANCE times that distance is allowed.
"""

import torch
from runtime_rows import Run, T, distance

from lance_quant.model.lance import Lance
from lance_quant.model.sampler import FlowConfig, start_flow
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import answer

TOLERANCE = 2.0
COMPARED = ("logits", "conditional", "unconditional")
TEXT_IDS = 1000  # the text's ids lie below


def check_inputs(run: Run, lance: Lance, moved: bool = False) -> dict[str, torch.Tensor]:
    """Decoding logits of some tokens behind a picture-less context, and guided velocities."""
    sample, state = run.drawing()
    table = lance.language_model.model.embed_tokens.weight
    kept = table[:TEXT_IDS].clone()
    if moved:
        state = one_step(state)
        table[:TEXT_IDS] = one_step(kept)
    found = answer(lance, text_sample(run, 32), 6, keep_logits=True)
    table[:TEXT_IDS] = kept
    flow = start_flow(lance, sample, state, FlowConfig())
    for _ in range(3):  # plain, recorded, replayed
        conditional, unconditional = flow.velocities(state, torch.tensor(T), True)
    return {
        "tokens": torch.tensor(found.tokens),
        "logits": found.logits[0],
        "conditional": conditional,
        "unconditional": unconditional,
    }


def one_step(x: torch.Tensor) -> torch.Tensor:
    """Every value moved by a step of bf16, up or down."""
    draw = torch.Generator(x.device).manual_seed(1)
    sign = torch.randint(0, 2, x.shape, generator=draw, device=x.device) * 2 - 1
    return (x.float() * (1 + sign * 2.0**-8)).to(x.dtype)


def check_plain(run: Run) -> dict:
    """What the plain paths give, before their weights are taken over."""
    found = {}
    for form in ("bf16", "reference"):
        run.plain[form] = check_inputs(run, run.form(form))
        moved = check_inputs(run, run.form(form), moved=True)
        run.floor[form] = {name: distance(moved[name], run.plain[form][name])["relative_l2"] for name in COMPARED}
        found[f"{form}, inputs moved by a step"] = run.floor[form]
    found["int4 against bf16"] = distance(run.plain["reference"]["conditional"], run.plain["bf16"]["conditional"])
    return found


def row_check(run: Run) -> dict:
    """Raises ArithmeticError where a form is too far from its plain one."""
    found, far = {}, []
    for form, plain in (("bf16", "bf16"), ("int4", "reference")):
        ours, theirs = check_inputs(run, run.form(form)), run.plain[plain]
        found[form] = {"same tokens": f"{int((ours['tokens'] == theirs['tokens']).sum())} of {len(ours['tokens'])}"}
        for name in COMPARED:
            found[form][name] = gap = distance(ours[name], theirs[name])
            allowed = TOLERANCE * run.floor[plain][name]
            run.put(f"{name}, distance from the plain path", form, gap["relative_l2"], f"of {allowed:.2g}")
            if not (gap["finite"] and gap["relative_l2"] <= allowed):
                far.append(f"{form} {name} {gap['relative_l2']:.2g}, allowed {allowed:.2g}")
        print(f"  {form}: {found[form]}", flush=True)
    if far:
        raise ArithmeticError(f"too far from the plain path: {'; '.join(far)}")
    return found


def text_sample(run: Run, tokens: int) -> Sample:
    """A text prompt of so many tokens, as a context to answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(TEXT_IDS, run.models.config.vocab_size), (tokens,), generator=generator)
    none = torch.zeros(0, dtype=torch.int64)
    return Sample(
        task="text", ids=ids, split_lens=(tokens,), split_modes=("causal",), modality=torch.zeros_like(ids), grids=(),
        vit_indexes=none, vae_indexes=none, mse_indexes=none, context_length=tokens,
    )  # fmt: skip
