"""`TensorReader`: one safetensors file, read tensor by tensor or piece by piece, never as a whole."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lance_quant.errors import LanceQuantError

PIECE_BYTES = 64 * 2**20  # a 1.2 GB embedding is cast in pieces of this size: the peak stays near the result's size


class TensorReader:
    """Context manager over the tensors of a safetensors file.

    Raises LanceQuantError where the file is missing, truncated or is not safetensors, and where a tensor is asked for
    that it does not hold.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self._file = safe_open(str(self.path), framework="pt")
        except FileNotFoundError:
            raise LanceQuantError(f"{self.path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise LanceQuantError(
                f"{self.path} is truncated or not a safetensors file ({error}): fetch the file again"
            ) from None
        self._names = list(self._file.keys())
        self._known = frozenset(self._names)

    def __enter__(self) -> "TensorReader":
        self._file.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._file.__exit__(*exception)

    def names(self) -> list[str]:
        return self._names

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def _slice(self, name: str):
        if name not in self._known:
            raise LanceQuantError(f"{self.path} lacks the tensor '{name}'")
        return self._file.get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The file's own word: "F32", "BF16", "U8", ..."""
        return self._slice(name).get_dtype()

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in the file's dtype."""
        if name not in self._known:
            raise LanceQuantError(f"{self.path} lacks the tensor '{name}'")
        return self._file.get_tensor(name)

    def read_into(self, name: str, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` (any device, any dtype) with the tensor, cast in pieces of rows; shapes must agree."""
        view = self._slice(name)
        shape = tuple(view.get_shape())
        if shape != tuple(out.shape):
            raise LanceQuantError(f"{self.path}: '{name}' is {list(shape)}, the config asks for {list(out.shape)}")
        if not shape:
            return out.copy_(self.read(name))
        rows = max(1, PIECE_BYTES // max(1, 4 * out[0].numel()))
        for start in range(0, shape[0], rows):
            out[start : start + rows].copy_(view[start : start + rows])
        return out
