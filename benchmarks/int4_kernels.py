"""Microseconds and TB/s of every int4 backend and of bf16 cuBLAS, weights cold, on one GPU:

    python benchmarks/int4_kernels.py out=DIR                       # shapes=qkv,o,gate_up,down rows=1,2,4,8,16,64,...
    python benchmarks/int4_kernels.py out=DIR stage=tune rows=1     # configs of the Triton kernels, best first

Each number is a CUDA graph over 36 copies of a linear, as a decode step reads them. TB/s counts the bytes of the format
alone: codes, steps and zero points, or bf16 weights. `error` is the relative L2 distance from the float64 product. A
backend that fails is told and left out. Nothing is begun after limit_s seconds. Needs torch with its triton alone.
device=cpu copies=1 shapes=tiny rows=1,17, with TRITON_INTERPRET=1, tries the script itself.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional as F

from lance_quant.errors import LanceQuantError
from lance_quant.runtime import backends
from lance_quant.runtime.int4_linear import Int4Linear
from lance_quant.runtime.measure import SHAPES, cold_seconds, random_linear

ALL_SHAPES = SHAPES | {"kv": (256, 2048), "q": (2048, 2048), "gate": (11008, 2048), "tiny": (64, 256)}
COMPILERS = 8  # threads


@dataclass(frozen=True, kw_only=True)
class Settings:
    out: str = ""
    stage: str = "table,chunks"
    shapes: str = "qkv,o,gate_up,down"
    rows: str = "1,2,4,8,16,64,512,2304,4612"
    group_size: int = 64
    copies: int = 36
    device: str = "cuda"
    limit_s: int = 140


@dataclass
class Linears:
    """Copies of one shape; what another layout needs is made when a row asks for it."""

    label: str
    copies: list[Int4Linear]
    made: dict[str, list] = field(default_factory=dict)

    def own(self) -> list[Int4Linear]:
        return self.copies

    def dense(self) -> list[torch.Tensor]:
        return self._once("dense", lambda linear: linear.weight(torch.bfloat16))

    def tinygemm(self) -> list[tuple]:
        return self._once("tinygemm", tinygemm_parts)

    def _once(self, name: str, make: Callable) -> list:
        if name not in self.made:
            self.made[name] = [make(linear) for linear in self.copies]
        return self.made[name]

    def int4_bytes(self) -> int:
        linear = self.copies[0]
        return sum(part.nbytes for part in (linear.qweight, linear.scales, linear.zeros))


def tinygemm_parts(linear: Int4Linear) -> tuple:
    swapped = (linear.qweight << 4) | (linear.qweight >> 4)  # the even input in the high nibble
    packed = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
    shift = (8 - linear.zeros.float()) * linear.scales.float()
    both = torch.stack((linear.scales, shift.bfloat16()), -1).transpose(0, 1).contiguous()
    return packed, both, linear.group_size


def entries(linears: Linears, rows: int) -> Iterator[tuple[str, Callable, Callable[[], list]]]:
    """(name, call(copy, x), copies()) of what can serve these rows."""
    yield "bf16 cuBLAS", lambda weight, x: F.linear(x, weight), linears.dense
    if rows <= 64:
        yield (
            "tinygemm",
            lambda parts, x: torch.ops.aten._weight_int4pack_mm(x, parts[0], parts[2], parts[1]),
            linears.tinygemm,
        )
    limits = {"triton_gemv": backends.GEMV_ROWS, "triton_gemm": 4612, "triton_dequant_cublas": 10**9}
    for name, most in limits.items():
        if rows <= most:
            yield name, backends.BACKENDS[name].run, linears.own
    if rows <= backends.GEMV_ROWS:
        yield "triton_gemv early", lambda linear, x: gemv_with(linear, x, early=True), linears.own
    if linears.label == "gate_up" and rows <= backends.GEMV_ROWS:
        yield "triton_gemv silu", lambda linear, x: gemv_with(linear, x, silu_mul=True), linears.own


def gemv_with(linear: Int4Linear, x: torch.Tensor, early: bool = False, silu_mul: bool = False) -> torch.Tensor:
    from lance_quant.runtime.kernels.gemv import config_for, gemv

    config = replace(config_for(linear.out_features, linear.in_features, len(x)), early=early)
    return gemv(x, linear.qweight, linear.scales, linear.zeros, silu_mul=silu_mul, config=config)


class Bench:
    def __init__(self, settings: Settings):
        self.settings, self.started, self.lines = settings, time.monotonic(), []
        self.rows = [int(rows) for rows in settings.rows.split(",")]

    def late(self) -> bool:
        return time.monotonic() - self.started > self.settings.limit_s

    def each_shape(self) -> Iterator[Linears]:
        for label in self.settings.shapes.split(","):
            shape = ALL_SHAPES[label]
            copies = [
                random_linear(shape, self.settings.group_size, self.settings.device, n)
                for n in range(self.settings.copies)
            ]
            yield Linears(label, copies)
            del copies
            torch.cuda.empty_cache()

    def input(self, linears: Linears, rows: int) -> torch.Tensor:
        draw = torch.Generator(self.settings.device).manual_seed(rows)
        wide = torch.randn(rows, linears.copies[0].in_features, device=self.settings.device, generator=draw)
        return wide.bfloat16()

    def table(self) -> None:
        print(f"{'shape':8} {'rows':>5} {'backend':22} {'us':>9} {'TB/s':>6} {'error':>9}")
        for linears in self.each_shape():
            for rows in self.rows:
                x = self.input(linears, rows)
                exact = x.double() @ linears.copies[0].weight(torch.float64).T
                with ThreadPoolExecutor(COMPILERS) as pool:  # kernels compile side by side; failures show below
                    mine = [call for name, call, _ in entries(linears, rows) if name.startswith("triton")]
                    ready = [pool.submit(call, linears.copies[0], x) for call in mine]
                    [future.exception() for future in ready]
                for name, call, copies in entries(linears, rows):
                    if self.late():
                        return
                    held = linears.copies[0].qweight.nbytes * 4 if name.startswith("bf16") else linears.int4_bytes()
                    self.row(linears.label, rows, name, call, copies, x, exact, held)

    def row(self, label, rows, name, call, copies, x, exact, held) -> float:
        """Measure, print and keep one line; seconds, infinite where it failed."""
        line = {"shape": label, "rows": rows, "backend": name}
        try:
            y = call(copies()[0], x).double()
            wanted = F.silu(exact.chunk(2, -1)[0]) * exact.chunk(2, -1)[1] if y.shape != exact.shape else exact
            line["error"] = float((y - wanted).norm() / wanted.norm())
            seconds = cold_seconds(lambda copy: call(copy, x), copies())
            line |= {"us": seconds * 1e6, "tb_s": held / seconds / 1e12}
            print(
                f"{label:8} {rows:5} {name:22} {line['us']:9.2f} {line['tb_s']:6.2f} {line['error']:9.1e}", flush=True
            )
        except Exception as error:  # one backend's failure is a result like another
            seconds = float("inf")
            line["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(f"{label:8} {rows:5} {name:22} failed: {line['failed']}", flush=True)
        self.lines.append(line)
        return seconds

    def chunks(self) -> None:
        """How much to dequantize at a time before cuBLAS multiplies it."""
        kept = backends.CHUNK_ELEMENTS
        for linears in self.each_shape():
            for rows, millions in product([rows for rows in self.rows if rows > 1000], (4, 8, 16, 24, 48)):
                if self.late():
                    break
                backends.CHUNK_ELEMENTS = millions * 2**20
                x = self.input(linears, rows)
                exact = x.double() @ linears.copies[0].weight(torch.float64).T
                call = backends.BACKENDS["triton_dequant_cublas"].run
                name = f"chunks of {millions} Mi"
                self.row(linears.label, rows, name, call, linears.own, x, exact, linears.int4_bytes())
                backends._chunk.cache_clear()
        backends.CHUNK_ELEMENTS = kept

    def tune(self) -> None:
        """Configs of the kernels that serve these rows; dequantizing is measured once a shape."""
        for linears in self.each_shape():
            for rows in self.rows:
                x = self.input(linears, rows)
                exact = x.double() @ linears.copies[0].weight(torch.float64).T
                calls = tuned(linears, rows)
                with ThreadPoolExecutor(COMPILERS) as pool:
                    [future.exception() for future in [pool.submit(call, linears.copies[0], x) for _, call in calls]]
                for name, call in calls:
                    if self.late():
                        return
                    self.row(linears.label, rows, name, call, linears.own, x, exact, linears.int4_bytes())

    def write(self) -> None:
        if self.settings.out:
            path = Path(self.settings.out) / "int4_kernels.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(self.device() | line) + "\n" for line in self.lines))

    def device(self) -> dict:
        gpu = torch.cuda.is_available()
        return {"device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__}


def tuned(linears: Linears, rows: int) -> list[tuple[str, Callable]]:
    """(config, call) to compare."""
    from lance_quant.runtime.kernels.gemm import GemmConfig, gemm
    from lance_quant.runtime.kernels.gemv import GemvConfig, gemv

    def gemv_call(config):
        return lambda linear, x: gemv(x, linear.qweight, linear.scales, linear.zeros, config=config)

    def gemm_call(config):
        return lambda linear, x: gemm(x, linear.qweight, linear.scales, linear.zeros, config=config)

    wide = linears.copies[0].in_features > 4096
    calls = []
    if rows <= backends.GEMV_ROWS:
        words = ((256, 2), (512, 4), (1024, 8), (2048, 8)) if wide else ((256, 1), (256, 2), (256, 4), (128, 1))
        for block_o, (block_w, warps) in product((2, 4, 8, 16), words):
            config = GemvConfig(block_o, block_w, warps)
            calls.append((str(config), gemv_call(config)))
    block_m = max(16, min(128, 1 << (rows - 1).bit_length()))
    splits = (1, 2, 4, 8) if rows <= 64 else (1,)
    sizes = ((32, 2), (64, 2), (64, 4)) if rows <= 64 else ((128, 4), (128, 8), (256, 8))
    for (block_o, warps), block_i, split, stages in product(sizes, (64, 128), splits, (3, 5)):
        if rows > 2:
            config = GemmConfig(block_m, block_o, block_i, split, warps, stages)
            calls.append((str(config), gemm_call(config)))
    return calls


def settings_of(arguments: list[str]) -> Settings:
    known = {field.name: field.type for field in fields(Settings)}
    found = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise LanceQuantError(f"'{word}' is no setting: take key=value of {', '.join(known)}")
        found[key] = known[key](value)
    return Settings(**found)


def main(arguments: list[str]) -> None:
    try:
        settings = settings_of(arguments)
        stages = settings.stage.split(",")
        for stage in stages:
            if stage not in ("table", "chunks", "tune"):
                raise LanceQuantError(f"stage={stage} is unknown: take some of table,chunks,tune")
        if settings.device != "cpu" and not torch.cuda.is_available():
            raise LanceQuantError("this benchmark needs a CUDA GPU")
    except LanceQuantError as error:
        sys.exit(str(error))
    bench = Bench(settings)
    with torch.inference_mode():
        for stage in stages:
            getattr(bench, stage)()
            bench.write()
    print(bench.device(), f"{time.monotonic() - bench.started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
