"""Fill a module built on the meta device from a safetensors file: strict, a few tensors at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lance_quant.checkpoint.layout import POSITION_TABLE
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.errors import LanceQuantError


def fill(module: nn.Module, path: Path, device, dtype: torch.dtype, elsewhere: Sequence[str] = ()) -> None:
    """Replace every parameter of `module` by the file's tensor in `dtype` on `device`.

    elsewhere: prefixes of parameters that another file holds. Raises LanceQuantError where the file's keys are not
    exactly the module's (the latent position table aside) or a shape differs.
    """
    wanted = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        if not name.startswith(tuple(elsewhere))
    }
    with TensorReader(path) as reader:
        check_keys(path, wanted, reader.names())
        values = {name: torch.empty(shape, device=device, dtype=dtype) for name, shape in wanted.items()}
        reader.read_all(values)
        for name, value in values.items():
            set_parameter(module, name, value)


def check_keys(path: Path, wanted, names: Sequence[str]) -> None:
    """Raise LanceQuantError unless a file's tensor names are exactly the wanted ones, the position table aside."""
    present = set(names)
    missing = [name for name in wanted if name not in present]
    unexpected = sorted(present - set(wanted) - {POSITION_TABLE})
    for what, found in (("lacks", missing), ("holds the unknown", unexpected)):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise LanceQuantError(f"{path} {what} tensor '{found[0]}'{more}: it is not what its config describes")


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor where a dotted parameter name points."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
