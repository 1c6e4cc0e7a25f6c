"""`python -m lance_quant.tiny stage=vae minutes=5 out=DIR` trains the tiny Wan VAE and writes
`Wan2.2_VAE.safetensors`.

The architecture is diffusers' AutoencoderKLWan in its 2.2 form at base width 6 / 8. Here single frames are trained,
through a two-dimensional path that gives the same numbers (a first frame meets only the last temporal tap of every
causal convolution); `temporal` trains the rest on clips. After training one affine map a latent channel is folded into
quant_conv and post_quant_conv, so that scenes have zero mean and unit variance behind Wan's published constants.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from safetensors.torch import load_file, save_file

from lance_quant.errors import LanceQuantError
from lance_quant.model.vae import LATENT_MEAN, LATENT_STD, build_vae, diffusers_key, upstream_key
from lance_quant.tiny import world
from lance_quant.tiny.recipes import AutoencoderRecipe
from lance_quant.tiny.state import Schedule, Step, TrainingRun

FILE = "Wan2.2_VAE.safetensors"


def build(base_dim: int = 6, decoder_base_dim: int = 8) -> AutoencoderKLWan:
    """A Wan 2.2 VAE of that width; its config carries Wan's latent mean and standard deviation (48 each)."""
    vae = build_vae(base_dim, decoder_base_dim)
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.__class__ = FirstFrameConv
    return vae


def save_vae(vae: AutoencoderKLWan, path: Path) -> None:
    """Write the VAE in F32 under upstream's key names."""
    save_file({upstream_key(k): v.detach().float().cpu().contiguous() for k, v in vae.state_dict().items()}, path)


def load_vae(path: Path, device: str | torch.device = "cpu") -> AutoencoderKLWan:
    """Read a file of `save_vae`, float32; the widths come from its shapes."""
    if not path.exists():
        raise LanceQuantError(f"there is no VAE at {path}: run stage=vae first")
    tensors = load_file(path)
    vae = build(tensors["encoder.conv1.weight"].shape[0], tensors["decoder.conv1.weight"].shape[0] // 4)
    vae.load_state_dict({diffusers_key(name): tensor for name, tensor in tensors.items()})
    return vae.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------- the single-frame path


class FirstFrameConv(WanCausalConv3d):
    """A causal convolution that treats a lone frame as the picture it is: all taps but the last meet zeros."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if cache_x is not None or x.shape[2] != 1 or self.stride != (1, 1, 1):
            return super().forward(x, cache_x)
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self._padding[0])[:, :, None]


def encode_frames(vae: AutoencoderKLWan, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance [B, 48, h, w] of pictures [B, 3, H, W] in [-1, 1]; the numbers of `vae.encode`."""
    moments = vae.quant_conv(vae.encoder(patchify(pictures[:, :, None], 2)))[:, :, 0]
    mean, logvar = moments.float().chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


def decode_frames(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W], not clamped, of raw latents [B, 48, h, w]; the numbers of `vae.decode` before its
    clamp."""
    out = vae.decoder(vae.post_quant_conv(latents[:, :, None]), first_chunk=True)
    return unpatchify(out, 2)[:, :, 0].float()


def encode_clips(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance [B, 48, t, h, w] of clips [B, 3, T, H, W] in [-1, 1], by diffusers' chunks."""
    mean, logvar = vae._encode(clips).float().chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


def decode_clips(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips [B, 3, T, H, W] of raw latents [B, 48, t, h, w]: diffusers' chunks without its clamp, which stops
    gradients."""
    vae.clear_cache()
    x = vae.post_quant_conv(latents)
    parts = []
    for index in range(x.shape[2]):
        vae._conv_idx = [0]
        parts.append(
            vae.decoder(
                x[:, :, index : index + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(parts, 2), 2).float()


def constants(device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Wan's latent mean and standard deviation, float32 [1, 48, 1, 1] each."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (LATENT_MEAN, LATENT_STD))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """[-1, 1], clamped, to uint8."""
    return ((pictures.clamp(-1, 1) / 2 + 0.5) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------- training


def reconstruction_loss(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """L1 with a little squared error; pixels of things count five times, since most of a scene is background."""
    corner = true.flatten(2)[:, :, 0].view(*true.shape[:2], *[1] * (true.dim() - 2))  # always background
    weight = 1 + 4 * (true - corner).abs().amax(1, keepdim=True).gt(0.05)
    error = made - true
    return (weight * (error.abs() + 0.5 * error.square())).mean()


def divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL to the standard normal, mean over elements, in nats."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def train_vae(
    recipe: AutoencoderRecipe,
    *,
    out: Path,
    minutes: float,
    total_minutes: float,
    device: str,
    graph: bool = True,
) -> Path:
    """Train, or go on training, for at most `minutes`; write the VAE file when the whole run is over, and in any
    case a snapshot of what there is. Returns the file's path."""
    torch.manual_seed(recipe.seed)
    vae = build(recipe.base_dim, recipe.decoder_base_dim)
    if recipe.start:
        vae.load_state_dict(load_vae(Path(recipe.start)).state_dict())
    vae.to(device)
    schedule = Schedule(steps=recipe.steps, minutes=total_minutes, peak=recipe.peak)
    run = TrainingRun(vae, schedule, folder=out, name="vae_state", seed=recipe.seed)
    run.resume()
    run.start(minutes)
    cuda = device.startswith("cuda")

    centre, scale = constants(device)

    def losses(pictures: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            raw, logvar = encode_frames(vae, pictures)
            mean, logvar = (raw - centre) / scale, logvar - 2 * scale.log()
            spread = mean + noise * (logvar.exp() + recipe.noise**2).sqrt()
            made = decode_frames(vae, spread * scale + centre)
        rebuilt = reconstruction_loss(made.float(), pictures)
        return {"rebuilt": rebuilt, "kl": recipe.kl * divergence(mean, logvar)}

    step = Step(run, losses, graph=graph)
    said = run.elapsed
    while not run.over:
        generator = run.begin_step()
        pictures = to_unit(world.render(world.random_batch(recipe.batch, generator)[0]))
        seen = step(pictures, torch.randn(recipe.batch, 48, 8, 8, generator=generator, device=device))
        run.end_step()
        if run.step % 20 == 0 and run.elapsed - said > 10:
            said = run.elapsed
            words = " ".join(f"{name} {value.item():.5f}" for name, value in seen.items())
            print(f"vae step {run.step} {run.elapsed:.0f}s {words}", flush=True)
    run.save()
    run.load_average()
    fold_constants(vae, seed=recipe.seed)
    path = out / FILE
    save_vae(vae, path)
    quality = measure_vae(vae, seed=recipe.seed + 1)
    print(json.dumps({"stage": "vae", "step": run.step, "finished": run.finished, **quality}), flush=True)
    return path


@torch.no_grad()
def fold_constants(vae: AutoencoderKLWan, *, seed: int, batches: int = 16, count: int = 256) -> None:
    """Fold the exact per-channel map that gives scenes zero mean and unit variance behind Wan's constants: means and
    log variances in quant_conv, its inverse in post_quant_conv."""
    device = vae.quant_conv.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    if device.type == "cpu":
        batches, count = 2, 64
    means = []
    for _ in range(batches):
        batch, _ = world.random_batch(count, generator)
        means.append(encode_frames(vae, to_unit(world.render(batch)))[0].double())
    means = torch.cat(means)
    centre, scale = means.mean((0, 2, 3)), means.std((0, 2, 3)).clamp(min=1e-4)
    wan_mean, wan_std = (part.double().flatten() for part in constants(device))
    gain = wan_std / scale
    first, last = vae.quant_conv, vae.post_quant_conv
    channels = gain.numel()
    last.bias += (last.weight[:, :, 0, 0, 0].double() @ (centre - wan_mean / gain)).float()
    last.weight /= gain.float().view(1, -1, 1, 1, 1)
    first.weight[:channels] *= gain.float().view(-1, 1, 1, 1, 1)
    first.bias[:channels] = ((first.bias[:channels].double() - centre) * gain + wan_mean).float()
    first.bias[channels:] += 2 * gain.log().float()


@torch.no_grad()
def measure_vae(vae: AutoencoderKLWan, *, seed: int, count: int = 256) -> dict[str, float]:
    """PSNR in dB, largest deviation of normalised means and variances from 0 and 1, and the median posterior
    spread."""
    device = vae.quant_conv.weight.device
    batch, _ = world.random_batch(count if device.type == "cuda" else 16, torch.Generator(device).manual_seed(seed))
    pictures = to_unit(world.render(batch))
    raw, logvar = encode_frames(vae, pictures)
    mean, std = constants(device)
    latents = (raw - mean) / std
    error = (decode_frames(vae, raw).clamp(-1, 1) - pictures).square().mean((1, 2, 3))
    return {
        "psnr": (10 * (4 / error).log10()).mean().item(),
        "latent_mean_off": latents.mean((0, 2, 3)).abs().max().item(),
        "latent_std_off": (latents.std((0, 2, 3)) - 1).abs().max().item(),
        "spread": ((0.5 * logvar).exp() / std).median().item(),
    }
