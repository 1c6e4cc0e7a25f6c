"""`TensorReader`: one safetensors file, read tensor by tensor or piece by piece, never as a whole.

Reads go into buffers of our own, not through a mapped file: what a mapping has shown stays in memory until it is
closed, and a copy from it to a GPU can neither overlap the next read nor be cast on the device. Buffers for a GPU are
page-locked and the process's, not a reader's: PyTorch never gives such memory back, and each reader's would add up.
"""

import json
import os
import queue
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from lance_quant.errors import LanceQuantError

PIECE_BYTES = 16 * 2**20  # a 1.2 GB embedding is cast in pieces of this size: the peak stays near the result's size
READERS = 4  # tensors read at a time: one thread waits for the disk while another's piece is on its way to the GPU
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; `start` counts from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class PinnedBuffers:
    """At most `count` page-locked buffers, lent to one thread at a time and made when they are first needed."""

    def __init__(self, count: int):
        self._free: queue.LifoQueue[torch.Tensor | None] = queue.LifoQueue()  # so that a made one is lent again first
        for _ in range(count):
            self._free.put(None)

    @contextmanager
    def lend(self, size: int) -> Iterator[torch.Tensor]:
        """A buffer of `size` bytes or more; waits until one is free. What reads from it must be done at the end."""
        buffer = self._free.get()
        try:
            if buffer is None or buffer.numel() < size:
                buffer = _pinned(max(size, PIECE_BYTES))
            yield buffer
        finally:
            self._free.put(buffer)


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


PINNED = PinnedBuffers(READERS)


class TensorReader:
    """Context manager over the tensors of a safetensors file; reads may come from several threads.

    Raises LanceQuantError where the file is missing, truncated or is not safetensors, and where a tensor is asked for
    that it does not hold.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self._file = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            raise LanceQuantError(f"{self.path} is missing") from None
        try:
            self._entries = _read_header(self._file)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._file.close()
            raise LanceQuantError(
                f"{self.path} is truncated or not a safetensors file ({error}): fetch the file again"
            ) from None

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def names(self) -> list[str]:
        """Sorted."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise LanceQuantError(f"{self.path} lacks the tensor '{name}'")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The file's own word: "F32", "BF16", "U8", ..."""
        return self._entry(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in the file's dtype."""
        entry = self._entry(name)
        out = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
        self._read(out, entry.start)
        return out

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's rows on the CPU in blocks of about PIECE_BYTES, each good until the next one is asked for."""
        entry = self._entry(name)
        buffer = _pageable(entry)
        for first, rows in _blocks(entry):
            yield self._read_rows(buffer, entry, first, rows)

    def read_into(self, name: str, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` (any device, any dtype) with the tensor; shapes must agree. Casts run where `out` is."""
        entry = self._entry(name)
        if entry.shape != tuple(out.shape):
            raise LanceQuantError(
                f"{self.path}: '{name}' is {list(entry.shape)}, the config asks for {list(out.shape)}"
            )
        with torch.inference_mode():  # `out` may have been made in it, and this thread may not be
            if out.device.type == "cpu" and out.dtype == DTYPES[entry.dtype] and out.is_contiguous():
                self._read(out, entry.start)
                return out
            with PINNED.lend(_largest_block(entry)) if out.is_cuda else nullcontext(_pageable(entry)) as buffer:
                for first, rows in _blocks(entry):
                    piece = self._read_rows(buffer, entry, first, rows)
                    target = out[first : first + rows] if entry.shape else out
                    target.copy_(piece, non_blocking=True)
                    if out.is_cuda:
                        torch.cuda.current_stream(out.device).synchronize()  # the next piece takes the same buffer
        return out

    def read_all(self, outs: Mapping[str, torch.Tensor]) -> None:
        """`read_into` for each name, several at a time, in the file's order."""
        names = sorted(outs, key=lambda name: self._entry(name).start)
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(lambda name: self.read_into(name, outs[name]), names):
                pass

    def _read_rows(self, buffer: torch.Tensor, entry: Entry, first: int, rows: int) -> torch.Tensor:
        """Rows of a tensor, in the buffer."""
        shape = (rows, *entry.shape[1:]) if entry.shape else ()
        size = prod(shape) * DTYPES[entry.dtype].itemsize
        piece = buffer[:size].view(DTYPES[entry.dtype]).view(shape)
        self._read(piece, entry.start + first * (size // max(1, rows)))
        return piece

    def _read(self, out: torch.Tensor, start: int) -> None:
        """Fill a contiguous CPU tensor from a place in the file."""
        left = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        while left:
            count = os.preadv(self._file.fileno(), [left], start)
            if not count:
                raise LanceQuantError(f"{self.path} became shorter while it was read: fetch the file again")
            left, start = left[count:], start + count


def _blocks(entry: Entry) -> Iterator[tuple[int, int]]:
    """(first row, rows) of pieces of a tensor; a scalar is one row."""
    total = entry.shape[0] if entry.shape else 1
    if not entry.bytes:
        return
    rows = max(1, PIECE_BYTES // (entry.bytes // total))
    for first in range(0, total, rows):
        yield first, min(rows, total - first)


def _largest_block(entry: Entry) -> int:
    """Bytes."""
    total = entry.shape[0] if entry.shape else 1
    return max((rows * (entry.bytes // total) for _, rows in _blocks(entry)), default=0)


def _pageable(entry: Entry) -> torch.Tensor:
    return torch.empty(_largest_block(entry), dtype=torch.uint8, device="cpu")


def _read_header(file) -> dict[str, Entry]:
    """Name -> entry, sorted by name. Raises ValueError and its like where the bytes are not a whole file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    values = json.loads(file.read(length))
    values.pop("__metadata__", None)
    entries, end = {}, 8 + length
    for name in sorted(values):
        first, last = values[name]["data_offsets"]
        entry = Entry(values[name]["dtype"], tuple(values[name]["shape"]), 8 + length + first)
        if entry.dtype not in DTYPES:
            raise ValueError(f"'{name}' has the unknown dtype {entry.dtype}")
        if last - first != entry.bytes:
            raise ValueError(f"'{name}' spans {last - first} bytes, its shape asks for {entry.bytes}")
        entries[name] = entry
        end = max(end, 8 + length + last)
    if end != size:
        raise ValueError(f"{size} bytes, its header announces {end}")
    return entries
