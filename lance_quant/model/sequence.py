"""`Sample`: one prepared sequence, everything that a forward call needs and nothing of the request it came from."""

from dataclasses import dataclass, field

import torch

from lance_quant.model.positions import Grid


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Ids, splits, modality and index lists of one sequence (Lance spec sec. 5), with its pixels and clean latents.

    ids, modality: int64 [n]. grids: (t, h, w) before the merge of every vision block in order. vit_indexes,
    vae_indexes, mse_indexes: positions of vision-tower pads, of all latents (source then target), of denoised latents.
    latent_grids: (t, h, w) of each VAE block. vit_patches: float32 [P, 1176] with vit_grids. clean_latents: float32
    [t, h, w, 48] per VAE block, or None where noise stands. context_length: ids fed before an answer is decoded.
    """

    task: str
    ids: torch.Tensor
    split_lens: tuple[int, ...]
    split_modes: tuple[str, ...]
    modality: torch.Tensor
    grids: tuple[Grid, ...]
    vit_indexes: torch.Tensor
    vae_indexes: torch.Tensor
    mse_indexes: torch.Tensor
    latent_grids: tuple[Grid, ...] = ()
    context_length: int | None = None
    vit_patches: torch.Tensor | None = None
    vit_grids: tuple[Grid, ...] = ()
    clean_latents: tuple[torch.Tensor | None, ...] = field(default=())

    def spans(self) -> list[tuple[int, int, str]]:
        """(start, end, mode) of every split."""
        out, start = [], 0
        for length, mode in zip(self.split_lens, self.split_modes, strict=True):
            out.append((start, start + length, mode))
            start += length
        return out

    def spans_of(self, rows: torch.Tensor) -> list[tuple[int, int, str]]:
        """The spans that a part of the sequence, int64 [m] in order, falls into."""
        split = torch.repeat_interleave(torch.arange(len(self.split_lens)), torch.tensor(self.split_lens))[rows]
        kept, lengths = torch.unique_consecutive(split, return_counts=True)
        ends = lengths.cumsum(0)
        modes = [self.split_modes[index] for index in kept.tolist()]
        return list(zip((ends - lengths).tolist(), ends.tolist(), modes, strict=True))

    def latent_mask(self) -> torch.Tensor:
        """Bool [n]: tokens of the generation expert."""
        mask = torch.zeros(len(self.ids), dtype=torch.bool)
        mask[self.vae_indexes] = True
        return mask

    def drawn_latents(self, state: torch.Tensor) -> torch.Tensor:
        """What a final sampler state [n_vae, 48] has drawn, [t, h, w, 48]: its last block (Lance spec sec. 12)."""
        grid = self.latent_grids[-1]
        return state[-grid[0] * grid[1] * grid[2] :].unflatten(0, grid)

    def denoised_rows(self) -> torch.Tensor:
        """Int64 rows of the sampler state [n_vae, 48] that move."""
        return torch.isin(self.vae_indexes, self.mse_indexes).nonzero().squeeze(1)
