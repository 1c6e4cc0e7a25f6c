"""`swap_linears(module, folder)`: turn a Lance, ours or upstream's, filled or on the meta device, into a 4-bit one.

    import lance_quant
    model = build_upstream_model()                          # any module tree with upstream's names
    lance_quant.swap_linears(model, "Lance_3B_INT4", device="cuda")

1. Every key of the folder is held against the module; the first that does not fit is named, and nothing has changed.
2. The quantized linears are replaced by empty `Int4Linear`s, which frees the float weights.
3. Their buffers and every other tensor of the folder are read: its norms carry the folded scales, so that a model with
   norms of its own would compute nonsense.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lance_quant.checkpoint.fill import check_keys, set_parameter
from lance_quant.checkpoint.layout import POSITION_TABLE
from lance_quant.checkpoint.native import PARTS, STATE_FILE
from lance_quant.errors import LanceQuantError
from lance_quant.runtime.backends import reserve
from lance_quant.runtime.int4_linear import Int4Linear
from lance_quant.runtime.packed import PackedFolder, PackedWeight
from lance_quant.runtime.selection import Int4Config


def swap_linears(
    module: nn.Module,
    folder: str | Path,
    device: torch.device | str | None = None,
    config: Int4Config | None = None,
) -> nn.Module:
    """Make `module` the model of a packed folder, in place; parameters that the folder lacks stay as they are.

    device: for what is on the meta device, by default where the rest of the module is. What is filled stays on its
    device and keeps its dtype. Raises LanceQuantError for the first key that does not fit, before anything changes.
    """
    with PackedFolder(Path(folder)) as packed:
        own = dict(module.named_parameters())
        check_linears(module, packed)
        others = other_keys(packed)
        for key in others:
            if key not in own:
                raise LanceQuantError(
                    f"{packed.folder} holds '{key}', which the model lacks: it is of another checkpoint"
                )
            check_shape(packed, key, own[key])
        _fill(module, packed, others, device or _device_of(module), None)
    prepare(module, config or Int4Config())
    return module


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
        check_linears(module, packed)
        linears = {f"{name}.{leaf}" for name in packed.weights for leaf in ("weight", "bias")}
        wanted = {
            name: parameter
            for name, parameter in module.named_parameters()
            if not name.startswith(tuple(elsewhere)) and name not in linears
        }
        check_keys(packed.folder / STATE_FILE, wanted, other_keys(packed))
        for key, parameter in wanted.items():
            check_shape(packed, key, parameter)
        _fill(module, packed, list(wanted), device, dtype)


def prepare(module: nn.Module, config: Int4Config) -> None:
    """Settle how the packed linears of a filled module multiply: backend, order of the codes, kept bf16 weights."""
    linears = {name: child for name, child in module.named_modules() if isinstance(child, Int4Linear)}
    for linear in linears.values():
        linear.backend = None if config.backend == "auto" else config.backend
        if linear.qweight.device.type == "cpu" and config.backend in ("auto", "cpu_int4"):
            linear.to_cpu_layout()
        if linear.qweight.is_cuda:
            reserve(linear.qweight.device)
    left = config.resident_gb * 1e9
    for linear in sorted(linears, key=lambda name: ("_moe_gen" not in name, -linears[name].qweight.numel())):
        size = 4 * linears[linear].qweight.numel()  # denoising gains most: the generation path first, large ones first
        if size <= left:
            linears[linear].keep_dense()
            left -= size


def other_keys(packed: PackedFolder) -> list[str]:
    """What the folder holds beside its quantized linears and the position table."""
    biases = {f"{name}.bias" for name in packed.weights}
    return [key for key in packed.others() if key not in biases and key != POSITION_TABLE]


def _fill(module: nn.Module, packed: PackedFolder, keys: Sequence[str], device, dtype: torch.dtype | None) -> None:
    """Swap, then read all; dtype None: what is there is filled where it is, the rest is made in bf16."""
    outs: dict[str, Tensor] = {}
    own = dict(module.named_parameters())
    for weight in packed.weights.values():
        outs |= _swap(module, weight, device)
    for key in keys:
        held = own[key]
        if dtype is None and not held.is_meta:
            outs[key] = held.detach()
        else:
            outs[key] = torch.empty(held.shape, dtype=dtype or torch.bfloat16, device=device)
            set_parameter(module, key, outs[key])
    packed.reader.read_all(outs)


def _swap(module: nn.Module, weight: PackedWeight, device) -> dict[str, Tensor]:
    """Put an empty Int4Linear in a linear's place, on its device; key -> buffer to fill."""
    parent, _, leaf = weight.name.rpartition(".")
    parent = module.get_submodule(parent)
    old = getattr(parent, leaf)
    has_bias = old.bias is not None
    linear = Int4Linear(weight.shape, weight.group_size, has_bias, device=device)
    setattr(parent, leaf, linear)
    return {f"{weight.name}.{part}": getattr(linear, part) for part in ((*PARTS, "bias") if has_bias else PARTS)}


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def check_shape(packed: PackedFolder, key: str, parameter: Tensor) -> None:
    held = packed.reader.shape(key)
    if held != tuple(parameter.shape):
        raise LanceQuantError(f"{packed.folder}: '{key}' is {list(held)}, but the model's is {list(parameter.shape)}")


def check_linears(module: nn.Module, packed: PackedFolder) -> None:
    """Raise LanceQuantError for the first quantized linear that is not one of the module's."""
    for weight in packed.weights.values():
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
        if linear.bias is not None:
            check_shape(packed, f"{weight.name}.bias", linear.bias)
