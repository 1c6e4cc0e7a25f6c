"""The 4-bit Lance of a packed folder, ready to run.

lance = load_packed_lance(open_checkpoint(cfg), Path("artifacts/report/<key>/model"), "cuda")
"""

from pathlib import Path

import torch

from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.errors import LanceQuantError
from lance_quant.model.lance import Lance, build_lance, complete, separate_parts
from lance_quant.runtime.packed import PackedFolder
from lance_quant.runtime.selection import Int4Config
from lance_quant.runtime.swap import load_packed, prepare

CHOICES = {"image": "tiny or image", "video": "tiny_video or video", "text": "text"}  # of conf/checkpoint/, by layout


def load_packed_lance(checkpoint: Checkpoint, packed: Path, device: str, config: Int4Config | None = None) -> Lance:
    """Int4 linears, everything else bf16; never built in bf16 first. `checkpoint` gives sizes and the vision tower.

    Raises LanceQuantError where the folder does not fit the checkpoint.
    """
    check_layout(checkpoint, packed)
    lance = build_lance(checkpoint, torch.bfloat16)
    load_packed(lance, packed, device, elsewhere=separate_parts(checkpoint))
    prepare(lance, config or Int4Config())
    return complete(lance, checkpoint, device, torch.bfloat16)


def check_layout(checkpoint: Checkpoint, packed: Path) -> None:
    """Raises LanceQuantError for a folder packed from another layout than the checkpoint's."""
    with PackedFolder(packed) as folder:
        layout = folder.layout
    if layout != checkpoint.layout:
        raise LanceQuantError(
            f"{packed} was packed from the {layout} layout, but checkpoint {checkpoint.name} is of the "
            f"{checkpoint.layout} layout: take the one it was packed from (checkpoint={CHOICES[layout]}), or weights "
            f"packed from {checkpoint.name}"
        )
