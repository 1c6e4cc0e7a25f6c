"""`write_gradients`: what a change behind a layer does to what the model puts out, for kept sequences.

    gradients/layer=3/part.parquet             sequence, token, state: the gradient at what layer 3 puts out

From the last layer to the first, each run once more from the states that entered it. What is taken back is drawn so
that the mean square of what a gradient says of a change is

    of what is drawn    the squared relative error of the sequence's velocity (random signs, Hutchinson's)
    of what is said     twice the mean KL divergence of its tokens' distributions (Fisher information: the log
                        probability of a token drawn from each)

Second moments of such gradients at a linear's outputs are the output side of a Kronecker-factored Hessian (K-FAC, arXiv
1503.05671; for rounding YAQA, arXiv 2505.22988): `awq/outputs.py`.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lance_quant.calibration.activations import GRADIENTS, STATES_SCHEMA, states_file, table_writer, write_states
from lance_quant.calibration.sequences import KeptSequence, read_sequences
from lance_quant.calibration.streaming import bare_decoder, load_heads, stream_layers
from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.devices import repeatable
from lance_quant.model.decoder import Decoder, Layer
from lance_quant.model.lance import Lance
from lance_quant.progress import Progress
from lance_quant.seeds import seed_of

LOGIT_ROWS = 256  # tokens whose logits are there at once


@torch.enable_grad()
def write_gradients(
    checkpoint: Checkpoint, out: Path, tokens: int, seed: int, device: str, tell: Progress | None = None
) -> list[int]:
    """Add gradients of about `tokens` tokens to the capture artifact in `out`; returns the sequences' numbers.

    The draw follows from `seed` and the kind of device. Not to be called in inference mode. Holds two layers in
    float32, and what one sequence needs on its way through one.
    """
    last, decoder = checkpoint.config.num_hidden_layers - 1, bare_decoder(checkpoint.config, rope_inv_freq_bf16=True)
    behind, chosen = {}, []
    for index, layer in stream_layers(checkpoint, device, torch.float32, backwards=True):
        sequences = read_sequences(out, index)
        lance = load_heads(checkpoint, device, torch.float32) if index == last else None
        chosen = chosen or spread(sequences, tokens)
        before = {}
        for number in chosen if index or lance is not None else ():  # before the first layer there is none to tell
            one = sequences[number]
            entering = one.states.to(device).float().requires_grad_()
            with repeatable(device):
                leaving = run(layer, decoder, one, entering)
                if lance is not None:
                    draw = torch.Generator(device).manual_seed(seed_of(seed, number))
                    behind[number] = last_gradient(lance, leaving.detach(), one, draw)
                (gradient,) = torch.autograd.grad(leaving, entering, behind[number].to(leaving))
            before[number] = gradient.to(torch.bfloat16)
        with table_writer(states_file(out, GRADIENTS, index), STATES_SCHEMA) as writer:
            for number, gradient in behind.items():
                write_states(writer, number, gradient.cpu())
        behind = before
        if tell:
            tell(last + 1 - index, last + 1, f"layers, gradients of {len(chosen)} sequences")
    return chosen


def spread(sequences: Sequence[KeptSequence], tokens: int) -> list[int]:
    """Numbers of sequences of about so many tokens in all, as large a share of each task's as of any other's, one at
    least."""
    share = min(1.0, tokens / max(1, sum(len(one.states) for one in sequences)))
    by_task = defaultdict(list)
    for number, one in enumerate(sequences):
        by_task[one.task].append(number)
    chosen = []
    for numbers in by_task.values():
        count = max(1, round(share * len(numbers)))
        chosen += [numbers[place * len(numbers) // count] for place in range(count)]
    return sorted(chosen)


def run(layer: Layer, decoder: Decoder, one: KeptSequence, states: Tensor) -> Tensor:
    """What a layer makes of a sequence's states [n, H]."""
    call = one.call(decoder, states[None])
    return call.routing.merge(layer(call.routing.split(states[None]), call))[0]


def last_gradient(lance: Lance, states: Tensor, one: KeptSequence, draw: torch.Generator) -> Tensor:
    """bfloat16 [n, H] at states [n, H], what the last layer makes of a sequence."""
    decoder, gradient = lance.language_model.model, torch.zeros_like(states, dtype=torch.bfloat16)
    drawn, said = (at.nonzero().squeeze(1).to(states.device) for at in (one.drawn, one.said))
    if len(drawn):
        some = states[drawn].requires_grad_()
        velocity = lance.llm2vae(decoder.norm_moe_gen(some)).float()
        signs = torch.randint(0, 2, velocity.shape, generator=draw, device=states.device) * 2.0 - 1
        along = (velocity * signs).sum() / velocity.detach().norm().clamp(min=1e-30)
        gradient[drawn] = torch.autograd.grad(along, some)[0].to(torch.bfloat16)
    for rows in said.split(LOGIT_ROWS):
        some = states[rows].requires_grad_()
        likely = lance.language_model.lm_head(decoder.norm(some)).float().log_softmax(-1)
        # a token of each distribution: the least of exponential draws, each over what is likely
        waits = torch.empty_like(likely.detach()).exponential_(generator=draw).log() - likely.detach()
        along = likely.gather(1, waits.argmin(-1, keepdim=True)).sum() / len(said) ** 0.5
        gradient[rows] = torch.autograd.grad(along, some)[0].to(torch.bfloat16)
    return gradient
