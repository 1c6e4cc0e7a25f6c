"""The Wan 2.2 VAE: `diffusers`' AutoencoderKLWan under upstream's key names (Lance spec sec. 15 and 22)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lance_quant.errors import LanceQuantError
from lance_quant.model.vae_layers import lean

# Per-channel statistics of the published VAE's latents; the model works on (mean - MEAN) / STD (Lance spec sec. 15).
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
TABLES = (LATENT_MEAN, LATENT_STD)

TILED_LATENTS = 2304  # a frame's: 768 x 768 pixels; four such frames decode in a few GB beside a 14 GB model
TILE, TILE_STRIDE = 512, 384  # pixels

# upstream -> diffusers, applied in order (Lance spec sec. 22). `{half}` is encoder or decoder.
KEY_RULES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)", r"encoder.down_blocks.\1.downsampler.\2"),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)", r"decoder.up_blocks.\1.upsampler.\2"),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def diffusers_key(key: str) -> str:
    """Upstream's name of a VAE tensor -> diffusers'."""
    for pattern, replacement in KEY_RULES:
        key = re.sub(pattern, replacement, key)
    return key


# diffusers -> upstream, the same table read backwards: first the start of a name, then what follows in a residual block
OUTER_NAMES = (
    ("post_quant_conv.", "conv2."),
    ("quant_conv.", "conv1."),
    ("conv_in.", "conv1."),
    ("norm_out.", "head.0."),
    ("conv_out.", "head.2."),
    ("mid_block.resnets.0.", "middle.0."),
    ("mid_block.attentions.0.", "middle.1."),
    ("mid_block.resnets.1.", "middle.2."),
)
BLOCK_NAMES = (
    ("norm1.", "residual.0."),
    ("conv1.", "residual.2."),
    ("norm2.", "residual.3."),
    ("conv2.", "residual.6."),
    ("conv_shortcut.", "shortcut."),
)
STAGES = {"down_blocks": ("downsamples", 2), "up_blocks": ("upsamples", 3)}  # residual blocks before the resampling


def upstream_key(key: str) -> str:
    """diffusers' name of a VAE tensor -> upstream's, the inverse of `diffusers_key`."""
    half, _, rest = key.partition(".")
    if half not in ("encoder", "decoder"):
        return _renamed(key, OUTER_NAMES)
    stage = rest.split(".")[0]
    if stage in STAGES:
        inner, resampling = STAGES[stage]
        _, index, kind, rest = rest.split(".", 3)
        place, rest = rest.split(".", 1) if kind == "resnets" else (resampling, rest)
        return f"{half}.{inner}.{index}.{inner}.{place}.{_renamed(rest, BLOCK_NAMES)}"
    name = _renamed(rest, OUTER_NAMES)
    block, leaf = name[:9], name[9:]
    return f"{half}.{block}{_renamed(leaf, BLOCK_NAMES)}" if block in ("middle.0.", "middle.2.") else f"{half}.{name}"


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for start, other in table:
        if name.startswith(start):
            return other + name.removeprefix(start)
    return name


def build_vae(base: int, decoder_base: int, latent_channels: int = 48) -> nn.Module:
    """AutoencoderKLWan of the Wan 2.2 shape: 16x in space, 4x in time, causal; random weights."""
    from diffusers import AutoencoderKLWan

    autoencoder = AutoencoderKLWan(
        base_dim=base,
        decoder_base_dim=decoder_base,
        z_dim=latent_channels,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=list(LATENT_MEAN),
        latents_std=list(LATENT_STD),
    )
    return lean(autoencoder)


class WanVAE(nn.Module):
    """Pixels <-> normalised latents, channels last, in the autoencoder's own dtype.

    Encoding takes the posterior mean: upstream samples in a space that it does not rescale (quirk Q9). faithful: a
    bfloat16 autoencoder has upstream's rounded constants, which are off by up to 0.58 % (Lance spec sec. 15); off, and
    in float32, the table as it is.
    """

    def __init__(self, autoencoder: nn.Module, faithful: bool = True):
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.faithful = faithful

    @property
    def _place(self) -> dict:
        weight = self.autoencoder.quant_conv.weight
        return {"device": weight.device, "dtype": weight.dtype}

    def _constants(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [1, 48, 1, 1, 1], float32; or mean and 1 / std as upstream holds them."""
        place = self._place
        mean, std = (torch.tensor(values, device=place["device"]).view(1, -1, 1, 1, 1) for values in TABLES)
        if not self._rounds:
            return mean, std
        return mean.to(torch.bfloat16), (1 / std.to(torch.bfloat16)).to(torch.bfloat16)

    @property
    def _rounds(self) -> bool:
        return self.faithful and self._place["dtype"] == torch.bfloat16

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [3, T, H, W] in [-1, 1], H and W multiples of 16 -> float32 [t, h, w, 48], t = 1 + (T - 1) // 4."""
        raw = self.autoencoder.encode(pixels[None].to(**self._place)).latent_dist.mean
        mean, scale = self._constants()
        latents = ((raw - mean) * scale).float() if self._rounds else (raw.float() - mean) / scale
        return latents[0].permute(1, 2, 3, 0)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [t, h, w, 48] -> float32 pixels [3, 1 + 4 * (t - 1), 16 h, 16 w], clamped to [-1, 1]."""
        t, h, w, _ = latents.shape
        out = torch.empty(3, 1 + 4 * (t - 1), 16 * h, 16 * w, device=self._place["device"])
        start = 0
        for piece in self.pieces(latents):
            out[:, start : start + piece.shape[1]] = piece
            start += piece.shape[1]
        return out

    @torch.inference_mode()
    def decode_frames(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [t, h, w, 48] -> uint8 frames [1 + 4 * (t - 1), 16 h, 16 w, 3] on the CPU, a few at a time."""
        return torch.cat([to_uint8(piece).cpu() for piece in self.pieces(latents)])

    @torch.inference_mode()
    def pieces(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """What `decode` returns in pieces along time: one frame, then four a latent; all at once where it is tiled.

        Tiles, whose seams are blended, are taken for clips of more than TILED_LATENTS latents a frame alone.
        """
        mean, scale = self._constants()
        z = latents.to(mean).permute(3, 0, 1, 2)[None]
        z = (z / scale + mean if self._rounds else z * scale + mean).to(**self._place)
        t, h, w = z.shape[2:]
        if t > 1 and h * w > TILED_LATENTS:
            yield self._tiled(z)
            return
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        model = self.autoencoder
        model.clear_cache()  # of what each causal convolution saw last
        try:
            x = model.post_quant_conv(z)
            if t == 1:  # no frame follows: none is kept for it
                yield unpatchify(model.decoder(x, first_chunk=True), model.config.patch_size)[0].float().clamp(-1, 1)
                return
            for index in range(t):
                piece = model.decoder(
                    x[:, :, index : index + 1], feat_cache=model._feat_map, feat_idx=[0], first_chunk=index == 0
                )
                yield unpatchify(piece, model.config.patch_size)[0].float().clamp(-1, 1)
        finally:
            model.clear_cache()

    def _tiled(self, z: torch.Tensor) -> torch.Tensor:
        self.autoencoder.enable_tiling(TILE, TILE, TILE_STRIDE, TILE_STRIDE)
        try:
            return self.autoencoder.decode(z).sample[0].float()
        finally:
            self.autoencoder.disable_tiling()


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """[3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3] (Lance spec sec. 15)."""
    frames = [((frame / 2 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8) for frame in pixels.unbind(1)]
    return torch.stack(frames).permute(0, 2, 3, 1)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of `Wan2.2_VAE.pth`, a plain state dict: read with weights_only, mapped."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch names many: unpickling, zip, runtime
        reason = str(error).splitlines()[0]
        raise LanceQuantError(f"{path} is not a plain state dict of the VAE ({reason}): fetch the file again") from None


def check_vae(path: Path) -> None:
    """Are the file's keys and shapes those of a Wan 2.2 VAE? Reads no values. Raises LanceQuantError where not."""
    from lance_quant.checkpoint.fill import check_keys
    from lance_quant.checkpoint.reader import TensorReader

    path = Path(path)
    if path.suffix == ".safetensors":
        with TensorReader(path) as reader:
            shapes = {name: reader.shape(name) for name in reader.names()}
    else:
        shapes = {name: tuple(tensor.shape) for name, tensor in read_state_dict(path).items()}
    wanted = {name: tuple(value.shape) for name, value in _empty_vae(path, shapes).state_dict().items()}
    found = {diffusers_key(name): shape for name, shape in shapes.items()}
    check_keys(path, wanted, list(found))
    for name, shape in wanted.items():
        if found[name] != shape:
            raise LanceQuantError(f"{path}: '{name}' is {list(found[name])}, a VAE of its widths has {list(shape)}")


def _empty_vae(path: Path, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """A VAE of the widths that a file's shapes tell, on the meta device."""
    try:
        base = shapes["encoder.conv1.weight"][0]
        decoder_base = shapes["decoder.head.2.weight"][1]
        latent_channels = shapes["conv2.weight"][0]
    except KeyError as error:
        raise LanceQuantError(f"{path} lacks the tensor {error}: it is not a Wan 2.2 VAE") from None
    with torch.device("meta"):
        return build_vae(base, decoder_base, latent_channels)


def vae_dtype(device) -> torch.dtype:
    """bfloat16 on a GPU, as upstream; a CPU is faster in float32."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load_vae(path: Path, device="cpu", dtype: torch.dtype = torch.float32, faithful: bool = True) -> WanVAE:
    """Read a VAE file strictly, its widths from its tensors. LanceQuantError where keys or shapes differ."""
    from lance_quant.checkpoint.reader import TensorReader

    path = Path(path)
    if path.suffix == ".safetensors":
        with TensorReader(path) as reader:
            tensors = {name: torch.empty(reader.shape(name), device=device, dtype=dtype) for name in reader.names()}
            reader.read_all(tensors)
    else:
        tensors = read_state_dict(path)
    autoencoder = _empty_vae(path, {name: tensor.shape for name, tensor in tensors.items()})
    # first over, then cast: a mapped file's tensors are slow to cast on the CPU
    state = {diffusers_key(name): tensor.to(device).to(dtype) for name, tensor in tensors.items()}
    try:
        autoencoder.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise LanceQuantError(f"{path} does not fit the Wan 2.2 VAE: {str(error).splitlines()[1].strip()}") from None
    return WanVAE(autoencoder, faithful)
