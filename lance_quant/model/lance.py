"""`Lance`: decoder, adapters and vision tower under upstream's key names, built without memory, filled by streaming.

lance = load_lance(open_checkpoint(CheckpointConfig(path="downloads/Lance_3B")), device="cuda")
"""

from typing import Protocol

import torch
from torch import nn

from lance_quant.checkpoint.layout import VIT_PREFIX, Checkpoint
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import LanceConfig, read_json
from lance_quant.model.decoder import LanguageModel
from lance_quant.model.embedders import TimeEmbedder, latent_positions
from lance_quant.model.sequence import Sample
from lance_quant.model.vision import build_vision_tower


class FastPath(Protocol):
    """Other ways to the same velocities and tokens, which the loops take where a model has them."""

    def denoising(self, flow):
        """A flow over a kept context -> one that gives the same velocities."""

    def decoding(self, context: torch.Tensor, positions: torch.Tensor, sample: Sample, extra: int):
        """What `understanding` calls for each token: context [1, n, H] at positions [3, n + extra]."""


class Lance(nn.Module):
    """The whole model but the VAE. vision_config: the vision tower's `config.json`; None: a decoder alone, for text."""

    def __init__(self, config: LanceConfig, vision_config: dict | None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.fast: FastPath | None = None
        self.language_model = LanguageModel(config)
        if vision_config is None:
            return
        self.time_embedder = TimeEmbedder(config.hidden_size)
        self.vae2llm = nn.Linear(config.latent_channels, config.hidden_size)
        self.llm2vae = nn.Linear(config.hidden_size, config.latent_channels)
        self.vit_model = build_vision_tower(vision_config, dtype)

    @property
    def device(self) -> torch.device:
        return self.language_model.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.norm.weight.dtype

    def look(self, patches: torch.Tensor, grids) -> torch.Tensor:
        """Patches [P, 1176] of pictures or clips with grids (t, h, w) -> merged tokens [P / 4, H]."""
        grid = torch.tensor(grids, device=self.device)
        return self.vit_model(patches.to(self.device, self.dtype), grid_thw=grid).pooler_output

    def latent_table(self, grids) -> torch.Tensor:
        """Position rows [sum(t*h*w), H] of VAE blocks (Lance spec sec. 11).

        Raises LanceQuantError for a grid beyond max_latent_size, where upstream would silently reuse other rows, and
        for a clip beyond max_num_frames.
        """
        for grid in grids:
            most = self.config.max_latent_size
            if grid[0] > self.config.max_latent_frames:
                raise LanceQuantError(
                    f"a clip of {grid[0]} latent frames is beyond this model's {self.config.max_latent_frames}: "
                    f"draw or give at most {self.config.max_num_frames} frames"
                )
            if max(grid[1:]) > most:
                raise LanceQuantError(
                    f"a latent grid of {grid[1]} x {grid[2]} is beyond this model's {most} a side: "
                    f"draw at most {16 * most} pixels a side"
                )
        rows = [latent_positions(grid, self.config.hidden_size, self.device) for grid in grids]
        return torch.cat(rows).to(self.dtype)

    def embed_latents(self, x: torch.Tensor, t: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Latents x [..., k, 48] at timesteps t [..., k] (0 for clean rows), table [k, H] -> [..., k, H]."""
        return self.vae2llm(x.to(self.dtype)) + self.time_embedder(t) + table

    def embed(self, sample: Sample, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Token embeddings [1, n, H] of a sample; latents [n_vae, H]: what `embed_latents` makes of its VAE blocks."""
        hidden = self.language_model.model.embed_tokens(sample.ids.to(self.device))
        if sample.vit_patches is not None and len(sample.vit_indexes):
            hidden[sample.vit_indexes.to(self.device)] = self.look(sample.vit_patches, sample.vit_grids)
        if latents is not None:
            hidden[sample.vae_indexes.to(self.device)] = latents
        return hidden[None]


def build_lance(checkpoint: Checkpoint, dtype: torch.dtype) -> Lance:
    """A Lance of the checkpoint's sizes on the meta device: no memory, no weights."""
    vision_config = None if checkpoint.layout == "text" else read_json(checkpoint.vit_config_file)
    with torch.device("meta"):
        return Lance(checkpoint.config, vision_config, dtype).eval().requires_grad_(False)


def load_lance(checkpoint: Checkpoint, device="cpu", dtype: torch.dtype = torch.bfloat16) -> Lance:
    """Read a checkpoint tensor by tensor into `dtype` on `device`; never two copies of a weight.

    Strict: LanceQuantError names missing or unexpected keys and wrong shapes; the position table alone is ignored, as
    upstream regenerates it (Lance spec sec. 1).
    """
    from lance_quant.checkpoint.fill import fill

    lance = build_lance(checkpoint, dtype)
    fill(lance, checkpoint.model_file, device, dtype, elsewhere=separate_parts(checkpoint))
    return complete(lance, checkpoint, device, dtype)


def separate_parts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Key prefixes that the model's file does not hold: the vision tower's in the image layout."""
    return () if checkpoint.vit_file is None else (VIT_PREFIX,)


def complete(lance: Lance, checkpoint: Checkpoint, device, dtype: torch.dtype) -> Lance:
    """Fill the vision tower where it has a file of its own, and move what was computed on the CPU to the weights."""
    from lance_quant.checkpoint.fill import fill

    if checkpoint.vit_file is not None:
        fill(lance.vit_model, checkpoint.vit_file, device, dtype)
    for module in lance.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return lance
