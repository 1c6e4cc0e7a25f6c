"""The vision tower: `transformers`' Qwen2.5-VL tower, built without memory and filled by our own reader.

Its attention is ours: windows of one length run as one batch (Lance spec sec. 7), where the library's would launch a
kernel for each of a clip's two thousand windows, 28 layers long, and ask the device for their lengths in each.
"""

import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

# nothing here is ever fetched from a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROPE_THETA = 10000.0


def build_vision_tower(vision_config: dict, dtype: torch.dtype) -> nn.Module:
    """`Qwen2_5_VisionTransformerPretrainedModel` with its parameters on the meta device (Lance spec sec. 7).

    Call it with `patches [P, 1176]` and `grid_thw=[n, 3]`; merged tokens [P / 4, H] are `.pooler_output`. Its rotary
    frequencies are in `dtype`, as upstream's `.to(bfloat16)` leaves them (quirk Q6).
    """
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    known = {name: value for name, value in vision_config.items() if name not in ("model_type", "architectures")}
    config = Qwen2_5_VLVisionConfig(**known)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel(config)
    # a meta build leaves the one computed buffer empty: half of each head turns with height, half with width
    width = config.hidden_size // config.num_heads // 2
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    for module in tower.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.shape != frequencies.shape:
                raise RuntimeError(f"this transformers release holds an unknown buffer '{name}' in its vision tower")
            setattr(module, name, frequencies.to(dtype))
    plans = Plans()
    for block in tower.blocks:
        block.attn.__class__ = _windowed()
        block.attn.plans = plans
    return tower.eval()


class Plans:
    """Window boundaries -> rows by window length, asked of the device once a call and kept for all layers.

    A tower hands the same two tensors, of its windows and of its whole frames, to all of its layers.
    """

    def __init__(self) -> None:
        self._known: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def of(self, boundaries: torch.Tensor) -> list[torch.Tensor]:
        """Boundaries [windows + 1] -> for each length that occurs, its windows' rows int64 [n, length]."""
        for seen, rows in self._known:
            if seen is boundaries:
                return rows
        rows = rows_by_length(boundaries.tolist(), boundaries.device)
        self._known = [*self._known[-1:], (boundaries, rows)]
        return rows


def rows_by_length(boundaries: list[int], device) -> list[torch.Tensor]:
    """For each window length, the rows of its windows int64 [n, length]; shortest first."""
    starts: dict[int, list[int]] = {}
    for start, end in zip(boundaries, boundaries[1:], strict=False):
        if end > start:
            starts.setdefault(end - start, []).append(start)
    return [
        torch.tensor(starts[length], device=device)[:, None] + torch.arange(length, device=device)
        for length in sorted(starts)
    ]


@cache
def _windowed() -> type[nn.Module]:
    """The library's attention with another forward; a function, since the library takes seconds to import."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as library

    class WindowedAttention(library.Qwen2_5_VLVisionAttention):
        def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **_) -> torch.Tensor:
            """hidden_states [P, H] in windows of rows cu_seqlens [n + 1] -> [P, H]."""
            count = len(hidden_states)
            q, k, v = self.qkv(hidden_states).view(count, 3, self.num_heads, -1).unbind(1)
            q, k = library.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
            return self.proj(by_windows(q, k, v, self.plans.of(cu_seqlens), self.scaling).flatten(1))

    return WindowedAttention


def by_windows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, windows: list[torch.Tensor], scale: float
) -> torch.Tensor:
    """Attention of q, k, v [P, heads, d] inside windows, rows int64 [n, length] a length -> [P, heads, d]."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for rows in windows:
        alone = len(windows) == 1  # then the windows tile the rows in order, and nothing need be gathered
        parts = (part.unflatten(0, rows.shape) if alone else part[rows] for part in (q, k, v))
        seen = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts), scale=scale).transpose(1, 2)
        if alone:
            return seen.flatten(0, 1)
        out[rows] = seen
    return out
