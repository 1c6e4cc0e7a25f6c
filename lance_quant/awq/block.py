"""`Block`: one layer of the product's own decoder, run on kept sequences with whatever weights are at hand.

    block = Block(config, layer, tensors, sequences, device)
    block.outputs(tensors, batch)      what the layer puts out
    block.site_rows(tensors)           what its linears read

Float32 throughout, or bfloat16 products under `autocast`; rotary frequencies are rounded as in the bf16 model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from lance_quant.awq.sequences import KeptSequence
from lance_quant.calibration.streaming import bare_decoder
from lance_quant.checkpoint.layout import PATHS, SITES, layer_prefix, layer_targets
from lance_quant.model.config import LanceConfig
from lance_quant.model.decoder import Call, Layer
from lance_quant.model.routing import Routing


@dataclass(frozen=True)
class Batch:
    """Sequences of one shape: states float32 [B, n, H], what the layer is to know of them, and each one's task."""

    states: Tensor
    call: Call
    latent: Tensor
    tasks: tuple[str, ...]

    def part(self, rows: Sequence[int]) -> "Batch":
        return Batch(self.states[list(rows)], self.call, self.latent, tuple(self.tasks[row] for row in rows))


class Block:
    """batches: the sequences, those of equal length, positions and spans together, in order of appearance."""

    def __init__(self, config: LanceConfig, layer: int, sequences: Sequence[KeptSequence], device: str):
        self.config, self.layer, self.device = config, layer, device
        with torch.device("meta"):
            self.module = Layer(config, 0).eval()
        self._prefix = layer_prefix(layer)
        decoder = bare_decoder(config)
        decoder.rope_inv_freq_bf16 = True
        groups: dict[tuple, list[KeptSequence]] = {}
        for one in sequences:
            key = (one.spans, one.positions.numpy().tobytes(), one.latent.numpy().tobytes())
            groups.setdefault(key, []).append(one)
        self.batches = [self._batch(decoder, group) for group in groups.values()]

    def _batch(self, decoder, group: list[KeptSequence]) -> Batch:
        states = torch.stack([one.states for one in group]).to(self.device).float()
        routing = Routing.of(group[0].latent).to(self.device)
        call = decoder.call(states, group[0].positions.to(self.device), routing, group[0].spans)
        return Batch(states, call, group[0].latent.to(self.device), tuple(one.task for one in group))

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

    @torch.no_grad()
    def site_rows(self, tensors: dict[str, Tensor]) -> dict[tuple[str, str], tuple[Tensor, list[str]]]:
        """(path, site) -> inputs float32 [n, I] that the linears read, and each row's task."""
        found: dict[tuple[str, str], tuple[list[Tensor], list[str]]] = {}
        sites = [(path, site) for path in PATHS for site in SITES]
        for batch in self.batches:
            for row, task in enumerate(batch.tasks):
                for key, inputs in self.trace(tensors, batch.part([row]), sites)[1].items():
                    parts, tasks = found.setdefault(key, ([], []))
                    parts.append(inputs[0])
                    tasks.extend([task] * inputs.shape[1])
        return {key: (torch.cat(parts), tasks) for key, (parts, tasks) in found.items()}
