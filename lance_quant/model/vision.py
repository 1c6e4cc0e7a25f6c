"""The vision tower: `transformers`' Qwen2.5-VL tower, built without memory and filled by our own reader."""

import os

import torch
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
    return tower.eval()
