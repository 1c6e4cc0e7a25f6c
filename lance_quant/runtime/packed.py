"""`PackedFolder`: a folder in the native layout, checked when it is opened, read tensor by tensor."""

import json
from dataclasses import dataclass
from pathlib import Path

from lance_quant.checkpoint.layout import layout_of
from lance_quant.checkpoint.native import META_FILE, NIBBLE_BITS, PART_DTYPE, PARTS, STATE_FILE, part_shapes
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.errors import LanceQuantError


@dataclass(frozen=True)
class PackedWeight:
    """What awq_meta.json says of one linear; shape [O, I]."""

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    scheme: str


class PackedFolder:
    """Context manager. `meta`: awq_meta.json as it is; `weights`: linear name -> PackedWeight; `reader`: the
    tensor file.

    Raises LanceQuantError where a file is missing or unreadable, and where the tensors do not fit what the meta file
    says, naming the first key.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.meta = self._read_meta()
        self.weights = self._read_weights()
        self.reader = TensorReader(self.folder / STATE_FILE)
        self._names = frozenset(self.reader.names())
        for weight in self.weights.values():
            self._check(weight)

    def __enter__(self) -> "PackedFolder":
        self.reader.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.reader.__exit__(*error)

    def _read_meta(self) -> dict:
        path = self.folder / META_FILE
        try:
            meta = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise LanceQuantError(f"{path} is missing: give a folder that holds {STATE_FILE} and {META_FILE}") from None
        except ValueError as error:
            raise LanceQuantError(f"{path} is not JSON ({error}): pack the checkpoint again") from None
        return meta

    def _read_weights(self) -> dict[str, PackedWeight]:
        path = self.folder / META_FILE
        entries = self.meta.get("per_weight") if isinstance(self.meta, dict) else None
        if not isinstance(entries, dict):
            raise LanceQuantError(f"{path}: per_weight is not as the native layout has it: pack the checkpoint again")
        weights = {}
        for key, row in entries.items():
            name = key.removesuffix(".weight")
            try:
                outputs, inputs = row["shape"]
                weight = PackedWeight(name, (outputs, inputs), row["n_bit"], row["group_size"], row["scheme"])
            except (KeyError, TypeError, ValueError) as error:
                raise LanceQuantError(
                    f"{path}: per_weight of '{key}' is not as the native layout has it ({error!r})"
                ) from None
            sizes = (outputs, inputs, weight.bits, weight.group_size)
            whole = all(type(size) is int and size > 0 for size in sizes)  # true and false are ints to isinstance
            if not whole or weight.bits > NIBBLE_BITS or inputs % 2 or inputs % weight.group_size:
                raise LanceQuantError(
                    f"{path}: {name} has n_bit {weight.bits!r} and group_size {weight.group_size!r} over shape "
                    f"{row['shape']}, which is no 4-bit native layout"
                )
            weights[name] = weight
        return weights

    def _check(self, weight: PackedWeight) -> None:
        if f"{weight.name}.weight" in self._names:
            raise LanceQuantError(f"{self.folder / STATE_FILE} holds '{weight.name}.weight' beside its codes")
        shapes = part_shapes(weight.shape, weight.group_size)
        for part in PARTS:
            key = f"{weight.name}.{part}"
            if key not in self._names:
                raise LanceQuantError(f"{self.folder / STATE_FILE} lacks '{key}', which {META_FILE} announces")
            held = (self.reader.dtype(key), self.reader.shape(key))
            if held != (PART_DTYPE[part], shapes[part]):
                raise LanceQuantError(
                    f"{self.folder / STATE_FILE}: '{key}' is {held[0]} {list(held[1])}, but by {META_FILE} it should "
                    f"be {PART_DTYPE[part]} {list(shapes[part])}"
                )

    @property
    def layout(self) -> str:
        """Of the checkpoint that it was packed from, a row of `LAYOUT_TASKS`: its tensors' names are kept."""
        return layout_of(self.reader.names())

    def others(self) -> list[str]:
        """Keys that are no part of a quantized weight: bf16 tensors, biases of quantized linears among them."""
        parts = {f"{name}.{part}" for name in self.weights for part in PARTS}
        return [key for key in self.reader.names() if key not in parts]

    def __contains__(self, key: str) -> bool:
        return key in self._names
