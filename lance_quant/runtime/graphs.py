"""`Recorded`: a call over fixed tensors, CUDA graphs from its second run on; `Decoding` and `RecordedFlow` use it.

A decoding step embeds its token, runs the layers, chooses the next token and counts lengths and positions on, all on
the device, so that the host only starts it: one graph. A denoising step has its graphs for each number of branches.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cache

import torch

from lance_quant.model.attention import Span
from lance_quant.model.lance import Lance
from lance_quant.model.routing import Routing
from lance_quant.model.sampler import TOGETHER_ROWS, CachedFlow, Velocities
from lance_quant.runtime.attention import StaticCache
from lance_quant.runtime.fused import pausing

LEAST_CAPACITY = 512
LAYERS = 3  # of a denoising step in a graph: what the GPU does in 4.5 ms, and the host records in 4


_thread = threading.local()


def this_thread() -> object:
    """Of the running thread alone, unlike its number, which a later one may get: plans of attention and handles are a
    thread's own, and must be there before anything is recorded."""
    if not hasattr(_thread, "token"):
        _thread.token = object()
    return _thread.token


class Recorded:
    """Runs a work that reads and writes the same tensors every time. On a GPU the first run is a plain one, which
    compiles what is to be compiled, and the next of the same thread is recorded; `out` is what the last run returned.

    compiled: all of it is, since this thread ran the like before, so that the first run is recorded. layers: of a
    decoder in a graph, None: all. Each graph is started as soon as it is recorded, so that the GPU works while the host
    records the next; nor does recording wait for what was started before.

    It does not keep the work: with it, it would keep whoever owns both, and the weights, from being freed.
    """

    def __init__(self, device: torch.device, graphs: bool = True, layers: int | None = None, compiled: bool = False):
        self.device, self.records, self.layers = device, graphs and device.type == "cuda", layers
        self.compiled = this_thread() if compiled else None  # by whom
        self.graphs, self.out = [], None

    def __call__(self, work: Callable[[], object]):
        if self.graphs:
            for graph in self.graphs:
                graph.replay()
        elif self.records and self.compiled is this_thread():
            self.graphs = self._record(work)
        else:
            self.out = work()
            self.compiled = this_thread()
        return self.out

    def _record(self, work: Callable[[], object]) -> list[torch.cuda.CUDAGraph]:
        """And run it."""
        stream, graphs, recording = _recording(self.device), [], False

        def begin() -> None:
            nonlocal recording
            pool = graphs[0].pool() if graphs else None  # in order, they may use each other's memory
            graphs.append(torch.cuda.CUDAGraph())
            # other threads may use their GPU meanwhile
            graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")
            recording = True

        def end() -> None:
            nonlocal recording
            recording = False
            graphs[-1].capture_end()

        def go_on() -> None:
            end()
            graphs[-1].replay()
            begin()

        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            begin()
            try:
                with pausing(self.layers, go_on):
                    self.out = work()
            finally:
                if recording:
                    end()
            graphs[-1].replay()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return graphs


@cache
def _recording(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device, since cuBLAS keeps its working memory for every stream that it has seen."""
    return torch.cuda.Stream(device)


def capacity_for(tokens: int) -> int:
    """Room for that many, of few sizes: each has a graph of its own."""
    capacity = LEAST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    return capacity


class Decoding:
    """One more token for each of `batch` answers, each behind its own context, again and again.

    1. `fill` every row   2. `run` as often as tokens are wanted   3. read `token` after each; 1 again
    """

    def __init__(self, lance: Lance, batch: int, capacity: int, graphs: bool = True):
        self.model, self.known, device = lance.language_model, lance.config.tokenizer_length, lance.device
        self.cache = StaticCache(lance.config, batch, capacity, device, lance.dtype)
        self.token = torch.zeros(batch, device=device, dtype=torch.int64)
        self.position = torch.zeros(batch, 3, 1, device=device, dtype=torch.int64)
        self.upcoming = torch.zeros(batch, 1, 1, device=device, dtype=torch.int64)
        self.recorded = Recorded(device, graphs)

    def fill(self, row: int, context: torch.Tensor, positions: torch.Tensor, last: int, spans: Sequence[Span]) -> None:
        """context [1, n, H] at positions [3, n + more] into the cache, all but its last token, whose id is `last`."""
        length = context.shape[1] - 1
        self.model.model(context[:, :length], positions[:, :length], Routing(), spans, self.cache.row(row))
        self.cache.lengths[row] = length
        self.token[row] = last
        self.position[row] = positions[:, length : length + 1]
        self.upcoming[row] = positions[:, length + 1 :][:, :1].amax() if positions.shape[1] > length + 1 else 0

    def run(self) -> torch.Tensor:
        """One step; the logits [B, vocab] that `token` was chosen from, overwritten by the next run."""
        return self.recorded(self._step)

    def _step(self) -> torch.Tensor:
        decoder = self.model.model
        states = decoder.step(decoder.embed_tokens(self.token)[:, None], self.position, self.cache)
        logits = self.model.lm_head(states[:, -1])
        self.token.copy_(logits[:, : self.known].argmax(-1))  # quirk Q10
        self.position.copy_(self.upcoming.expand_as(self.position))
        self.upcoming += 1
        self.cache.lengths += 1
        return logits


class Tokens:
    """The tokens of a run `Decoding`, one a call. The next step starts before a token is read, so that the GPU does not
    wait for the host; a step too many at the end does no harm."""

    def __init__(self, decoding: Decoding, most: int):
        self.decoding, self.most = decoding, most
        self.on_gpu = decoding.token.is_cuda
        self.read = torch.zeros(most, len(decoding.token), dtype=torch.int64, pin_memory=self.on_gpu)
        self.events: list = []

    def next(self, tokens: list[int], keep_logits: bool) -> tuple[int, torch.Tensor | None]:
        """As `understanding._Steps.next`: the token of row 0, and its logits where they are kept."""
        at = len(tokens)
        self.start(at + 1)
        logits = self.decoding.recorded.out[0].clone() if keep_logits else None
        if not keep_logits:
            self.start(min(at + 2, self.most))
        return self.row(at)[0], logits

    def start(self, count: int) -> None:
        """See to it that `count` steps are on their way."""
        while len(self.events) < count:
            self.decoding.run()
            self.read[len(self.events)].copy_(self.decoding.token, non_blocking=True)
            event = None
            if self.on_gpu:
                event = torch.cuda.Event()
                event.record()
            self.events.append(event)

    def row(self, at: int) -> list[int]:
        """The tokens of step `at`, once it is done."""
        if self.events[at] is not None:
            self.events[at].synchronize()
        return self.read[at].tolist()


class RecordedFlow:
    """A `CachedFlow` whose steps are graphs: same velocities. Steps too long to share a batch run as they are.

    seen: what sizes of steps this thread has run before, from one drawing to the next.
    """

    def __init__(self, flow: CachedFlow, graphs: bool = True, seen: set[tuple] | None = None):
        self.flow, self.rows, self.sample = flow, flow.rows, flow.sample
        self.seen = set() if seen is None else seen
        self.graphs = graphs and len(flow.rows) <= TOGETHER_ROWS
        self.state = self.t = None
        self.steps: dict[bool, Recorded] = {}

    @torch.inference_mode()
    def velocities(self, state: torch.Tensor, t: torch.Tensor, guided: bool) -> Velocities:
        device = self.flow.lance.device
        if self.state is None or self.state.dtype != state.dtype:
            self.state = torch.empty_like(state, device=device)
            self.t = torch.empty((), device=device)
            self.steps.clear()
        self.state.copy_(state)
        self.t.copy_(t)
        if guided not in self.steps:
            self.steps[guided] = Recorded(device, self.graphs, LAYERS, self._size(guided) in self.seen)
        out = self.steps[guided](lambda: self.flow.velocities(self.state, self.t, guided))
        self.seen.add(self._size(guided))
        return Velocities(*(part if part is None else part.clone() for part in out))

    def _size(self, guided: bool) -> tuple:
        """What kernels are compiled and planned for."""
        lengths = (cache.length for cache in self.flow.caches)
        return guided, len(self.rows), *self.state.shape, self.state.dtype, *lengths
