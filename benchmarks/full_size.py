"""A checkpoint of the real size on one card, stage by stage:

    python benchmarks/full_size.py variant=image folder=/big/disk stage=make,load,forward,generate,run,pack out=DIR

    make      the random checkpoint (make_full_size.py); parts that are there are kept
    load      F32 file -> bf16 on the GPU, without and with the vision tower
    forward   eager denoising forward of 2,306 tokens, both branches as one batch and as two; decode step
    generate  t2i 768 x 768 (image) or t2v 480 x 848 of 50 frames (video), 30 steps; VAE decode of 121 frames
    capture   the default calibration set;  offload: the same within 7.5 GB
    run       `python -m flows.full_run` to packed folder and report, seconds a stage
    pack      packed size and keys of what `run` left, and packing once more for its own time and memory

Each stage prints a JSON line, the end a table; both go to out=. Nothing is begun after limit_s seconds, and a run that
is still going then is stopped and what it finished is told. scale=tiny tries all of it on a CPU.
"""

import json
import sys
import time
from pathlib import Path

import torch
from bench import Bench, Settings
from model_stages import stage_forward, stage_generate, stage_load, stage_make
from pipeline_stages import FLOW, run_flow, stage_capture, stage_offload, stage_pack, stage_run
from settings import settings_of

from lance_quant.errors import LanceQuantError

STAGES = {
    "make": stage_make,
    "load": stage_load,
    "forward": stage_forward,
    "generate": stage_generate,
    "capture": stage_capture,
    "offload": stage_offload,
    "run": stage_run,
    "pack": stage_pack,
}


def main(arguments: list[str]) -> None:
    if arguments[:1] == [FLOW]:
        return run_flow(arguments[1:])
    try:
        settings = Settings(**settings_of(arguments, Settings))
        for name in settings.stage.split(","):
            if name not in STAGES:
                raise LanceQuantError(f"stage={name} is unknown: take some of {','.join(STAGES)}")
        failed = run_stages(Bench(settings))
    except LanceQuantError as error:
        sys.exit(f"error: {error}")
    sys.exit(failed)


def run_stages(bench: Bench) -> int:
    """All stages that the time allows; one that fails leaves the others alone. Returns how many failed."""
    out, failed = Path(bench.settings.out or "."), 0
    out.mkdir(parents=True, exist_ok=True)
    for name in bench.settings.stage.split(","):
        started = time.monotonic()
        if bench.left <= 0:
            bench.tell(name, "not begun: out of time")
            continue
        line = {"stage": name, "variant": bench.settings.variant, "device": device_name()}
        try:
            line |= STAGES[name](bench)
        except Exception as error:  # the stages behind it cost a machine to come back for
            failed += 1
            line["error"] = f"{type(error).__name__}: {error}"
            bench.tell(name, f"FAILED: {line['error']}")
        line["stage_seconds"] = round(time.monotonic() - started, 1)
        print(json.dumps(line), flush=True)
        with (out / f"full_size_{bench.settings.variant}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        (out / f"full_size_{bench.settings.variant}.md").write_text(table(bench))
    print(table(bench), flush=True)
    return failed


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def table(bench: Bench) -> str:
    lines = [f"| {bench.settings.variant} on {device_name()}, torch {torch.__version__} | measured |", "|---|---|"]
    return "\n".join(lines + [f"| {what} | {value} |" for what, value in bench.rows]) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
