"""The 4-bit Lance of a packed folder, ready to run.

lance = load_packed_lance(open_checkpoint(cfg), Path("artifacts/report/<key>/model"), "cuda")
"""

from pathlib import Path

import torch

from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.model.lance import Lance, build_lance, complete, separate_parts
from lance_quant.runtime.selection import Int4Config
from lance_quant.runtime.swap import load_packed, prepare


def load_packed_lance(checkpoint: Checkpoint, packed: Path, device: str, config: Int4Config | None = None) -> Lance:
    """Int4 linears, everything else bf16; never built in bf16 first. `checkpoint` gives sizes and the vision tower.

    Raises LanceQuantError where the folder does not fit the checkpoint.
    """
    lance = build_lance(checkpoint, torch.bfloat16)
    load_packed(lance, packed, device, elsewhere=separate_parts(checkpoint))
    prepare(lance, config or Int4Config())
    return complete(lance, checkpoint, device, torch.bfloat16)
