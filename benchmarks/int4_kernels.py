"""Microseconds and TB/s of the int4 kernels and of bf16 cuBLAS, weights cold, on one GPU:

    python benchmarks/int4_kernels.py out=DIR                        # all stages, the most important ones first
    python benchmarks/int4_kernels.py out=DIR stage=tune rows=8      # configs of the kernels that serve 8 rows
    python benchmarks/int4_kernels.py out=DIR stage=table shapes=down

    many        weights that become bf16 before cuBLAS: pieces of several sizes, beside bf16 weights
    dequantize  configs of that kernel alone
    tune        configs of the GEMV (1 to 4 rows, with the norm, SiLU and residual of a decode step) and of the
                tensor-core kernels (2 to 16 rows; more), and the tables TUNED to paste into them
    table       every backend at every number of rows, and the table BUILT_IN to paste into selection.py
    rivals      torch's tinygemm, comfy-kitchen and gemlite beside ours as the runtime chooses it and bf16 cuBLAS, and a
                table in `out`/int4_rivals.md: int4_rivals.py says what to install. Give it stage_s=400

Each number is a CUDA graph over 36 copies of a linear, as a decode step reads them. TB/s counts the bytes of the format
alone: codes, steps and zero points, or bf16 weights (dequantize: both). `error` is the relative L2 distance from the
float64 product; a kernel that fails, or is too far from it, is told and left out, and the script ends with 1. Lines are
written as they come; a stage ends after stage_s seconds, all of it after limit_s. Needs torch with its triton,
`rivals` what int4_rivals.py names besides.
device=cpu copies=1 shapes=tiny rows=1,8,17, with TRITON_INTERPRET=1, tries the script itself.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from settings import settings_of
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare machine has not installed the package

from int4_configs import Candidate, dequantizers, fews, gemms, gemvs  # noqa: E402
from int4_rivals import measure_rivals  # noqa: E402

from lance_quant.errors import LanceQuantError  # noqa: E402
from lance_quant.runtime.backends import BACKENDS  # noqa: E402
from lance_quant.runtime.dequantized import chunked  # noqa: E402
from lance_quant.runtime.int4_linear import Int4Linear  # noqa: E402
from lance_quant.runtime.measure import CANDIDATES, SHAPES, cold_seconds, random_linear, table_from  # noqa: E402

ALL_SHAPES = SHAPES | {"kv": (256, 2048), "q": (2048, 2048), "gate": (11008, 2048), "tiny": (64, 256)}
STAGES = ("many", "dequantize", "tune", "table", "rivals")
ROWS = {
    "many": "2304,4608,668",
    "dequantize": "1",
    "tune": "1,8,2,16",
    "table": "1,2,4,5,8,16,32,64,128,668,2304",
    "rivals": "1,2,4,8,16,2304",
}
PIECES = (6, 12, 24, 48)  # Mi elements
COMPILERS = 12  # threads
CLOSE = 4e-3  # relative L2, the contract of a backend


@dataclass(frozen=True, kw_only=True)
class Settings:
    """stage: names, comma-separated, or all. rows: by default those of the stage."""

    out: str = ""
    stage: str = "all"
    shapes: str = "gate_up,down,qkv,o"
    rows: str = ""
    group_size: int = 64
    copies: int = 36
    device: str = "cuda"
    limit_s: int = 420
    stage_s: int = 150

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage not in STAGES:
                raise LanceQuantError(f"stage={stage} is unknown: take all or some of {','.join(STAGES)}")
        for shape in self.shapes.split(","):
            if shape not in ALL_SHAPES:
                raise LanceQuantError(f"shapes={shape} is unknown: take some of {','.join(ALL_SHAPES)}")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise LanceQuantError("this benchmark needs a CUDA GPU")

    @property
    def stages(self) -> list[str]:
        return list(STAGES) if self.stage == "all" else self.stage.split(",")

    def rows_of(self, stage: str) -> list[int]:
        return [int(rows) for rows in (self.rows or ROWS[stage]).split(",")]


@dataclass
class Linears:
    """Copies of one shape, and their bf16 weights once they are asked for."""

    label: str
    copies: list[Int4Linear]
    dense: list[torch.Tensor] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.copies[0].out_features, self.copies[0].in_features

    def bf16(self) -> list[torch.Tensor]:
        if not self.dense:
            self.dense = [linear.weight(torch.bfloat16) for linear in self.copies]
        return self.dense

    def int4_bytes(self) -> int:
        return sum(part.nbytes for part in self.copies[0].packed)

    def bf16_bytes(self) -> int:
        return 4 * self.copies[0].qweight.nbytes


class Bench:
    def __init__(self, settings: Settings):
        self.settings, self.started, self.failed = settings, time.monotonic(), 0
        self.best: dict[tuple[str, int, int, int], tuple[float, Candidate]] = {}
        self.total: dict[int, dict[str, float]] = {}
        self.file = Path(settings.out) / "int4_kernels.jsonl" if settings.out else None
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        print(f"{'shape':8} {'rows':>5} {'kernel':64} {'us':>9} {'TB/s':>6} {'error':>9}")
        for stage in self.settings.stages:
            self.stage, self.stage_started = stage, time.monotonic()
            print(f"# {stage}", flush=True)
            getattr(self, stage)()
            print(self.chosen(), flush=True)
        print(self.device(), f"{time.monotonic() - self.started:.0f} s")

    def late(self) -> bool:
        now, limits = time.monotonic(), self.settings
        return now - self.started > limits.limit_s or now - self.stage_started > limits.stage_s

    def each(self) -> Iterator[tuple[Linears, int, torch.Tensor]]:
        """Copies of a shape, number of rows, x."""
        settings = self.settings
        for label in settings.shapes.split(","):
            make = partial(random_linear, ALL_SHAPES[label], settings.group_size, settings.device)
            linears = Linears(label, [make(seed) for seed in range(settings.copies)])
            for rows in settings.rows_of(self.stage):
                if self.late():
                    return
                draw = torch.Generator(settings.device).manual_seed(rows)
                x = torch.randn(rows, linears.shape[1], device=settings.device, generator=draw)
                yield linears, rows, x.bfloat16()
            del linears
            torch.cuda.empty_cache()

    # ------------------------------------------------------------ stages

    def many(self) -> None:
        for linears, rows, x in self.each():
            wide = x.double() @ linears.copies[0].weight(torch.float64).T
            self.row(linears, rows, "bf16 cuBLAS", lambda w, x=x: F.linear(x, w), linears.bf16(), wide)
            for millions in PIECES:
                call = partial(chunked, x=x, elements=millions * 2**20)
                self.row(linears, rows, f"pieces of {millions} Mi, then cuBLAS", call, linears.copies, wide)

    def dequantize(self) -> None:
        for linears, _, _ in self.each():
            wide = linears.copies[0].weight(torch.float64)
            self.candidates(linears, 0, None, dequantizers(linears.copies[0]), lambda _, wide=wide: wide)

    def tune(self) -> None:
        for linears, rows, x in self.each():
            wide = x.double() @ linears.copies[0].weight(torch.float64).T
            label, shape = linears.label, linears.shape
            served = gemvs(label, shape, rows), fews(label, shape, rows), gemms(shape, rows)
            for found in served:
                self.candidates(linears, rows, x, found, lambda candidate, x=x, wide=wide: candidate.exact(x, wide))

    def table(self) -> None:
        for linears, rows, x in self.each():
            wide = x.double() @ linears.copies[0].weight(torch.float64).T
            self.row(linears, rows, "bf16 cuBLAS", lambda w, x=x: F.linear(x, w), linears.bf16(), wide)
            for name in CANDIDATES:
                backend = BACKENDS[name]
                seconds = float("inf")
                if self.settings.device == "cpu" or backend.serves(linears.copies[0], x):
                    call = partial(backend.run, x=x)
                    seconds = self.row(linears, rows, name, call, linears.copies, wide)
                self.total.setdefault(rows, {}).setdefault(name, 0.0)
                self.total[rows][name] += seconds

    def rivals(self) -> None:
        measure_rivals(self)

    # ------------------------------------------------------------ lines

    def candidates(self, linears: Linears, rows: int, x, found: list[Candidate], exact: Callable) -> None:
        """Compile all side by side, then measure one after the other; the best is remembered."""
        if self.settings.device != "cpu":  # the interpreter compiles nothing, and is of one thread
            with ThreadPoolExecutor(COMPILERS) as pool:  # failures show below
                ready = [pool.submit(candidate.call, linears.copies[0], x) for candidate in found]
                [future.exception() for future in ready]
        for candidate in found:
            if self.late():
                return
            call = lambda linear, candidate=candidate: candidate.call(linear, x)  # noqa: E731
            seconds = self.row(linears, rows, str(candidate.config), call, linears.copies, exact(candidate))
            key = (candidate.table, rows, *linears.shape)
            if seconds < self.best.get(key, (float("inf"),))[0]:
                self.best[key] = (seconds, candidate)
        self.chosen()  # on disk, whatever ends this run

    def row(self, *arguments) -> float:
        """`measured`, in seconds; infinite where it failed."""
        return self.measured(*arguments).get("us", float("inf")) * 1e-6

    def measured(
        self, linears: Linears, rows: int, name: str, call, copies, exact: torch.Tensor, close: float = CLOSE
    ) -> dict:
        """Measure, print and write one line, which comes back: with `us` and `tb_s`, or with `failed`."""
        line = {"stage": self.stage, "shape": linears.label, "rows": rows, "kernel": name} | self.device()
        start = f"{linears.label:8} {rows:5} {name:64}"
        held = linears.bf16_bytes() if name.startswith("bf16") else linears.int4_bytes()
        held += linears.bf16_bytes() if self.stage == "dequantize" else 0
        try:
            line["error"] = float((call(copies[0]).double() - exact).norm() / exact.norm())
            if not line["error"] < close:
                raise ArithmeticError(f"{line['error']:.1e} from the float64 product, at most {close} is right")
            seconds = cold_seconds(call, copies)
            line |= {"us": seconds * 1e6, "tb_s": held / seconds / 1e12}
            print(f"{start} {line['us']:9.2f} {line['tb_s']:6.2f} {line['error']:9.1e}", flush=True)
        except Exception as error:  # one kernel's failure is a result like another
            self.failed += 1
            line["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(f"{start} failed: {line['failed']}", flush=True)
        if self.file:
            with self.file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return line

    def chosen(self) -> str:
        """What was fastest, as the sources hold it."""
        lines = []
        for table in dict.fromkeys(key[0] for key in self.best):
            lines.append(f"# {table}")
            entries = {key[1:]: value for key, value in self.best.items() if key[0] == table}
            lines += [f"    {key}: {c.config},  # {s * 1e6:.1f} us" for key, (s, c) in sorted(entries.items())]
        if self.total:
            rows = ", ".join(str(choice) for choice in table_from(self.total))
            lines.append(f'# selection.BUILT_IN\n    "cuda": ({rows}),')
        text = "\n".join(lines) + "\n"
        if self.file:
            (self.file.parent / "int4_chosen.txt").write_text(text)
        return text

    def device(self) -> dict:
        gpu = torch.cuda.is_available()
        return {"device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__}


def main(arguments: list[str]) -> None:
    try:
        settings = Settings(**settings_of(arguments, Settings))
    except LanceQuantError as error:
        sys.exit(f"error: {error}")
    bench = Bench(settings)
    with torch.inference_mode():
        bench.run()
    sys.exit(f"{bench.failed} kernels failed" if bench.failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
