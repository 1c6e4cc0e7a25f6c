"""`python -m lance_quant.tiny stage=clips start=FILE out=DIR minutes=2` trains what only later frames of a clip meet.

A lone frame meets the last temporal tap of every causal convolution and no convolution in time. Everything else is
free to learn moving scenes, and single pictures stay bit for bit as they were: what was trained on them still holds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.func import functional_call

from lance_quant.tiny import world
from lance_quant.tiny.autoencoder import (
    FILE,
    constants,
    decode_clips,
    divergence,
    encode_clips,
    load_vae,
    reconstruction_loss,
    save_vae,
    to_bytes,
    to_unit,
)
from lance_quant.tiny.reader import read
from lance_quant.tiny.recipes import ClipRecipe
from lance_quant.tiny.state import Schedule, Step, TrainingRun

LATER = 1  # first latent frame that only clips have


class TemporalTaps(nn.Module):
    """The trainable part of a VAE, or of its decoder: all but the last tap of causal convolutions, and convolutions
    in time whole."""

    def __init__(self, vae: AutoencoderKLWan, decoder_only: bool = False):
        super().__init__()
        self.kept: dict[str, torch.Tensor] = {}  # last taps, which stay
        self.early = nn.ParameterDict()
        for name, value in vae.named_parameters():
            if decoder_only and not name.startswith("decoder."):
                continue
            if "time_conv" in name:
                self.early[name.replace(".", "/")] = nn.Parameter(value.detach().clone())
            elif value.dim() == 5 and value.shape[2] > 1:
                self.kept[name] = value.detach()[:, :, -1:].clone()
                self.early[name.replace(".", "/")] = nn.Parameter(value.detach()[:, :, :-1].clone())

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole tensors under the VAE's names."""
        out = {name.replace("/", "."): value for name, value in self.early.items()}
        return out | {name: torch.cat((out[name], last), 2) for name, last in self.kept.items()}


class RoundTrip(nn.Module):
    """Clips [B, 3, T, H, W] and noise -> normalised latent means, log variances [B, 48, t, h, w], and decoded clips."""

    def __init__(self, vae: AutoencoderKLWan, noise: float):
        super().__init__()
        self.vae, self.noise = vae, noise
        self.centre, self.scale = (part.unsqueeze(2) for part in constants(vae.device))

    def forward(self, clips: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raw, logvar = encode_clips(self.vae, clips)
        mean, logvar = (raw - self.centre) / self.scale, logvar - 2 * self.scale.log()
        spread = mean + noise * (logvar.exp() + self.noise**2).sqrt()
        return mean, logvar, decode_clips(self.vae, spread * self.scale + self.centre)


def train_clips(
    recipe: ClipRecipe, *, out: Path, minutes: float, total_minutes: float, device: str, graph: bool = True
) -> Path:
    """Train, or go on training, for at most `minutes`; write the VAE file with the averaged weights. Returns its
    path."""
    torch.manual_seed(recipe.seed)
    vae = load_vae(Path(recipe.start) if recipe.start else out / FILE, device)
    taps = TemporalTaps(vae, recipe.decoder_only).to(device)
    schedule = Schedule(steps=recipe.steps, minutes=total_minutes, peak=recipe.peak, warmup=50)
    run = TrainingRun(taps, schedule, folder=out, name="clips_state", seed=recipe.seed)
    run.resume()
    run.start(minutes)
    path = RoundTrip(vae, recipe.noise)

    def losses(clips: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = {f"vae.{name}": value for name, value in taps.weights().items()}
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=device.startswith("cuda"), cache_enabled=False):
            mean, logvar, made = functional_call(path, weights, (clips, noise))
        later = mean[:, :, LATER:].float()
        off = later.mean((0, 2, 3, 4)).square() + later.std((0, 2, 3, 4)).log().square()
        return {
            "rebuilt": reconstruction_loss(made.float()[:, :, 1:], clips[:, :, 1:]),
            "kl": recipe.kl * divergence(later, logvar[:, :, LATER:].float()),
            "moments": recipe.moments * off.mean(),
        }

    step = Step(run, losses, graph=graph)
    said = run.elapsed
    while not run.over:
        generator = run.begin_step()
        clips = to_unit(crop(moving_batch(recipe.batch, generator), recipe.edge, generator))
        side = recipe.edge // 16
        seen = step(clips, torch.randn(recipe.batch, 48, 2, side, side, generator=generator, device=device))
        run.end_step()
        if run.step % 10 == 0 and run.elapsed - said > 10:
            said = run.elapsed
            words = " ".join(f"{name} {value.item():.5f}" for name, value in seen.items())
            print(f"clips step {run.step} {run.elapsed:.0f}s {words}", flush=True)
    run.save()
    run.load_average()
    with torch.no_grad():
        for name, value in taps.weights().items():
            vae.get_parameter(name).copy_(value)
    save_vae(vae, out / FILE)
    quality = measure_clips(vae, seed=recipe.seed + 1)
    print(json.dumps({"stage": "clips", "step": run.step, "finished": run.finished, **quality}), flush=True)
    return out / FILE


def moving_batch(count: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 clips [B, 3, 5, 128, 128]: half of them with things that glide anywhere by whole pixels, half with
    one thing that moves as in a scene, or none."""
    batch, velocity = world.random_batch(count, generator)
    device = generator.device
    spacing = world.CENTRES[1] - world.CENTRES[0]
    way = torch.tensor([*world.MOVES.values(), (0, 0)], device=device)
    way = way[torch.randint(len(way), (count,), generator=generator, device=device)]
    moves = torch.zeros_like(velocity)
    moves[:, 0] = way * spacing
    glides = (torch.arange(count, device=device) % 2 == 0)[:, None, None]
    far = torch.where(glides, velocity * (world.CLIP_FRAMES - 1), moves)
    frames = []
    for way in world.WAY:
        offset = (far * way).round().long()
        frames.append(world.render(batch._replace(x=batch.x + offset[..., 0], y=batch.y + offset[..., 1])))
    return torch.stack(frames, 2)


def crop(clips: torch.Tensor, edge: int, generator: torch.Generator) -> torch.Tensor:
    """The same random square of `edge` pixels, at a multiple of 16, of every clip."""
    if edge == world.CANVAS:
        return clips
    places = (world.CANVAS - edge) // 16 + 1
    y, x = (16 * int(torch.randint(places, (), generator=generator, device=generator.device)) for _ in range(2))
    return clips[..., y : y + edge, x : x + edge]


@torch.no_grad()
def measure_clips(vae: AutoencoderKLWan, *, seed: int) -> dict[str, float]:
    """PSNR in dB of later frames, moments of the later latents, and how often the last frame of a scene's clip is
    read back."""
    device = vae.quant_conv.weight.device
    rng = random.Random(seed)
    scenes = [world.sample_clip(rng, unseen=bool(i % 2)) for i in range(512 if device.type == "cuda" else 64)]
    clips = torch.stack([world.render(world.pack(scenes, way)) for way in world.WAY], 2).to(device)
    made, latents = [], []
    centre, scale = (part.unsqueeze(2) for part in constants(device))
    for chunk in clips.split(64):
        raw, _ = encode_clips(vae, to_unit(chunk))
        latents.append((raw - centre) / scale)
        made.append(to_bytes(decode_clips(vae, raw)))
    made, later = torch.cat(made), torch.cat(latents)[:, :, LATER:]
    error = (made.float() - clips.float()).square().mean((1, 3, 4)) + 1e-6
    psnr = (10 * (255**2 / error).log10()).mean(0)
    true, seen = (read(frames[:, :, -1]) for frames in (clips, made))
    right = [true.things(i) == seen.things(i) for i in range(len(scenes))]
    return {
        "psnr_first": psnr[0].item(),
        "psnr_worst": psnr[1:].min().item(),
        "later_mean": later.mean((0, 2, 3, 4)).abs().max().item(),
        "later_std": later.std().item(),
        "last_frame_read": sum(right) / len(right),
    }
