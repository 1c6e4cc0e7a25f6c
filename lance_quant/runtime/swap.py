"""`load_packed(module, folder)`: turn a Lance into a 4-bit one, by name, on the meta device or filled.

`swap_linears` replaces the quantized linears alone. The folder's norms carry the folded scales, so a model is right
only once the other tensors are filled from the same folder too: `load_packed` does both.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lance_quant.checkpoint.fill import check_keys, set_parameter
from lance_quant.checkpoint.native import PARTS, STATE_FILE
from lance_quant.errors import LanceQuantError
from lance_quant.runtime.int4_linear import Int4Linear
from lance_quant.runtime.packed import PackedFolder, PackedWeight


def swap_linears(module: nn.Module, packed: PackedFolder, device: torch.device | str = "cpu") -> None:
    """Replace every linear that `packed` quantizes by a filled Int4Linear on `device`.

    Checks all of them before it replaces the first. Raises LanceQuantError naming the first that does not fit.
    """
    for weight in packed.weights.values():
        check_linear(module, weight, packed)
    for weight in packed.weights.values():
        parent, leaf = parent_and_leaf(module, weight.name)
        has_bias = getattr(parent, leaf).bias is not None
        linear = Int4Linear(weight.shape, weight.group_size, has_bias, device="meta")
        for part in (*PARTS, "bias") if has_bias else PARTS:
            setattr(linear, part, packed.reader.read(f"{weight.name}.{part}").to(device, copy=True))
        setattr(parent, leaf, linear)


def load_packed(
    module: nn.Module,
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    elsewhere: Sequence[str] = (),
) -> None:
    """Swap the quantized linears in and fill every other parameter, strictly, as `dtype` on `device`.

    elsewhere: prefixes of keys that are filled from another file (the image model's "vit_model."). The folder's
    position table is ignored: the model computes its own. Raises LanceQuantError for the first missing, unexpected or
    misshapen key.
    """
    with PackedFolder(folder) as packed:
        swap_linears(module, packed, device)
        wanted = {
            name: tuple(parameter.shape)
            for name, parameter in module.named_parameters()
            if not name.startswith(tuple(elsewhere))
        }
        biases = {f"{name}.bias" for name in packed.weights}
        check_keys(packed.folder / STATE_FILE, wanted, [key for key in packed.others() if key not in biases])
        for name, shape in wanted.items():
            set_parameter(module, name, packed.reader.read_into(name, torch.empty(shape, dtype=dtype, device=device)))


def parent_and_leaf(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return module.get_submodule(parent), leaf


def check_linear(module: nn.Module, weight: PackedWeight, packed: PackedFolder) -> None:
    try:
        linear = module.get_submodule(weight.name)
    except AttributeError:
        raise LanceQuantError(
            f"{packed.folder} quantizes '{weight.name}', which the model lacks: it is of another checkpoint"
        ) from None
    if not isinstance(linear, nn.Linear):
        kind = type(linear).__name__
        raise LanceQuantError(f"'{weight.name}' in the model is a {kind}, not a linear: swap it only once")
    shape = (linear.out_features, linear.in_features)
    if shape != weight.shape:
        raise LanceQuantError(
            f"{packed.folder}: '{weight.name}' is {list(weight.shape)}, but the model's linear is {list(shape)}"
        )
    if (linear.bias is not None) != (f"{weight.name}.bias" in packed):
        raise LanceQuantError(
            f"{packed.folder}: '{weight.name}.bias' is "
            f"{'missing' if linear.bias is not None else 'there, but the model has none'}"
        )
