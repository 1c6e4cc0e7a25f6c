"""Hidden states of one pass: `embed_job` makes them, `run_layer` takes them through a layer, `move_on` ends a wave.

A context's keys and values live in one cache of a single layer that all jobs use in turn: it is written anew by each
job in each layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lance_quant.calibration.jobs import CONDITIONAL, UNCONDITIONAL, Forward, Job
from lance_quant.calibration.recorder import Recorder
from lance_quant.model.cache import KVCache
from lance_quant.model.decoder import Call, Decoder, Layer
from lance_quant.model.lance import Lance
from lance_quant.model.positions import generation_positions, rope_positions
from lance_quant.model.routing import Routing
from lance_quant.model.sampler import Velocities, guide, is_guided, timesteps


@dataclass
class Piece:
    """One decoder call on its way through the layers: hidden [1, n, H] is overwritten by each of them.

    place: of its forward in the plan; recorded: not where a wave runs a context again; fresh: it begins a context.
    """

    place: int
    forward: Forward
    hidden: torch.Tensor
    call: Call
    recorded: bool
    fresh: bool


def positions_of(job: Job, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and unconditional positions [3, n] of a job; a question has the first only, twice."""
    sample = job.sample
    if not job.steps:
        alone = rope_positions(sample.ids, sample.grids, pad)
        return alone, alone
    return generation_positions(sample.ids, sample.grids, sample.modality, pad)[:2]


@dataclass(frozen=True)
class Embedding:
    """What turns jobs into pieces: the adapters, a decoder for the calls, and the cache that they share."""

    lance: Lance
    decoder: Decoder
    cache: KVCache

    def job(self, job: Job, places: Sequence[tuple[int, Forward]], wave: int) -> list[Piece]:
        """The calls of a job in one wave; places: its forwards with their places in the plan."""
        lance, device = self.lance, self.lance.device
        config = lance.config
        conditional, unconditional = positions_of(job, config.video_token_id)
        table = lance.latent_table(job.sample.latent_grids) if job.steps else None
        tokens = self._tokens(job, table)
        pieces, calls = [], {}
        due = {forward.branch for _, forward in places if forward.step is not None and forward.wave == wave}
        begun = set()
        for place, forward in places:
            start, end, branch = forward.start, forward.end, forward.branch
            if forward.wave != wave and (forward.step is not None or branch not in due):
                continue
            latent = job.sample.latent_mask()[start:end]
            if not job.steps:
                call = self._call(tokens, conditional, Routing(), job.sample.spans(), None)
                hidden = tokens[:, start:end]
            elif forward.step is None:
                routing = Routing.of(latent).to(device)
                mode = next(mode for at, _, mode in job.sample.spans() if at == start)
                spans = [(0, end - start, mode)]
                call = self._call(tokens, conditional[:, start:end], routing, spans, self.cache)
                hidden = tokens[:, start:end].clone()
            else:
                if branch not in calls:
                    placed = conditional[:, start:end]
                    if branch == UNCONDITIONAL:
                        behind = sum(b - a for a, b, _ in job.context(branch))
                        placed = unconditional[:, behind : behind + end - start]
                    calls[branch] = self._call(tokens, placed, Routing.of(latent).to(device), None, self.cache)
                call = calls[branch]
                hidden = self._block(job, tokens, forward, table)
            recorded = forward.step is not None or wave == 0
            pieces.append(Piece(place, forward, hidden, call, recorded, fresh=branch not in begun))
            begun.add(branch)
        return pieces

    def _call(self, like: torch.Tensor, positions: torch.Tensor, routing: Routing, spans, cache) -> Call:
        return self.decoder.call(like, positions.to(like.device), routing, spans, cache)

    def _tokens(self, job: Job, table: torch.Tensor | None) -> torch.Tensor:
        """[1, n, H]: text, what the vision tower saw, and clean source latents; the block's are put in by `_block`.

        table: position rows of all latents [n_vae, H].
        """
        lance, sample = self.lance, job.sample
        hidden = lance.embed(replace(sample, vit_patches=None))
        if job.seen is not None:
            hidden[0, sample.vit_indexes.to(lance.device)] = job.seen.to(lance.device)
        first, _ = job.target
        source = (sample.vae_indexes < first).nonzero().squeeze(1)
        if len(source):
            clean, at = job.state[source].to(lance.device), source.to(lance.device)
            still = torch.zeros(len(source), device=lance.device)  # quirk Q7
            hidden[0, sample.vae_indexes[source].to(lance.device)] = lance.embed_latents(clean, still, table[at])
        return hidden

    def _block(self, job: Job, tokens: torch.Tensor, forward: Forward, table: torch.Tensor) -> torch.Tensor:
        """The block at one timestep: its latents noised there, or as the sampler left them."""
        lance, device = self.lance, self.lance.device
        rows, moves = block_rows(job)
        state = job.state[rows]
        t = forward.step.t
        if job.goal is not None:
            state = torch.where(moves[:, None], (1 - t) * job.goal + t * state, state)
        times = torch.tensor(t, dtype=torch.float32) * moves.float()
        latents = lance.embed_latents(state.to(device), times.to(device), table[rows.to(device)])[None]
        return torch.cat((tokens[:, forward.start, None], latents, tokens[:, forward.end - 1, None]), dim=1)


def block_rows(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the state that the block holds, int64 [k], and which of them move, bool [k]."""
    sample, (start, end) = job.sample, job.target
    rows = ((sample.vae_indexes >= start) & (sample.vae_indexes < end)).nonzero().squeeze(1)
    return rows, torch.isin(sample.vae_indexes[rows], sample.mse_indexes)


def cache_for(jobs: Sequence[Job], config, device, dtype: torch.dtype) -> KVCache:
    """One layer's keys and values, as long as the longest context and block; `config` is that of one layer."""
    longest = max((len(job.sample.ids) for job in jobs if job.steps), default=1)
    return KVCache(config, longest, 1, device, dtype)


def run_layer(layer: Layer, pieces: Sequence[Piece], cache: KVCache, recorder: Recorder) -> None:
    """Every piece through one layer."""
    for piece in pieces:
        if piece.fresh:
            cache.length = 0
        if piece.recorded:
            recorder.begin(piece.place, piece.hidden)
        else:
            recorder.quiet()
        routing = piece.call.routing
        piece.hidden.copy_(routing.merge(layer(routing.split(piece.hidden), piece.call)))
        if piece.forward.step is None and piece.call.caches:
            cache.advance(piece.hidden.shape[1])


def move_on(lance: Lance, jobs: Sequence[Job], pieces: Sequence[Piece]) -> None:
    """One Euler step of the sampler for the jobs whose result is unknown (Lance spec sec. 12)."""
    blocks = {}
    for piece in pieces:
        if piece.forward.step is not None:
            blocks.setdefault(piece.forward.job, {})[piece.forward.branch] = piece
    for job in jobs:
        if job.goal is None and job.index in blocks:
            _euler(lance, job, blocks[job.index])


def _euler(lance: Lance, job: Job, block: dict[int, Piece]) -> None:
    step = block[CONDITIONAL].forward.step
    grid = timesteps(job.flow)
    norm = lance.language_model.model.norm_moe_gen
    v = {branch: lance.llm2vae(norm(piece.hidden[0, 1:-1])) for branch, piece in block.items()}
    guided = is_guided(grid[step.index], job.flow)
    rows, moves = block_rows(job)
    velocity = guide(Velocities(v[CONDITIONAL], v[UNCONDITIONAL] if guided else None), job.flow, moves.to(lance.device))
    change = velocity.cpu()[moves] * (grid[step.index] - grid[step.index + 1])
    job.state[rows[moves]] = (job.state[rows[moves]] - change).to(torch.bfloat16).float()  # quirk Q6: a bf16 state
