"""`Block`: one layer of the product's own decoder, run on kept sequences with whatever weights are at hand.

    block = Block(config, layer, sequences, device)
    block.outputs(tensors, batch)      what the layer puts out
    block.read(tensors)                that, the states behind attention and what its linears read

Float32 throughout, or bfloat16 products under `autocast`; rotary frequencies are rounded as in the bf16 model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from lance_quant.calibration.sequences import KeptSequence
from lance_quant.calibration.streaming import bare_decoder
from lance_quant.checkpoint.layout import NORMS, PATHS, SITES, SUFFIX, Target, layer_prefix, layer_targets
from lance_quant.devices import repeatable
from lance_quant.model.config import LanceConfig
from lance_quant.model.decoder import Call, Layer
from lance_quant.model.routing import Twin


@dataclass(frozen=True)
class ReadRows:
    """What the linears of a site read: bfloat16 [n, I], with each row's task and calibration sample."""

    rows: Tensor
    tasks: list[str]
    samples: list[int]


SiteInputs = dict[tuple[str, str], ReadRows]  # by (path, site)


@dataclass(frozen=True)
class Traced:
    """What a layer makes of sequences: states [B, n, H] behind attention (`middle`) and behind all of it (`out`), and
    what the linears of some (path, site) read, [B, k, I]: absent where no token came.
    """

    middle: Tensor
    out: Tensor
    rows: dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Batch:
    """Sequences of one shape: states float32 [B, n, H], what the layer is to know of them, their tasks, samples and
    numbers."""

    states: Tensor
    call: Call
    latent: Tensor
    tasks: tuple[str, ...]
    samples: tuple[int, ...]
    numbers: tuple[int, ...]

    def part(self, rows: Sequence[int]) -> "Batch":
        return replace(
            self,
            states=self.states[list(rows)],
            tasks=tuple(self.tasks[row] for row in rows),
            samples=tuple(self.samples[row] for row in rows),
            numbers=tuple(self.numbers[row] for row in rows),
        )


class Block:
    """batches: the sequences, those of equal length, positions and spans together, in order of appearance."""

    def __init__(self, config: LanceConfig, layer: int, sequences: Sequence[KeptSequence], device: str):
        self.config, self.layer, self.device = config, layer, device
        with torch.device("meta"):
            self.module = Layer(config, 0).eval()
        self._prefix = layer_prefix(layer)
        decoder = bare_decoder(config, rope_inv_freq_bf16=True)
        groups: dict[tuple, list[int]] = {}
        for number, one in enumerate(sequences):
            key = (one.spans, one.positions.numpy().tobytes(), one.latent.numpy().tobytes())
            groups.setdefault(key, []).append(number)
        self.batches = [self._batch(decoder, sequences, numbers) for numbers in groups.values()]

    def _batch(self, decoder, sequences: Sequence[KeptSequence], numbers: list[int]) -> Batch:
        group = [sequences[number] for number in numbers]
        states = torch.stack([one.states for one in group]).to(self.device).float()
        call = group[0].call(decoder, states)
        latent = group[0].latent.to(self.device)
        tasks, samples = tuple(one.task for one in group), tuple(one.sample for one in group)
        return Batch(states, call, latent, tasks, samples, tuple(numbers))

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

    def trace(self, tensors: dict[str, Tensor], batch: Batch, sites: Sequence[tuple[str, str]]) -> Traced:
        """`outputs` and what is on the way there."""
        rows: dict[tuple[str, str], Tensor] = {}
        middle: dict[str, Tensor | None] = {"gen": None}
        hooks = []
        for path in PATHS:
            norm = self.module.get_submodule(f"{NORMS[1]}{SUFFIX[path]}")
            hooks.append(norm.register_forward_pre_hook(lambda _, args, path=path: middle.update({path: args[0]})))
        for key in sites:
            target = next(t for t in layer_targets(self.config, self.layer) if (t.path, t.site) == key)
            hooks.append(
                self._linear(target).register_forward_pre_hook(lambda _, args, key=key: rows.update({key: args[0]}))
            )
        try:
            out = self.outputs(tensors, batch)
            return Traced(batch.call.routing.merge(Twin(middle["und"], middle["gen"])), out, rows)
        finally:
            for hook in hooks:
                hook.remove()

    def gradients(self, tensors: dict[str, Tensor], batch: Batch, behind: Tensor) -> list[Tensor | None]:
        """At the outputs of each linear [B, k, O], in the order of `layer_targets`, from `behind` [B, n, H], that at
        what the layer puts out; None where no token came."""
        targets = layer_targets(self.config, self.layer)
        outputs: dict[str, Tensor] = {}
        hooks = [
            self._linear(target).register_forward_hook(
                lambda _, args, out, name=target.name: outputs.update({name: out})
            )
            for target in targets
        ]
        try:
            with torch.enable_grad(), repeatable(self.device):
                states = batch.states.clone().requires_grad_()
                out = self.outputs(tensors, replace(batch, states=states))
                found = torch.autograd.grad(out, list(outputs.values()), behind)
        finally:
            for hook in hooks:
                hook.remove()
        by_name = dict(zip(outputs, found, strict=True))
        return [by_name.get(target.name) for target in targets]

    def _linear(self, target: Target) -> torch.nn.Module:
        return self.module.get_submodule(target.name.removeprefix(self._prefix))

    def site_rows(self, tensors: dict[str, Tensor]) -> SiteInputs:
        """What the linears read."""
        return self.read(tensors)[1]

    @torch.no_grad()
    def read(self, tensors: dict[str, Tensor]) -> tuple[list[Traced], SiteInputs]:
        """The states of each batch, without rows, and `site_rows`, in one go."""
        traces: list[Traced] = []
        found: dict[tuple[str, str], tuple[list[Tensor], list[str], list[int]]] = {}
        sites = [(path, site) for path in PATHS for site in SITES]
        for batch in self.batches:
            parts_of: list[Traced] = []
            for row, (task, sample) in enumerate(zip(batch.tasks, batch.samples, strict=True)):
                traced = self.trace(tensors, batch.part([row]), sites)
                parts_of.append(replace(traced, rows={}))
                for key, inputs in traced.rows.items():
                    parts, tasks, samples = found.setdefault(key, ([], [], []))
                    parts.append(inputs[0].to(torch.bfloat16))
                    tasks.extend([task] * inputs.shape[1])
                    samples.extend([sample] * inputs.shape[1])
            traces.append(
                Traced(torch.cat([one.middle for one in parts_of]), torch.cat([one.out for one in parts_of]), {})
            )
        together: SiteInputs = {}
        while found:  # each site's parts are gone before the next ones are put together
            key, (parts, tasks, samples) = found.popitem()
            together[key] = ReadRows(torch.cat(parts), tasks, samples)
        return traces, together
