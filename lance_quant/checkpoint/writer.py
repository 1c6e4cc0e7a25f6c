"""`TensorWriter`: a safetensors file written tensor by tensor, never held in memory.

    with TensorWriter(path, specs) as writer:
        for spec in writer.specs:
            writer.write(spec.name, tensor)

The header is computed from names, dtypes and shapes before the first byte of data, so tensors follow in that order. A
large one may come in pieces along its first dimension. The file appears under its name only when it is whole and on
disk.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from lance_quant.errors import LanceQuantError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8, "I32": torch.int32}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file to be: key, safetensors dtype name (a key of `DTYPES`), shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorWriter:
    """Writes `specs` to `path`, widest dtype first (so that every tensor is aligned), otherwise in the order given.

    Raises LanceQuantError for a tensor out of turn, of another dtype or shape, or missing at the end; the unfinished
    file is removed on any error.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None):
        self.path = Path(path)
        self.specs = sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize)
        self._metadata = metadata or {"format": "pt"}
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._at = 0  # index of the tensor whose turn it is
        self._rows = 0  # rows of it that are written

    def __enter__(self) -> "TensorWriter":
        header = self._header()
        self._file = self._partial.open("wb")
        self._file.write(header)
        return self

    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": self._metadata}
        offset = 0
        for spec in self.specs:
            if spec.name in entries:
                raise LanceQuantError(f"tensor {spec.name} is listed twice for {self.path}")
            offsets = [offset, offset + spec.bytes]
            entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
            offset += spec.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a whole tensor, or its next rows along dimension 0."""
        if self._at == len(self.specs):
            raise LanceQuantError(f"{self.path} is complete; tensor {name} is one too many")
        spec = self.specs[self._at]
        if name != spec.name:
            raise LanceQuantError(f"{self.path} expects tensor {spec.name} next, not {name}")
        rows = tensor.shape[0] if tensor.dim() else 1
        fits = tensor.dtype == DTYPES[spec.dtype] and tuple(tensor.shape[1:]) == spec.shape[1:]
        total = spec.shape[0] if spec.shape else 1
        if not fits or tensor.dim() != len(spec.shape) or self._rows + rows > total:
            raise LanceQuantError(
                f"tensor {name} for {self.path} is {tensor.dtype} {list(tensor.shape)} at row {self._rows}, "
                f"which does not fit its entry {spec.dtype} {list(spec.shape)}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(memoryview(flat.numpy()))
        self._rows += rows
        if self._rows == total:
            self._at, self._rows = self._at + 1, 0

    def __exit__(self, error_type: type | None, *_: object) -> None:
        try:
            if error_type is None and self._at < len(self.specs):
                spec = self.specs[self._at]
                raise LanceQuantError(f"tensor {spec.name} was not written to {self.path} ({self._rows} rows came)")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if error_type is None:
                os.replace(self._partial, self.path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)
