"""Answers: greedy decoding over a kept context, and teacher forcing (Lance spec sec. 14)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lance_quant.model.attention import Span
from lance_quant.model.cache import KVCache
from lance_quant.model.lance import Lance
from lance_quant.model.positions import rope_positions
from lance_quant.model.routing import Routing
from lance_quant.model.sequence import Sample


@dataclass(frozen=True)
class Answer:
    """Greedy tokens (the stop token included, where it was hit) and, if kept, each step's logits float32 [n, vocab]."""

    tokens: list[int]
    logits: torch.Tensor | None


def context_of(lance: Lance, sample: Sample, extra: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [1, n, H] of the context and positions [3, n + extra]; what is decoded counts on (no shift)."""
    ids = sample.ids[: sample.context_length]
    positions = rope_positions(ids, sample.grids, lance.config.video_token_id)
    more = positions[:, -1:].max() + 1 + torch.arange(extra)
    return lance.embed(sample)[:, : len(ids)], torch.cat((positions, more.expand(3, -1)), dim=1).to(lance.device)


def context_spans(sample: Sample, end: int) -> list[Span]:
    """The splits up to `end`, the last one cut."""
    return [(start, min(stop, end), mode) for start, stop, mode in sample.spans() if start < end]


def choose(logits: torch.Tensor, tokenizer_length: int) -> int:
    """The best id that the tokenizer knows (quirk Q10); the first one wins a tie."""
    return int(logits[..., :tokenizer_length].argmax(-1))


@torch.inference_mode()
def answer(
    lance: Lance,
    sample: Sample,
    max_new_tokens: int = 256,
    *,
    keep_logits: bool = False,
    cached: bool = True,
    on_token: Callable[[int, int], None] | None = None,
) -> Answer:
    """Decode greedily until the stop token or `max_new_tokens`; on_token(how many, the newest) after each.

    cached=False runs the whole sequence anew for every token, as upstream's uncached path does: same tokens, slow.
    """
    if cached and lance.fast is not None:
        steps = lance.fast.decoding(*context_of(lance, sample, max_new_tokens), sample, max_new_tokens)
    else:
        steps = (_CachedSteps if cached else _UncachedSteps)(lance, sample, max_new_tokens)
    tokens: list[int] = []
    kept = []
    while len(tokens) < max_new_tokens:
        token, logits = steps.next(tokens, keep_logits)
        tokens.append(token)
        if keep_logits:
            kept.append(logits.float())
        if on_token is not None:
            on_token(len(tokens), tokens[-1])
        if tokens[-1] == lance.config.eos_token_id:
            break
    return Answer(tokens, torch.stack(kept) if keep_logits else None)


class _Steps:
    """Logits [vocab] of a step, given the newest token; the choice is made on the host."""

    def next(self, tokens: list[int], keep_logits: bool) -> tuple[int, torch.Tensor]:
        logits = self(tokens[-1] if tokens else None)
        return choose(logits, self.lance.config.tokenizer_length), logits


class _CachedSteps(_Steps):
    """Prefill of all but the last context token; then one token a call. Only the understanding expert runs."""

    def __init__(self, lance: Lance, sample: Sample, extra: int):
        self.lance = lance
        self.decoder = lance.language_model.model
        hidden, self.positions = context_of(lance, sample, extra)
        length = hidden.shape[1] - 1
        self.cache = KVCache(lance.config, length + 1 + extra, 1, lance.device, hidden.dtype)
        spans = context_spans(sample, length)
        self.decoder(hidden[:, :length], self.positions[:, :length], Routing(), spans, self.cache)
        self.last = hidden[:, -1:]

    def __call__(self, token: int | None) -> torch.Tensor:
        hidden = self.last
        if token is not None:
            hidden = self.decoder.embed_tokens(torch.tensor([[token]], device=self.lance.device))
        at = self.cache.length
        state = self.decoder(hidden, self.positions[:, at : at + 1], Routing(), cache=self.cache)
        return self.lance.language_model.lm_head(state)[0, -1]


class _UncachedSteps(_Steps):
    def __init__(self, lance: Lance, sample: Sample, extra: int):
        self.lance, self.sample = lance, sample
        self.hidden, self.positions = context_of(lance, sample, extra)

    def __call__(self, token: int | None) -> torch.Tensor:
        decoder = self.lance.language_model.model
        if token is not None:
            new = decoder.embed_tokens(torch.tensor([[token]], device=self.lance.device))
            self.hidden = torch.cat((self.hidden, new), dim=1)
        states = _whole(self.lance, self.sample, self.hidden, self.positions)
        return self.lance.language_model.lm_head(states[0, -1])


def _whole(lance: Lance, sample: Sample, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One forward over context and answer over the whole sequence."""
    count = hidden.shape[1]
    spans = context_spans(sample, count)
    spans[-1] = (spans[-1][0], count, spans[-1][2])
    return lance.language_model.model(hidden, positions[:, :count], Routing(), spans)


@torch.inference_mode()
def forced_logits(lance: Lance, sample: Sample, tokens: list[int]) -> torch.Tensor:
    """Logits float32 [n, vocab] that predict each of `tokens` [n] from all before it, in one forward."""
    hidden, positions = context_of(lance, sample, len(tokens))
    ids = torch.tensor([tokens[:-1]], dtype=torch.int64, device=lance.device)
    hidden = torch.cat((hidden, lance.language_model.model.embed_tokens(ids)), dim=1)
    states = _whole(lance, sample, hidden, positions)
    return lance.language_model.lm_head(states[0, -len(tokens) :]).float()
