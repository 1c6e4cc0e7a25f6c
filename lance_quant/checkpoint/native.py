"""The native 4-bit layout: `awq_state_dict.safetensors`, `awq_meta.json`, `README.md` in one folder.

Per quantized linear, O outputs, I inputs, groups of G inputs: `qweight` uint8 [O, I/2], the even input's code in the
low nibble; `scales` bf16 [O, I/G]; `zeros` uint8 [O, I/G]. Weight = (code - zero) * scale. All else is bf16 under its
own name. 3-bit codes lie in the same nibbles. Existing loaders and public checkpoints use this layout: add fields,
remove none.
"""

from collections.abc import Iterable, Mapping

import torch

from lance_quant.checkpoint.writer import TensorSpec

STATE_FILE = "awq_state_dict.safetensors"
META_FILE = "awq_meta.json"
PARTS = ("qweight", "scales", "zeros")
PART_DTYPE = {"qweight": "U8", "scales": "BF16", "zeros": "U8"}

FOLDED = "asym_int4_grouped_awq"  # a scale is folded in; also the name of the layout as a whole
PLAIN = "asym_int4_grouped_minmax"  # no scale
UNSEEN = "asym_int4_grouped_no_awq"  # a scale was wanted, but calibration saw no token there
NIBBLE_BITS = 4


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0..15 [O, I] -> uint8 [O, I/2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(qweight: torch.Tensor) -> torch.Tensor:
    """uint8 [O, I/2] -> uint8 codes 0..15 [O, I]."""
    return torch.stack((qweight & 15, qweight >> 4), dim=-1).flatten(-2)


def part_shapes(shape: tuple[int, int], group_size: int) -> dict[str, tuple[int, int]]:
    """Shapes of the three parts of a linear of `shape` [O, I]."""
    outputs, inputs = shape
    groups = inputs // group_size
    return {"qweight": (outputs, inputs // 2), "scales": (outputs, groups), "zeros": (outputs, groups)}


def packed_specs(source: Iterable[tuple[str, tuple[int, ...]]], group_sizes: Mapping[str, int]) -> list[TensorSpec]:
    """A packed file's tensors: the source's (key, shape) pairs, each weight of `group_sizes` (linear -> G) in parts."""
    specs = []
    for key, shape in source:
        name = key.removesuffix(".weight")
        if key.endswith(".weight") and name in group_sizes:
            parts = part_shapes(shape, group_sizes[name])
            specs += [TensorSpec(f"{name}.{part}", PART_DTYPE[part], parts[part]) for part in PARTS]
        else:
            specs.append(TensorSpec(key, "BF16", tuple(shape)))
    return specs
