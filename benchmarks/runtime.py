"""The runtime's whole table on one GPU, in one run; random weights of the real size made there:

    python benchmarks/runtime.py out=DIR                               all rows, the most important ones first
    python benchmarks/runtime.py out=DIR rows=decode,step group_size=128 forms=bf16,int4,reference
    python benchmarks/runtime.py out=DIR size=tiny device=cpu          tries all of it; size=layer: one real layer

Forms: bf16 and int4 (fused layers, CUDA graphs), reference (codes dequantized at every call, the plain layers). Before
a form is timed its logits and velocities are compared with the plain path's; too far, and the script ends with 1. Needs
torch, triton, safetensors, numpy, transformers, tokenizers and PIL; diffusers for the VAE alone. A row that fails, or
takes more than row_s seconds, says why, and the next one goes on. JSON lines go to `out`/runtime.jsonl as they come,
the table to runtime.md, profiles to profile_*.txt.
"""

import json
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare machine has not installed the package

from make_full_size import FOLDERS  # noqa: E402
from runtime_check import check_plain, row_check  # noqa: E402
from runtime_early import row_early  # noqa: E402
from runtime_models import SIZES, Models  # noqa: E402
from runtime_rows import (  # noqa: E402
    FORMS,
    Run,
    row_batch,
    row_decode,
    row_long,
    row_pair,
    row_step,
    table_of,
)
from runtime_tasks import row_answer, row_first_token, row_memory, row_parts, row_profile, row_t2i, row_t2v  # noqa: E402
from settings import settings_of  # noqa: E402

from lance_quant.devices import choose_device, current  # noqa: E402
from lance_quant.errors import LanceQuantError  # noqa: E402
from lance_quant.runtime.accelerate import accelerate  # noqa: E402
from lance_quant.runtime.int4_linear import Int4Linear  # noqa: E402

ROWS = {
    "check": row_check,
    "decode": row_decode,
    "step": row_step,
    "pair": row_pair,
    "batch": row_batch,
    "early": row_early,
    "answer": row_answer,
    "t2i": row_t2i,
    "parts": row_parts,
    "profile": row_profile,
    "first_token": row_first_token,
    "long": row_long,
    "t2v": row_t2v,
    "memory": row_memory,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """rows: names, comma-separated, or all. limit_s: after which no row is begun; row_s: that one may take."""

    out: str = ""
    rows: str = "all"
    forms: str = "bf16,int4"
    variant: str = "image"
    size: str = "real"
    group_size: int = 64
    device: str = "auto"
    limit_s: int = 540
    row_s: int = 120

    def __post_init__(self) -> None:
        if not self.out:
            raise LanceQuantError("out=FOLDER is missing: where tables and the packed folder go")
        if Path(self.out).is_file():
            raise LanceQuantError(f"out={self.out} is a file: give a folder")
        for name, known in (("size", SIZES), ("variant", FOLDERS)):
            if getattr(self, name) not in known:
                raise LanceQuantError(f"{name}={getattr(self, name)} is unknown: take one of {','.join(known)}")
        for name in self.chosen:
            if name not in ROWS:
                raise LanceQuantError(f"rows={name} is unknown: take all or some of {','.join(ROWS)}")
        for form in self.forms.split(","):
            if form not in FORMS:
                raise LanceQuantError(f"forms={form} is unknown: take some of {','.join(FORMS)}")

    @property
    def chosen(self) -> list[str]:
        return list(ROWS) if self.rows == "all" else self.rows.split(",")


def main(arguments: list[str]) -> None:
    try:
        settings = Settings(**settings_of(arguments, Settings))
        device, out = choose_device(settings.device), Path(settings.out)
        models = Models(settings.size, settings.variant, device, settings.group_size, out / "model")
    except LanceQuantError as error:
        sys.exit(f"error: {error}")
    with torch.inference_mode(), current(device):
        sys.exit(benchmark(settings, Run(models, out, settings.chosen, settings.forms.split(","))))


def benchmark(settings: Settings, run: Run) -> int:
    """Every row, in order; returns how many failed."""
    started = time.monotonic()
    signal.signal(signal.SIGALRM, too_long)
    models, out, device = run.models, run.out, run.models.device
    failed = []

    def attempt(name: str, work, *arguments) -> None:
        since = time.monotonic()
        if since - started > settings.limit_s:
            print(f"{name}: not begun, out of time", flush=True)
            return
        signal.alarm(settings.row_s)
        try:
            found = work(*arguments)
        except Exception:  # the rows behind it cost a machine to come back for
            failed.append(name)
            found = {"error": traceback.format_exc()}
            print(f"{name} FAILED\n{found['error']}", flush=True)
        finally:
            signal.alarm(0)
        line = {"row": name, "device": device_name(device), "size": settings.size, "variant": settings.variant}
        line |= {"group_size": models.group_size, "took_s": round(time.monotonic() - since, 2), **(found or {})}
        print(json.dumps(line), flush=True)
        with (out / "runtime.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        (out / "runtime.md").write_text(table_of(run, device_name(device)))

    attempt("make bf16", models.make_bf16)
    attempt("make int4", models.make_int4)
    if "check" in run.rows:
        attempt("plain path", check_plain, run)
    if "first_token" in run.rows:  # written from linears that are not fused yet
        attempt("write packed", lambda: {"folder": str(models.write_packed(out / "packed"))})
    attempt("fuse", fuse, models)
    for name in run.rows:
        attempt(name, ROWS[name], run)
    print(table_of(run, device_name(device)), flush=True)
    print(f"{time.monotonic() - started:.0f} s in all; failed: {', '.join(failed) or 'none'}", flush=True)
    return len(failed)


def too_long(*_: object) -> None:
    raise TimeoutError("the row took more than row_s seconds")


def fuse(models: Models) -> None:
    for lance in (models.bf16, models.int4):
        accelerate(lance, "on")
    if models.device == "cpu":
        for module in models.int4.modules():
            if isinstance(module, Int4Linear):
                module.to_cpu_layout()


def device_name(device: str) -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}" if device != "cpu" else "CPU"


if __name__ == "__main__":
    main(sys.argv[1:])
