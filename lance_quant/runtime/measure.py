"""Which backend is fastest for which number of rows on this GPU, weights cold: written once, read by `selection`.

    python -m lance_quant.runtime.measure

A decode step reads every weight once, so none is in the L2 cache when its turn comes: each timing is a CUDA graph over
enough copies of a linear to exceed the cache.
"""

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lance_quant.errors import LanceQuantError
from lance_quant.runtime.backends import BACKENDS
from lance_quant.runtime.int4_linear import Int4Linear
from lance_quant.runtime.selection import Choice, write_table

SHAPES = {"qkv": (2560, 2048), "o": (2048, 2048), "gate_up": (22016, 2048), "down": (2048, 11008)}  # fused, [O, I]
ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512)  # beyond the last: as for the last
CANDIDATES = ("triton_gemv", "triton_few", "triton_gemm", "triton_dequant_cublas")
COLD_BYTES = 2**28  # several times the L2 of any GPU so far


def random_linear(shape: tuple[int, int], group_size: int, device, seed: int = 0, bias: bool = False) -> Int4Linear:
    """Everything at random, steps near what Lance has."""
    draw = torch.Generator(device).manual_seed(seed)
    linear = Int4Linear(shape, group_size, bias, device)
    linear.qweight.random_(0, 256, generator=draw)
    linear.zeros.random_(0, 16, generator=draw)
    linear.scales.uniform_(0.005, 0.01, generator=draw)
    if bias:
        linear.bias.normal_(generator=draw)
    return linear


def cold_seconds(call: Callable[[object], object], copies: Sequence[object], least_s: float = 0.004) -> float:
    """Seconds of one call, all copies in turn within a CUDA graph; the best of three times `least_s` of replays.

    Without a GPU: once through the copies.
    """
    call(copies[0])
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        for copy in copies:
            call(copy)
        return (time.perf_counter() - begun) / len(copies)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            call(copy)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(replays: int) -> float:
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / replays

    seconds(1)
    replays = max(1, round(least_s / seconds(1)))
    return min(seconds(replays) for _ in range(3)) / len(copies)


def measure(device: str = "cuda", group_size: int = 64, tell: Callable[[str], object] = print) -> tuple[Choice, ...]:
    """Time every candidate and write the GPU's table. Takes about a minute, most of it compiling.

    One that fails is told, and left out of the numbers of rows that it failed at.
    """
    if not torch.cuda.is_available():
        raise LanceQuantError("no GPU here: backends are measured on the one that is to use them")
    name = torch.cuda.get_device_name(device)
    total = {rows: dict.fromkeys(CANDIDATES, 0.0) for rows in ROWS}
    for label, shape in SHAPES.items():
        count = max(2, COLD_BYTES // (shape[0] * shape[1] // 2))
        copies = [random_linear(shape, group_size, device, seed) for seed in range(count)]
        for rows in ROWS:
            x = torch.randn(rows, shape[1], device=device, dtype=torch.bfloat16)
            for candidate, seconds in candidates(copies, x, tell).items():
                total[rows][candidate] += seconds
            tell(f"{label} {rows}: " + ", ".join(f"{key} {value * 1e6:.1f} us" for key, value in total[rows].items()))
    table = table_from(total)
    tell(f"{name}: {write_table(name, table)}")
    return table


def candidates(copies: Sequence[Int4Linear], x: Tensor, tell: Callable[[str], object] = print) -> dict[str, float]:
    """Seconds by name; infinite for one that does not serve these rows, or fails, which is told."""
    found = dict.fromkeys(CANDIDATES, float("inf"))
    for name in CANDIDATES:
        backend = BACKENDS[name]
        if backend.serves(copies[0], x):
            try:
                found[name] = cold_seconds(lambda linear, run=backend.run: run(linear, x), copies)
            except Exception as error:  # of a compiler or a driver, by any name: the table is the others'
                tell(f"{name} failed for {len(x)} rows and is left out: {type(error).__name__}: {error}")
    return found


def table_from(total: dict[int, dict[str, float]]) -> tuple[Choice, ...]:
    """The fastest for each number of rows; neighbours with the same one become a row of the table.

    Raises LanceQuantError for a number of rows that none took.
    """
    table: list[Choice] = []
    for rows, seconds in sorted(total.items()):
        best = min(seconds, key=seconds.get)
        if seconds[best] == float("inf"):
            raise LanceQuantError(f"no backend multiplies {rows} rows on this GPU, so that no table is written")
        if table and table[-1].backend == best:
            table.pop()
        table.append(Choice(rows, best))
    return (*table[:-1], Choice(None, table[-1].backend))


if __name__ == "__main__":
    try:
        measure()
    except LanceQuantError as error:
        sys.exit(str(error))
