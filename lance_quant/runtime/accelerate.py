"""`accelerate(lance)`: the same model, faster: fused layers, one CUDA graph per decoding and denoising step.

lance = accelerate(load_lance(checkpoint, "cuda"))

Weights are taken over, not copied. Tokens and velocities are those of the plain model up to the rounding of its dtype.
"""

import weakref
from collections.abc import Sequence

import torch

from lance_quant.errors import LanceQuantError
from lance_quant.model.lance import Lance
from lance_quant.model.sampler import CachedFlow
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import Answer, context_of, context_spans
from lance_quant.runtime.fused import fuse_decoder, use_early
from lance_quant.runtime.graphs import Decoding, RecordedFlow, Tokens, capacity_for, this_thread

CHOICES = ("auto", "on", "off")


def accelerate(lance: Lance, choice: str = "auto", graphs: bool = True, early: bool = True) -> Lance:
    """choice: auto does it on a GPU only; on: anywhere. graphs: off runs fused layers one kernel launch at a time.
    early: kernels start before their predecessors end, where the GPU can do that.

    Triton's kernels run on the thread's current GPU: on another than the first one, `with torch.cuda.device(...)`
    around every call.
    """
    check_choice(choice)
    if choice == "off" and lance.fast is not None:
        raise LanceQuantError("accelerate=off: this model is accelerated, and its layers are fused; load it anew")
    if choice == "on" or (choice == "auto" and lance.device.type == "cuda"):
        fuse_decoder(lance.language_model)
        use_early(lance.language_model.model, early)
        lance.fast = Fast(lance, graphs)
    return lance


def check_choice(choice: str) -> None:
    if choice not in CHOICES:
        raise LanceQuantError(f"accelerate={choice} is unknown: take one of {', '.join(CHOICES)}")


class Fast:
    """The `FastPath` of one model. Decoding steps are kept per number of answers and capacity; of drawings, what sizes
    there were."""

    def __init__(self, lance: Lance, graphs: bool = True):
        self.lance, self.graphs = weakref.proxy(lance), graphs  # the model owns this, and is freed without it
        self.decodings: dict[tuple[int, int], Decoding] = {}
        self.drawn: dict[tuple, set[tuple]] = {}

    def denoising(self, flow: CachedFlow) -> RecordedFlow:
        decoder = self.lance.language_model.model
        how = this_thread(), decoder.early  # kernels are compiled anew where they may start early
        return RecordedFlow(flow, self.graphs, self.drawn.setdefault(how, set()))

    def decoding(self, context: torch.Tensor, positions: torch.Tensor, sample: Sample, extra: int) -> Tokens:
        decoding = self.room(1, context.shape[1] + extra + 1)
        length = context.shape[1] - 1
        decoding.fill(0, context, positions, int(sample.ids[length]), context_spans(sample, length))
        return Tokens(decoding, extra)

    def room(self, batch: int, tokens: int) -> Decoding:
        """The decoding step of so many answers of at most so many tokens, context included."""
        key = (batch, capacity_for(tokens))
        if key not in self.decodings:
            self.decodings[key] = Decoding(self.lance, *key, graphs=self.graphs)
        return self.decodings[key]


@torch.inference_mode()
def answer_together(lance: Lance, samples: Sequence[Sample], max_new_tokens: int = 256) -> list[Answer]:
    """Greedy answers of several contexts, decoded in one batch by an accelerated model."""
    if lance.fast is None:
        raise LanceQuantError("answer_together takes an accelerated model: accelerate(lance, 'on') first")
    if not samples:
        return []
    contexts = [context_of(lance, sample, max_new_tokens) for sample in samples]
    decoding = lance.fast.room(len(samples), max(each[0].shape[1] for each in contexts) + max_new_tokens + 1)
    for row, (sample, (context, positions)) in enumerate(zip(samples, contexts, strict=True)):
        length = context.shape[1] - 1
        decoding.fill(row, context, positions, int(sample.ids[length]), context_spans(sample, length))
    steps, stop = Tokens(decoding, max_new_tokens), lance.config.eos_token_id
    answers: list[list[int]] = [[] for _ in samples]
    for at in range(max_new_tokens):
        steps.start(min(at + 2, max_new_tokens))
        for tokens, token in zip(answers, steps.row(at), strict=True):
            if stop not in tokens[-1:]:
                tokens.append(token)
        if all(tokens[-1] == stop for tokens in answers):
            break
    return [Answer(tokens, None) for tokens in answers]
