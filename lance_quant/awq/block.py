"""`Block`: one layer of the product's own decoder, run on kept sequences with whatever weights are at hand.

    block = Block(config, layer, tensors, sequences, device)
    block.outputs(tensors, batch)      what the layer puts out
    block.read(tensors)                both that and what its linears read

Float32 throughout, or bfloat16 products under `autocast`; rotary frequencies are rounded as in the bf16 model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from lance_quant.awq.sequences import KeptSequence
from lance_quant.calibration.streaming import bare_decoder
from lance_quant.checkpoint.layout import PATHS, SITES, layer_prefix, layer_targets
from lance_quant.model.config import LanceConfig
from lance_quant.model.decoder import Call, Layer
from lance_quant.model.routing import Routing

SiteInputs = dict[tuple[str, str], tuple[Tensor, list[str]]]  # (path, site) -> bfloat16 [n, I], each row's task


@dataclass(frozen=True)
class Batch:
    """Sequences of one shape: states float32 [B, n, H], what the layer is to know of them, their tasks and numbers."""

    states: Tensor
    call: Call
    latent: Tensor
    tasks: tuple[str, ...]
    numbers: tuple[int, ...]

    def part(self, rows: Sequence[int]) -> "Batch":
        return replace(
            self,
            states=self.states[list(rows)],
            tasks=tuple(self.tasks[row] for row in rows),
            numbers=tuple(self.numbers[row] for row in rows),
        )


class Block:
    """batches: the sequences, those of equal length, positions and spans together, in order of appearance."""

    def __init__(self, config: LanceConfig, layer: int, sequences: Sequence[KeptSequence], device: str):
        self.config, self.layer, self.device = config, layer, device
        with torch.device("meta"):
            self.module = Layer(config, 0).eval()
        self._prefix = layer_prefix(layer)
        decoder = bare_decoder(config)
        decoder.rope_inv_freq_bf16 = True
        groups: dict[tuple, list[int]] = {}
        for number, one in enumerate(sequences):
            key = (one.spans, one.positions.numpy().tobytes(), one.latent.numpy().tobytes())
            groups.setdefault(key, []).append(number)
        self.batches = [self._batch(decoder, sequences, numbers) for numbers in groups.values()]

    def _batch(self, decoder, sequences: Sequence[KeptSequence], numbers: list[int]) -> Batch:
        group = [sequences[number] for number in numbers]
        states = torch.stack([one.states for one in group]).to(self.device).float()
        routing = Routing.of(group[0].latent).to(self.device)
        call = decoder.call(states, group[0].positions.to(self.device), routing, group[0].spans)
        tasks = tuple(one.task for one in group)
        return Batch(states, call, group[0].latent.to(self.device), tasks, tuple(numbers))

    def enter(self, states: dict[int, Tensor]) -> None:
        """Let other states [n, H] enter the layer: sequence number -> what earlier layers, rounded, make of it."""
        self.batches = [
            replace(batch, states=torch.stack([states[number] for number in batch.numbers]).to(self.device).float())
            for batch in self.batches
        ]

    @torch.no_grad()
    def leave(self, tensors: dict[str, Tensor]) -> dict[int, Tensor]:
        """Sequence number -> what the layer makes of it, bfloat16 [n, H] on the CPU."""
        out = {}
        for batch in self.batches:
            for row, number in enumerate(batch.numbers):
                out[number] = self.outputs(tensors, batch.part([row]))[0].to("cpu", torch.bfloat16)
        return out

    def outputs(self, tensors: dict[str, Tensor], batch: Batch) -> Tensor:
        """What the layer with `tensors` (keys as in the source file) puts out: [B, n, H]."""
        routing = batch.call.routing
        weights = {key.removeprefix(self._prefix): value for key, value in tensors.items()}
        return routing.merge(functional_call(self.module, weights, (routing.split(batch.states), batch.call)))

    def trace(
        self, tensors: dict[str, Tensor], batch: Batch, sites: Sequence[tuple[str, str]]
    ) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
        """`outputs`, and what the linears of some (path, site) read for it, [B, k, I]: absent where no token came."""
        rows: dict[tuple[str, str], Tensor] = {}
        hooks = []
        for key in sites:
            target = next(t for t in layer_targets(self.config, self.layer) if (t.path, t.site) == key)
            module = self.module.get_submodule(target.name.removeprefix(self._prefix))
            hooks.append(module.register_forward_pre_hook(lambda _, args, key=key: rows.update({key: args[0]})))
        try:
            return self.outputs(tensors, batch), rows
        finally:
            for hook in hooks:
                hook.remove()

    def site_rows(self, tensors: dict[str, Tensor]) -> SiteInputs:
        """What the linears read."""
        return self.read(tensors)[1]

    @torch.no_grad()
    def read(self, tensors: dict[str, Tensor]) -> tuple[list[Tensor], SiteInputs]:
        """What the layer puts out for each batch [B, n, H], and `site_rows`, in one go."""
        outs: list[Tensor] = []
        found: dict[tuple[str, str], tuple[list[Tensor], list[str]]] = {}
        sites = [(path, site) for path in PATHS for site in SITES]
        for batch in self.batches:
            rows_out = []
            for row, task in enumerate(batch.tasks):
                out, read = self.trace(tensors, batch.part([row]), sites)
                rows_out.append(out)
                for key, inputs in read.items():
                    parts, tasks = found.setdefault(key, ([], []))
                    parts.append(inputs[0].to(torch.bfloat16))
                    tasks.extend([task] * inputs.shape[1])
            outs.append(torch.cat(rows_out))
        together: SiteInputs = {}
        while found:  # each site's parts are gone before the next ones are put together
            key, (parts, tasks) = found.popitem()
            together[key] = (torch.cat(parts), tasks)
        return outs, together
