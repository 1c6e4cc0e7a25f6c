"""What a recorded case must hold: settings, shapes and ranges, by the names that `manifest.json` explains.

Everything here raises LanceQuantError with the key in its sentence; the caller knows the case and its file.
"""

from collections.abc import Mapping, Sequence

import torch

from lance_quant.errors import LanceQuantError
from lance_quant.model.positions import BLOCK_MODES

CHANNELS, PATCH = 48, 1176  # of a latent; values of a vision-tower patch
# of the published position table, which the case posembed_2048 samples
FRAME_ROWS, SIDE, TABLE_ROWS = 64 * 64, 64, 31 * 64 * 64
SPLIT_MODES = sorted(BLOCK_MODES | {"causal"})


def _listed(value, fits) -> bool:
    return isinstance(value, list) and all(fits(entry) for entry in value)


def _number(value) -> bool:
    return isinstance(value, int | float)


# What a setting of the manifest must be.
SETTINGS = {
    "path": ("text", lambda value: isinstance(value, str)),
    "split_lens": ("a list of counts", lambda value: _listed(value, lambda n: isinstance(n, int) and n >= 0)),
    "attn_modes": (f"a list of {', '.join(SPLIT_MODES)}", lambda value: _listed(value, SPLIT_MODES.__contains__)),
    "steps": ("a whole number", lambda value: isinstance(value, int)),
    "timestep_shift": ("a number", _number),
    "cfg_text_scale": ("a number", _number),
    "cfg_interval": ("two numbers", lambda value: _listed(value, _number) and len(value) == 2),
    "cfg_renorm_type": ("text or null", lambda value: value is None or isinstance(value, str)),
    "cfg_renorm_min": ("a number", _number),
}

# A name stands for one size throughout a case. What the manifest does not give, the first tensor that has it does.
SHAPES = {
    "in.text_ids": ("tokens",),
    "in.modality": ("tokens",),
    "in.vae_token_indexes": ("latents",),
    "in.mse_indexes": ("denoised",),
    "in.video_sizes_THW": ("blocks", 3),
    "in.rope_grid_thw": (1, "grids", 3),
    "in.vit_grid_thw": ("pictures", 3),
    "in.vit_token_indexes": ("seen",),
    "in.vit_patches": ("patches", PATCH),
    "in.ce_indexes": ("written",),
    "out.vit": ("seen", "hidden"),
    "out.tokens": ("answered",),
    "out.logits": ("answered", "width"),
    "out.x_t": ("steps", "latents", CHANNELS),
    "out.timesteps": ("steps",),
    "out.cfg_on": ("steps",),
    "out.v_cond": ("steps", "rows", CHANNELS),
    "out.v_uncond": ("guided", "rows", CHANNELS),
    "video": (3, "frames", "height", "width"),
    "decoded": (3, "frames", "height", "width"),
    "decoded1": (3, 1, "height", "width"),
    "mu_norm": (CHANNELS, "t", "h", "w"),
    "mu1_norm": (CHANNELS, 1, "h", "w"),
    "image_rgb_uint8": ("height", "width", 3),
    "ids": ("ids",),
    "rows": ("ids", "hidden"),
}

# Tensors of int64 that index something: the least that an entry may be, and the size that it stays below, if one does.
INTEGERS = {
    "in.text_ids": (0, "vocabulary"),
    "in.vae_token_indexes": (0, "tokens"),
    "in.mse_indexes": (0, "tokens"),
    "in.vit_token_indexes": (0, "tokens"),
    "in.ce_indexes": (0, "tokens"),
    "in.video_sizes_THW": (1, None),
    "in.rope_grid_thw": (1, None),
    "in.vit_grid_thw": (1, None),
    "out.tokens": (0, "vocabulary"),
    "ids": (0, "table"),
}


def setting_of(settings: Mapping, key: str):
    """A setting of the manifest: there, and what SETTINGS says."""
    if key not in settings:
        raise LanceQuantError(f"manifest.json gives it no '{key}'")
    what, fits = SETTINGS.get(key, ("", None))
    if fits is not None and not fits(settings[key]):
        raise LanceQuantError(f"'{key}' in manifest.json must be {what}, not {settings[key]!r}")
    return settings[key]


def tensor_of(tensors: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    """A tensor of a case: there."""
    if key not in tensors:
        raise LanceQuantError(f"tensor '{key}' is missing")
    return tensors[key]


def expect_shape(tensor: torch.Tensor, shape: Sequence[int | str], key: str) -> None:
    """The recorded tensor `key` has this shape; a name in it is a size that nothing has given yet, and fits none."""
    if list(tensor.shape) != list(shape):
        wanted = ", ".join(map(str, shape))
        raise LanceQuantError(f"tensor '{key}' has shape {list(tensor.shape)}, not [{wanted}]")


def check_tensors(tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
    """Shapes and ranges of a case's tensors fit each other and the sizes that are known beforehand."""
    known = dict(sizes)
    for key, names in SHAPES.items():
        if key not in tensors:
            continue
        tensor = tensors[key]
        if tensor.ndim == len(names):
            own = {name: size for name, size in zip(names, tensor.shape, strict=True) if isinstance(name, str)}
            known = own | known
        expect_shape(tensor, [known.get(name, name) for name in names], key)
    for key, (least, name) in INTEGERS.items():
        if key in tensors:
            check_range(tensors[key], least, known.get(name), key)


def check_range(tensor: torch.Tensor, least: int, below: int | None, key: str) -> None:
    """The recorded tensor `key` is of int64, and from `least` to less than `below`."""
    if tensor.dtype != torch.int64:
        raise LanceQuantError(f"tensor '{key}' is of {tensor.dtype}, not torch.int64")
    beyond = tensor < least if below is None else (tensor < least) | (tensor >= below)
    if beyond.any():
        span = f"{least} or more" if below is None else f"from {least} to {below - 1}"
        raise LanceQuantError(f"tensor '{key}' holds {int(tensor[beyond][0])}: its entries are {span}")
