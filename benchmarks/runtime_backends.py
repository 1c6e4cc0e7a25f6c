"""Lance-tiny, packed to int4, through every backend that this machine can run: the same answers, the same velocities?

    python benchmarks/runtime_backends.py out=DIR                      # on a GPU all of them, else those of a CPU
    python benchmarks/runtime_backends.py out=DIR device=cpu samples=8

Logits are teacher-forced on the bf16 model's answers, velocities are of the bf16 model's start; `reference` dequantizes
the whole weight at every call, and the others are held against it and against float32 products of the same codes. One
that is further from these than LIMIT fails the script. Their layers are plain. `accelerated bf16` and `accelerated
auto`, fused layers and CUDA graphs, are what an evaluation on a GPU runs: compared in the same way, but accelerated
bf16 is held against bf16. Decoding rate: one answer at a time, after one that compiles and records what is to be.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare machine has not installed the package

from settings import settings_of  # noqa: E402

from lance_quant.awq.config import RecipeConfig  # noqa: E402
from lance_quant.awq.pack import PackJob, pack  # noqa: E402
from lance_quant.awq.search import LayerJob, search_layer  # noqa: E402
from lance_quant.checkpoint.layout import Checkpoint, open_checkpoint  # noqa: E402
from lance_quant.devices import choose_device, current  # noqa: E402
from lance_quant.errors import LanceQuantError  # noqa: E402
from lance_quant.model.inputs import prepare  # noqa: E402
from lance_quant.model.lance import Lance, load_lance  # noqa: E402
from lance_quant.model.prompts import load_tokenizer  # noqa: E402
from lance_quant.model.sampler import FlowConfig, initial_state, start_flow  # noqa: E402
from lance_quant.model.understanding import answer, forced_logits  # noqa: E402
from lance_quant.runtime.accelerate import accelerate  # noqa: E402
from lance_quant.runtime.backends import BACKENDS  # noqa: E402
from lance_quant.runtime.int4_linear import Int4Linear  # noqa: E402
from lance_quant.runtime.lance import load_packed_lance  # noqa: E402
from lance_quant.runtime.selection import Int4Config  # noqa: E402
from lance_quant.tiny.requests import scene_requests  # noqa: E402
from tasks.config import compose_config  # noqa: E402

PLAIN = RecipeConfig(name="minmax", scoring="none", folds=[])
EXACT = "reference, float32"
HELD_AGAINST = {"accelerated bf16": "bf16"}  # the others against EXACT
LIMIT = 0.03  # relative L2 of a whole model's logits and velocities; bf16 layers alone make about a third of it
T = torch.tensor(0.9)


@dataclass(frozen=True, kw_only=True)
class Settings:
    out: str = ""
    device: str = "auto"
    samples: int = 16
    group_size: int = 64

    def __post_init__(self) -> None:
        if not self.out:
            raise LanceQuantError("out=FOLDER is missing: where the packed model and the table go")
        if Path(self.out).is_file():
            raise LanceQuantError(f"out={self.out} is a file: give a folder")
        if self.samples < 1:
            raise LanceQuantError(f"samples={self.samples} must be at least 1")


@dataclass(frozen=True)
class Inputs:
    questions: list
    prompts: list
    states: list[torch.Tensor]
    tokens: list[list[int]]  # the bf16 model's answers


def packed(checkpoint: Checkpoint, out: Path, group_size: int) -> Path:
    """Lance-tiny rounded to nearest."""
    layers = []
    for index in range(checkpoint.config.num_hidden_layers):
        layers.append(out / f"layer_{index}")
        layers[-1].mkdir(parents=True, exist_ok=True)
        job = LayerJob(checkpoint=checkpoint, layer=index, capture=None, recipe=PLAIN, group_size=group_size, bits=4)
        search_layer(job, layers[-1], "cpu")
    folder = out / "packed"
    folder.mkdir(exist_ok=True)
    whole = PackJob(
        checkpoint=checkpoint, layers=layers, recipe=PLAIN, group_size=group_size, bits=4, tasks_calibrated=[]
    )
    pack(whole, folder)
    return folder


def inputs_of(checkpoint: Checkpoint, settings: Settings, device: str) -> Inputs:
    tokenizer, lance = load_tokenizer(checkpoint.folder), load_lance(checkpoint, device)
    kinds = []
    for task in ("x2t_image", "t2i"):
        edges = checkpoint.edges(task)
        requests = scene_requests([task], settings.samples, edges.image_edge, seed=0, unseen=True)
        kinds.append([prepare(request, tokenizer, edges) for request in requests])
    questions, prompts = kinds
    channels = checkpoint.config.latent_channels
    states = [initial_state(sample, at, channels, lance.dtype, device) for at, sample in enumerate(prompts)]
    return Inputs(questions, prompts, states, [answer(lance, sample, 64).tokens for sample in questions])


def found(lance: Lance, inputs: Inputs) -> dict:
    """Answers, logits, velocities, tokens a second."""
    pairs = list(zip(inputs.questions, inputs.tokens, strict=True))
    logits = torch.cat([forced_logits(lance, sample, tokens).float().cpu() for sample, tokens in pairs])
    velocities = []
    for sample, state in zip(inputs.prompts, inputs.states, strict=True):
        flow = start_flow(lance, sample, state, FlowConfig())
        for _ in range(1 if lance.fast is None else 3):  # plain, recorded, replayed
            velocity = flow.velocities(state, T, False).conditional
        velocities.append(velocity.float().cpu())
    answer(lance, inputs.questions[0], 64)
    started = time.perf_counter()
    answers = [answer(lance, sample, 64).tokens for sample in inputs.questions]
    seconds = time.perf_counter() - started
    rate = sum(len(tokens) for tokens in answers) / seconds
    return {"answers": answers, "logits": logits, "velocities": torch.cat(velocities), "rate": rate}


def models(checkpoint: Checkpoint, folder: Path, device: str):
    """(name, model) of each, bf16 first, one at a time."""
    yield "bf16", load_lance(checkpoint, device)
    yield "accelerated bf16", accelerate(load_lance(checkpoint, device), "on")
    lance = load_packed_lance(checkpoint, folder, device, Int4Config(backend="reference"))
    yield "reference", lance
    yield EXACT, lance.float()
    yield "accelerated auto", accelerate(load_packed_lance(checkpoint, folder, device), "on")
    names = [name for name, row in BACKENDS.items() if not row.devices or torch.device(device).type in row.devices]
    for name in ("auto", *names):
        if name == "reference":
            continue
        config = Int4Config(backend=name, resident_gb=1.0 if name == "dense" else 0.0)
        lance = load_packed_lance(checkpoint, folder, device, config)
        linears = [module for module in lance.modules() if isinstance(module, Int4Linear)]
        row = BACKENDS.get(name)
        if row is None or all(row.serves_linear(linear) for linear in linears):
            yield name, lance
        else:
            print(f"{name}: does not serve every linear here")


def compare(settings: Settings, device: str) -> int:
    """Prints the table; how many backends are too far off."""
    out = Path(settings.out)
    checkpoint = open_checkpoint(compose_config(["checkpoint=tiny"]).checkpoint)
    folder = packed(checkpoint, out, settings.group_size)
    inputs = inputs_of(checkpoint, settings, device)
    results, lines, far = {}, [], 0
    for name, lance in models(checkpoint, folder, device):
        results[name] = ours = found(lance, inputs)
        line = {"backend": name, "device": device, "tokens_per_second": round(ours["rate"], 1)}
        for base in ("reference", EXACT, "bf16"):
            theirs = results.get(base)
            if theirs is None or base == name:
                continue
            line[f"same answers as {base}"] = sum(
                a == b for a, b in zip(ours["answers"], theirs["answers"], strict=True)
            )
            for key in ("logits", "velocities"):
                gap = (ours[key] - theirs[key]).norm() / theirs[key].norm()
                line[f"{key} from {base}"] = float(f"{gap:.2g}")
                far += base == HELD_AGAINST.get(name, EXACT) and not gap < LIMIT
        lines.append(line)
        print(json.dumps(line), flush=True)
    (out / "backends.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return far


def main(arguments: list[str]) -> None:
    try:
        settings = Settings(**settings_of(arguments, Settings))
        device = choose_device(settings.device)
        with torch.inference_mode(), current(device):
            far = compare(settings, device)
    except LanceQuantError as error:
        sys.exit(f"error: {error}")
    sys.exit(f"{far} distances above {LIMIT}" if far else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
