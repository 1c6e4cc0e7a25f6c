"""Position ids on three axes (t, h, w), attention masks and the shifts of the edit tasks (Lance spec sec. 8 and 10)."""

from collections.abc import Sequence

import torch

Grid = tuple[int, int, int]

SPATIAL_MERGE = 2  # a grid counts vision-tower patches; 2 x 2 of them make a token
TEMPORAL_STRIDE = 2  # tokens_per_second 2 x one second a grid; VAE latents too (quirk Q2)
VIT_TIME = 1000  # where the edit tasks put the vision tower's block on the time axis (quirk Q5)

NOISE, CLEAN, VIT, CAPTION, TEXT = 1, 2, 4, 0, -1  # modality codes, Lance spec sec. 5
BLOCK_MODES = frozenset({"full", "full_noise", "noise"})  # the others are causal
HIDDEN_MODES = frozenset({"noise", "aside"})  # of splits that none behind them sees


def grid_tokens(grid: Grid) -> int:
    """Tokens of a vision block."""
    t, h, w = grid
    return t * (h // SPATIAL_MERGE) * (w // SPATIAL_MERGE)


def rope_positions(ids: torch.Tensor, grids: Sequence[Grid], pad: int) -> torch.Tensor:
    """Base positions, int64 [3, n], of expanded ids [n]; grids (t, h, w before the merge) in block order.

    Text counts up on all axes; a block of pads starts at the position after its vision_start, and the text behind it
    continues one past the block's largest position. Raises ValueError where ids and grids disagree.
    """
    is_pad = (ids == pad).tolist()
    out = torch.empty(3, len(is_pad), dtype=torch.int64)
    index, upcoming, block = 0, 0, 0
    while index < len(is_pad):
        if not is_pad[index]:
            end = index
            while end < len(is_pad) and not is_pad[end]:
                end += 1
            out[:, index:end] = torch.arange(upcoming, upcoming + end - index)
            upcoming += end - index
        else:
            t, h, w = grids[block]
            axes = torch.meshgrid(
                torch.arange(t) * TEMPORAL_STRIDE,
                torch.arange(h // SPATIAL_MERGE),
                torch.arange(w // SPATIAL_MERGE),
                indexing="ij",
            )
            end = index + grid_tokens(grids[block])
            if not all(is_pad[index:end]) or end > len(is_pad):
                raise ValueError(f"vision block {block} has fewer pads than its grid {grids[block]}")
            out[:, index:end] = torch.stack(axes).flatten(1) + upcoming
            upcoming = int(out[:, index:end].max()) + 1
            block += 1
        index = end
    if block != len(grids):
        raise ValueError(f"{len(grids)} grids for {block} vision blocks")
    return out


def shift_positions(positions: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
    """The generation paths' shifts (Lance spec sec. 8): a no-op without vision-tower or source-latent blocks.

    The vision tower's block moves to t = 1000; the target block takes the positions of the source latents.
    """
    shifted = positions.clone()
    vit = (modality == VIT).nonzero().squeeze(1)
    if len(vit):
        shifted[0, vit] += VIT_TIME - positions[0, vit[0]]
    source, target = modality == CLEAN, modality == NOISE
    if int(source.sum()) == int(target.sum()) > 0:
        shifted[:, target] = shifted[:, source]
    return shifted


def generation_positions(
    ids: torch.Tensor, grids: Sequence[Grid], modality: torch.Tensor, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(conditional [3, n], unconditional [3, m], kept int64 [m]): the second for the ids without the caption."""
    kept = (modality != CAPTION).nonzero().squeeze(1)
    conditional = shift_positions(rope_positions(ids, grids, pad), modality)
    unconditional = shift_positions(rope_positions(ids[kept], grids, pad), modality[kept])
    return conditional, unconditional, kept


def causal_mask(queries: int, context: int, device=None) -> torch.Tensor | None:
    """Bool [queries, context + queries], bottom-right aligned; None where every query sees everything."""
    if queries == 1:
        return None
    mask = torch.ones(queries, context + queries, dtype=torch.bool, device=device)
    return mask.tril(diagonal=context)


def block_mask(split_lens: Sequence[int], split_modes: Sequence[str], device=None) -> torch.Tensor:
    """Bool [n, n] of the uncached path: q sees k iff (k <= q or both in one visual split) and a hidden k is in q's own
    split."""
    lengths, tokens = torch.tensor(split_lens, device=device), sum(split_lens)
    split = torch.repeat_interleave(torch.arange(len(split_lens), device=device), lengths, output_size=tokens)
    visual = torch.tensor([mode in BLOCK_MODES for mode in split_modes], device=device)[split]
    hidden = torch.tensor([mode in HIDDEN_MODES for mode in split_modes], device=device)[split]
    order = torch.arange(tokens, device=device)
    same = split[:, None] == split[None, :]
    sees = (order[None, :] <= order[:, None]) | (same & visual[None, :])
    return sees & (same | ~hidden[None, :])
