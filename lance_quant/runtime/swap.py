"""`swap_linears(module, folder)`: turn a Lance, ours or upstream's, filled or on the meta device, into a 4-bit one.

    import lance_quant
    model = build_upstream_model()                          # any module tree with upstream's names
    lance_quant.swap_linears(model, "Lance_3B_INT4", device="cuda")

1. Every key of the folder is held against the module, and every parameter of the module's decoder layers against the
   folder; the first that does not fit is named, and nothing has changed.
2. The quantized linears are replaced by empty `Int4Linear`s, which frees the float weights.
3. Their buffers and every other tensor of the folder are read: its norms carry the folded scales, so that a model with
   norms of its own would compute nonsense.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lance_quant.checkpoint.fill import check_keys, set_parameter
from lance_quant.checkpoint.layout import POSITION_TABLE, layer_prefix
from lance_quant.checkpoint.native import PARTS, STATE_FILE
from lance_quant.devices import choose_device
from lance_quant.errors import LanceQuantError
from lance_quant.runtime.backends import reserve
from lance_quant.runtime.fused import FusedDecoder
from lance_quant.runtime.int4_linear import Int4Linear
from lance_quant.runtime.packed import PackedFolder, PackedWeight
from lance_quant.runtime.selection import Int4Config

LAYERS = layer_prefix(0).removesuffix("0.")


def swap_linears(
    module: nn.Module,
    folder: str | Path,
    device: torch.device | str | None = None,
    config: Int4Config | None = None,
) -> nn.Module:
    """Make `module` the model of a packed folder, in place; beside the decoder's layers, what the folder lacks stays.

    device: where all of the module goes but what stays on the meta device: auto, cpu, cuda or cuda:1. None: what is
    filled stays on its device, the rest is made where the first filled parameter is, or on the CPU. What is filled
    keeps its dtype. Raises LanceQuantError for a device that is not there and for the first key that does not fit,
    before anything changes.
    """
    device = device if device is None else choose_device(str(device))
    with PackedFolder(Path(folder)) as packed:
        _fill(module, packed, keys_of(module, packed), device, None)
    if device is not None:
        move(module, device)
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
            check_tensor(packed, key, parameter)
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


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def keys_of(module: nn.Module, packed: PackedFolder) -> list[str]:
    """What is to be read beside the quantized linears, all of it checked as `swap_linears` says."""
    check_linears(module, packed)
    own, others = tensors_of(module), other_keys(packed)
    for key in others:
        if key not in own:
            raise LanceQuantError(f"{packed.folder} holds '{key}', which the model lacks: it is of another checkpoint")
        check_tensor(packed, key, own[key])
    check_layers(module, packed)
    return [*others, POSITION_TABLE] if takes_table(packed, own) else others


def takes_table(packed: PackedFolder, own: dict[str, Tensor]) -> bool:
    """Whether the folder's position table is to be read: a filled model has computed its own, whatever its rows."""
    held = own.get(POSITION_TABLE)
    if held is None or not held.is_meta or POSITION_TABLE not in packed:
        return False
    rows = packed.reader.shape(POSITION_TABLE)[:1]  # an image model's file holds the first frame's alone, all it reads
    check_tensor(packed, POSITION_TABLE, held.new_empty((*rows, *held.shape[1:])))
    return True


def _fill(module: nn.Module, packed: PackedFolder, keys: Sequence[str], device, dtype: torch.dtype | None) -> None:
    """Swap, then read all; dtype None: what is there is filled where it is, the rest is made in bf16.

    device None: as `swap_linears` says.
    """
    outs: dict[str, Tensor] = {}
    tensors = tensors_of(module)
    home = device or next((held.device for held in tensors.values() if not held.is_meta), torch.device("cpu"))
    own = {key: tensors[key] for key in keys}
    del tensors  # which would keep the float weights
    for weight in packed.weights.values():
        outs |= _swap(module, weight, device, home)
    for key in keys:
        held = own[key]
        if dtype is None and not held.is_meta:
            outs[key] = held.detach()
        else:
            outs[key] = torch.empty(packed.reader.shape(key), dtype=dtype or torch.bfloat16, device=home)
            _put(module, key, outs[key])
    packed.reader.read_all(outs)


def _swap(module: nn.Module, weight: PackedWeight, device, home) -> dict[str, Tensor]:
    """Put an empty Int4Linear in a linear's place, on `device`, else its own, else `home`; key -> buffer to fill."""
    parent, _, leaf = weight.name.rpartition(".")
    parent = module.get_submodule(parent)
    old = getattr(parent, leaf)
    has_bias = old.bias is not None
    at = home if device or old.weight.is_meta else old.weight.device
    linear = Int4Linear(weight.shape, weight.group_size, has_bias, device=at)
    setattr(parent, leaf, linear)
    return {f"{weight.name}.{part}": getattr(linear, part) for part in ((*PARTS, "bias") if has_bias else PARTS)}


def _put(module: nn.Module, key: str, value: Tensor) -> None:
    """In a parameter's or a buffer's place."""
    owner, _, leaf = key.rpartition(".")
    owner = module.get_submodule(owner)
    if leaf in dict(owner.named_buffers()):
        setattr(owner, leaf, value)
    else:
        set_parameter(module, key, value)


def move(module: nn.Module, device: torch.device | str) -> None:
    """Everything but what is on the meta device, where there is nothing to move."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def check_tensor(packed: PackedFolder, key: str, held: Tensor) -> None:
    """Raise LanceQuantError unless the folder's tensor is bf16, as the layout has it, and of the model's shape."""
    dtype, shape = packed.reader.dtype(key), packed.reader.shape(key)
    if shape != tuple(held.shape):
        raise LanceQuantError(f"{packed.folder}: '{key}' is {list(shape)}, but the model's is {list(held.shape)}")
    if dtype != "BF16":
        raise LanceQuantError(f"{packed.folder}: '{key}' is {dtype}, but in the native layout it is BF16")


def check_layers(module: nn.Module, packed: PackedFolder) -> None:
    """Raise LanceQuantError for the first parameter of the decoder's layers that the folder lacks.

    Scales are folded between linears and norms: layers of which one part is the folder's and another the model's own
    compute nonsense.
    """
    for key, _ in module.named_parameters():
        if key.startswith(LAYERS) and key not in packed and key.removesuffix(".weight") not in packed.weights:
            raise LanceQuantError(
                f"{packed.folder} lacks '{key}', which the model's layers have: it is of another checkpoint"
            )


def check_linears(module: nn.Module, packed: PackedFolder) -> None:
    """Raise LanceQuantError for the first quantized linear that is not one of the module's."""
    if any(isinstance(child, FusedDecoder) for child in module.modules()):
        raise LanceQuantError("the model is accelerated already, its linears are fused: swap them before accelerate()")
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
            check_tensor(packed, f"{weight.name}.bias", linear.bias)
