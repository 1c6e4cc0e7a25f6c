"""Which expert sees which token: `Routing` splits a sequence into its two experts' rows and merges them again.

Routing is by token type, never learned: text, vision-tower tokens and the start and end tokens of every visual block
go to the understanding expert, latents to the generation expert (Lance spec sec. 9).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Twin(NamedTuple):
    """A value per expert; None where the expert has no token."""

    und: torch.Tensor | None
    gen: torch.Tensor | None


@dataclass(frozen=True)
class Routing:
    """Positions along the sequence of each expert's tokens, the same for every row of a batch.

    und, gen: int64 [n_und] and [n_gen], together a permutation of the sequence; both None: all tokens are und.
    stretch: (start, end) of the gen tokens where they stand together, so that taking them out copies nothing.
    """

    und: torch.Tensor | None = None
    gen: torch.Tensor | None = None
    stretch: tuple[int, int] | None = None

    @classmethod
    def of(cls, is_latent: torch.Tensor) -> "Routing":
        """From a bool [n] mask of the latent tokens."""
        if not bool(is_latent.any()):
            return cls()
        gen = is_latent.nonzero().squeeze(1)
        start, end = int(gen[0]), int(gen[-1]) + 1
        together = (start, end) if end - start == len(gen) else None
        return cls(und=(~is_latent).nonzero().squeeze(1), gen=gen, stretch=together)

    def to(self, device: torch.device | str) -> "Routing":
        return self if self.gen is None else Routing(self.und.to(device), self.gen.to(device), self.stretch)

    def split(self, x: torch.Tensor) -> Twin:
        """x [B, n, ...] -> each expert's rows."""
        if self.gen is None:
            return Twin(x, None)
        return Twin(x.index_select(1, self.und), x.index_select(1, self.gen))

    def merge(self, twin: Twin) -> torch.Tensor:
        """The inverse of `split`."""
        if twin.gen is None:
            return twin.und
        batch, _, *rest = twin.und.shape
        out = twin.und.new_empty(batch, len(self.und) + len(self.gen), *rest)
        return out.index_copy_(1, self.und, twin.und).index_copy_(1, self.gen, twin.gen)
