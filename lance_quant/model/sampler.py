"""The flow sampler: Euler steps from noise to latents, with guidance by dropping the caption (Lance spec sec. 12, 13).

    flow = CachedFlow(lance, sample, state, cfg)
    state = run_flow(flow, state, cfg)

The state holds the latents of every VAE block, float32 or bfloat16 as the model is [n_vae, 48]; velocity points from
data to noise. One loop serves generation, evaluation and calibration.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from lance_quant.errors import LanceQuantError
from lance_quant.model.attention import Span
from lance_quant.model.cache import KVCache
from lance_quant.model.lance import Lance
from lance_quant.model.positions import CAPTION, generation_positions
from lance_quant.model.routing import Routing
from lance_quant.model.sequence import Sample

RENORMS = ("global", "channel", "none")
TOGETHER_ROWS = 8192  # latents up to which the two branches of a step share a batch: 2 x 2,304 for a 768 px picture


@dataclass(kw_only=True)
class FlowConfig:
    """Sampler settings; the defaults are upstream's launcher's (Lance spec sec. 18).

    guidance acts at timesteps in (low, high]; bf16_norms: compute the renormalisation's norms in bfloat16, as CPU
    autocast does (the parity fixtures), instead of float32 as on a GPU. cached: keep the context's keys and values.
    faithful: off mends what upstream's sampler does by accident: the unconditional context's positions (quirk Q3),
    norms over the frozen frame of i2v (Q4), a bfloat16 state (Q6).
    """

    steps: int = 30
    timestep_shift: float = 3.5
    guidance: float = 4.0
    guidance_low: float = 0.4
    guidance_high: float = 1.0
    renorm: str = "global"
    renorm_min: float = 0.0
    cached: bool = True
    faithful: bool = True
    bf16_norms: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise LanceQuantError(f"steps={self.steps} must be at least 1")
        if not 0 < self.timestep_shift < math.inf:  # said so that NaN fails too, here and below
            raise LanceQuantError(f"timestep_shift={self.timestep_shift} must be positive and finite")
        if not 0 <= self.guidance < math.inf:
            raise LanceQuantError(f"guidance={self.guidance} must be at least 0 and finite: up to 1 it is off")
        if self.renorm not in RENORMS:
            raise LanceQuantError(f"renorm='{self.renorm}' is unknown: take one of {', '.join(RENORMS)}")


class Velocities(NamedTuple):
    """Conditional and, where guidance is on, unconditional velocity, each [rows, 48]."""

    conditional: torch.Tensor
    unconditional: torch.Tensor | None


class Flow(Protocol):
    rows: torch.Tensor
    """State rows that the velocities are of."""

    def velocities(self, state: torch.Tensor, t: torch.Tensor, guided: bool) -> Velocities: ...


def timesteps(cfg: FlowConfig) -> torch.Tensor:
    """float32 [steps + 1], from 1 to 0 (Lance spec sec. 12)."""
    s = torch.linspace(1, 0, cfg.steps + 1)
    return cfg.timestep_shift * s / (1 + (cfg.timestep_shift - 1) * s)


def is_guided(t: torch.Tensor, cfg: FlowConfig) -> bool:
    """Compared in float32: a timestep equal to float32(0.4) is off (quirk Q8)."""
    low, high = torch.tensor(cfg.guidance_low), torch.tensor(cfg.guidance_high)
    return cfg.guidance > 1 and bool(low < t) and bool(t <= high)


def guide(velocities: Velocities, cfg: FlowConfig, moving: torch.Tensor | None = None) -> torch.Tensor:
    """Guided velocity [rows, 48], rescaled to at most the conditional one's norm.

    moving: bool [rows], the rows that the norms are taken over where cfg.faithful is off.
    """
    conditional, unconditional = velocities
    if unconditional is None:
        return conditional
    guided = unconditional + cfg.guidance * (conditional - unconditional)
    if cfg.renorm == "none":
        return guided

    def norm(v: torch.Tensor) -> torch.Tensor:
        wide = v.to(v.dtype if cfg.bf16_norms else torch.float32)
        if cfg.renorm == "channel":
            return torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        if moving is not None and not cfg.faithful:
            wide = wide[moving]
        return torch.linalg.vector_norm(wide)  # quirk Q4: over every row, the frozen frame of i2v included

    scale = (norm(conditional) / (norm(guided) + 1e-8)).clamp(min=cfg.renorm_min, max=1.0)
    return (guided * scale).to(guided.dtype)


class CachedFlow:
    """Denoising over a kept context: only the target block runs at each step (Lance spec sec. 13; upstream's default).

    The two branches of a guided step run as one batch up to TOGETHER_ROWS latents; beyond, they would win nothing and
    need twice the memory. The unconditional context keeps the conditional positions while its target is placed anew
    (quirk Q3), unless cfg.faithful is off.
    """

    @torch.inference_mode()
    def __init__(self, lance: Lance, sample: Sample, state: torch.Tensor, cfg: FlowConfig):
        self.lance, self.sample = lance, sample
        device = lance.device
        conditional, unconditional, kept = generation_positions(
            sample.ids, sample.grids, sample.modality, lance.config.video_token_id
        )
        target = next(span for span in sample.spans() if span[2] == "noise")
        self.start, self.end = target[:2]
        in_target = (sample.vae_indexes >= self.start) & (sample.vae_indexes < self.end)
        self.rows = in_target.nonzero().squeeze(1)
        moves = torch.isin(sample.vae_indexes, sample.mse_indexes)
        self._target_rows = self.rows.to(device)
        self.routing = Routing.of(sample.latent_mask()[self.start : self.end]).to(device)
        self._moves_in_target = moves[self.rows].float().to(device)

        table = lance.latent_table(sample.latent_grids)
        self.table = table[self._target_rows]
        hidden = lance.embed(sample, lance.embed_latents(state.to(device), moves.float().to(device), table))
        self.ends = hidden[:, self.start, None], hidden[:, self.end - 1, None]
        bare = None
        if cfg.guidance > 1:
            bare = conditional
            if not cfg.faithful:
                bare = conditional.clone()
                bare[:, kept] = unconditional
        self.caches = self._contexts(hidden, conditional, bare)
        placed = [conditional[:, self.start : self.end]]
        if bare is not None:
            placed.append(unconditional[:, self.caches[1].length :][:, : self.end - self.start])
        self.positions = torch.stack(placed).to(device)

    def _contexts(self, hidden: torch.Tensor, conditional: torch.Tensor, bare: torch.Tensor | None) -> list[KVCache]:
        """The context at its positions; with `bare`, also the one without the caption at those. What stands before the
        caption is placed alike in both and does not see it, so the second takes it over from the first."""
        sample, lance = self.sample, self.lance
        shape = lance.config, self.end, 1, lance.device, hidden.dtype
        cache, known = KVCache(*shape), first_caption(sample, self.start)
        spans = [span for span in sample.spans() if span[0] < self.start]
        others = [span for span in spans if span[0] >= known and sample.modality[span[0]] != CAPTION]
        if lance.fast is not None:
            spans, others = joined(spans), joined(others)
        at_once = lance.fast is not None and bare is not None and self._fit_at_once(spans, others, known)
        for span in spans[:-1] if at_once else spans:
            self._prefill(hidden, conditional, span, cache)
        if bare is None:
            return [cache]
        without = KVCache(*shape)
        if at_once:
            self._prefill_at_once(hidden, (conditional, bare), spans[-1], known, others[0], cache)
            without.take(cache, 0, known)
            without.take(cache, self.start, cache.length)
            cache.length = self.start
            return [cache, without]
        without.take(cache, 0, known)
        for span in others:
            self._prefill(hidden, bare, span, without)
        return [cache, without]

    def _prefill(self, hidden: torch.Tensor, positions: torch.Tensor, span: Span, cache: KVCache) -> None:
        start, end, mode = span
        self.lance.language_model.model(
            hidden[:, start:end],
            positions[:, start:end].to(hidden.device),
            Routing.of(self.sample.latent_mask()[start:end]).to(hidden.device),
            [(0, end - start, mode)],
            cache,
        )

    def _fit_at_once(self, spans: Sequence[Span], others: Sequence[Span], known: int) -> bool:
        """Whether the one's last text holds the caption, and the other has but that text's end left to run."""
        if len(others) != 1 or spans[-1][2] != "causal" or others[0][2] != "causal":
            return False
        again = others[0][1] - others[0][0]
        return spans[-1][0] <= known and others[0][1] == self.start and self.start + again <= self.end

    def _prefill_at_once(
        self,
        hidden: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        span: Span,
        known: int,
        other: Span,
        cache: KVCache,
    ) -> None:
        """The last text, and behind it once more its end at its positions without the caption, which does not see what
        begins with the caption: the host launches the layers' kernels once for both."""
        rows = [slice(*span[:2]), slice(*other[:2])]
        first, start, length = span[0], self.start - span[0], other[1] - other[0]
        text = [(0, known - first, "causal"), (known - first, start, "aside"), (start, start + length, "causal")]
        placed = torch.cat([each[:, part] for each, part in zip(positions, rows, strict=True)], dim=1)
        self.lance.language_model.model(
            torch.cat([hidden[:, part] for part in rows], dim=1),
            placed.to(hidden.device),
            Routing(),
            [part for part in text if part[0] < part[1]],
            cache,
        )

    @torch.inference_mode()
    def velocities(self, state: torch.Tensor, t: torch.Tensor, guided: bool) -> Velocities:
        """state [n_vae, 48] at timestep t (0-dim) -> velocities of all rows of the target block."""
        lance = self.lance
        rows = state.to(lance.device)[self._target_rows]
        latents = lance.embed_latents(rows, t.to(lance.device) * self._moves_in_target, self.table)[None]
        block = torch.cat((self.ends[0], latents, self.ends[1]), dim=1)
        branches = 2 if guided else 1
        together = branches if len(self.rows) <= TOGETHER_ROWS else 1
        out = []
        for first in range(0, branches, together):
            part = slice(first, first + together)
            hidden = lance.language_model.model(
                block.expand(together, -1, -1), self.positions[part], self.routing, cache=self.caches[part], keep=False
            )
            out.extend(lance.llm2vae(hidden)[:, 1:-1])
        return Velocities(out[0], out[1] if guided else None)


def joined(spans: Sequence[Span]) -> list[Span]:
    """Texts that follow each other as one: one by one, as upstream runs them, they give the same and take longer."""
    out: list[Span] = []
    for start, end, mode in spans:
        if out and out[-1][1:] == (start, "causal") and mode == "causal":
            start = out.pop()[0]
        out.append((start, end, mode))
    return out


def first_caption(sample: Sample, end: int) -> int:
    """Where the caption begins; `end` where there is none before it."""
    starts = [start for start, _, _ in sample.spans() if start < end and sample.modality[start] == CAPTION]
    return min(starts, default=end)


class UncachedFlow:
    """The whole sequence at every step (Lance spec sec. 10, 13); velocities of the moving rows."""

    @torch.inference_mode()
    def __init__(self, lance: Lance, sample: Sample, state: torch.Tensor, cfg: FlowConfig):
        self.lance, self.sample = lance, sample
        device = lance.device
        self.rows = sample.denoised_rows()
        self.moves = torch.isin(sample.vae_indexes, sample.mse_indexes).float().to(device)
        self.table = lance.latent_table(sample.latent_grids)
        self.hidden = lance.embed(sample, lance.embed_latents(state.to(device), self.moves, self.table))
        self._latent_places = sample.vae_indexes.to(device)
        conditional, unconditional, kept = generation_positions(
            sample.ids, sample.grids, sample.modality, lance.config.video_token_id
        )
        everything = torch.arange(len(sample.ids))
        self.branches = [
            (
                rows.to(device),
                positions.to(device),
                sample.spans_of(rows),
                Routing.of(sample.latent_mask()[rows]).to(device),
                torch.isin(rows, sample.mse_indexes).nonzero().squeeze(1).to(device),
            )
            for rows, positions in ((everything, conditional), (kept, unconditional))
        ]

    @torch.inference_mode()
    def velocities(self, state: torch.Tensor, t: torch.Tensor, guided: bool) -> Velocities:
        lance = self.lance
        self.hidden[0, self._latent_places] = lance.embed_latents(
            state.to(lance.device), t.to(lance.device) * self.moves, self.table
        )
        out = []
        for rows, positions, spans, routing, moving in self.branches[: 2 if guided else 1]:
            hidden = lance.language_model.model(self.hidden[:, rows], positions, routing, spans)
            out.append(lance.llm2vae(hidden[0, moving]))
        return Velocities(out[0], out[1] if guided else None)


def start_flow(lance: Lance, sample: Sample, state: torch.Tensor, cfg: FlowConfig) -> Flow:
    if not cfg.cached:
        return UncachedFlow(lance, sample, state, cfg)
    flow = CachedFlow(lance, sample, state, cfg)
    return flow if lance.fast is None else lance.fast.denoising(flow)


def initial_state(sample: Sample, seed: int, channels: int, dtype: torch.dtype, device="cpu") -> torch.Tensor:
    """Noise [n_vae, 48] from a seed, clean rows put in (Lance spec sec. 17). Drawn on the CPU: the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(len(sample.vae_indexes), channels, generator=generator).to(dtype)
    moves = torch.isin(sample.vae_indexes, sample.mse_indexes)
    start = 0
    latents = sample.clean_latents or (None,) * len(sample.latent_grids)
    for grid, clean in zip(sample.latent_grids, latents, strict=True):
        count = grid[0] * grid[1] * grid[2]
        if clean is not None:
            rows = torch.arange(start, start + count)[~moves[start : start + count]]
            state[rows] = clean.flatten(0, 2)[rows - start].to(dtype)
        start += count
    return state.to(device)


@torch.inference_mode()
def run_flow(
    flow: Flow,
    state: torch.Tensor,
    cfg: FlowConfig,
    on_step: Callable[[int, torch.Tensor, torch.Tensor, Velocities], None] | None = None,
) -> torch.Tensor:
    """Euler from t = 1 to 0; returns the final state [n_vae, 48].

    on_step(step, t, state, velocities) sees the state at the start of each step. The state keeps its dtype: bfloat16
    in a bf16 model, as upstream (quirk Q6); float32 where cfg.faithful is off.
    """
    t = timesteps(cfg)
    state = state.to(state.dtype if cfg.faithful else torch.float32, copy=True)
    device = state.device
    moving = torch.isin(flow.rows, flow.sample.denoised_rows())
    which, rows = moving.nonzero().squeeze(1).to(device), flow.rows[moving].to(device)
    moving, times, steps = moving.to(device), t.to(device), (t[:-1] - t[1:]).to(device)  # no step waits for the host
    for step in range(cfg.steps):
        velocities = flow.velocities(state, times[step], is_guided(t[step], cfg))
        if on_step is not None:
            on_step(step, t[step], state, velocities)
        state[rows] = state[rows] - guide(velocities, cfg, moving)[which] * steps[step]
    return state
