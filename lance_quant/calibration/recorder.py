"""`Recorder`: hooks at the four input sites of every layer and path; statistics stay on the device.

Lifecycle:
1. `with Recorder(lance, tasks, rows_per_site, seed) as recorder:` puts the hooks in place;
2. `recorder.begin(task, sample, timestep)` says what the next forward calls are; forwards run as always;
3. `recorder.keep_sequence(...)` around one whole-sequence forward also keeps the states entering each layer;
4. `recorder.write(folder)` writes Parquet (schema: `activations.py`).

Nothing waits for the device during a forward: counts are known from shapes, and which rows a reservoir keeps is drawn
on the host, once a call for all sites of a path, so that the rows of a layer's sites belong to the same tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lance_quant.calibration.activations import (
    HIDDEN_SCHEMA,
    ROWS_SCHEMA,
    STATISTICS_SCHEMA,
    bit_patterns,
    layer_file,
)
from lance_quant.checkpoint.layout import PATHS, SITES, layer_targets
from lance_quant.model.lance import Lance
from lance_quant.model.request import GENERATION

Key = tuple[str, str, int, str]  # task, path, layer, site


@dataclass
class Reservoir:
    """Which of the tokens seen so far are kept: uniform, without replacement (algorithm R), the same for every site."""

    capacity: int
    generator: np.random.Generator
    seen: int = 0
    samples: list[int] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)

    def offer(self, count: int, sample: int, timestep: float) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of this call to keep, slots they take); a slot taken twice goes to the later token."""
        order = np.arange(self.seen, self.seen + count)
        slots = np.where(order < self.capacity, order, self.generator.integers(0, np.maximum(order, 1) + 1))
        self.seen += count
        chosen = {}
        for token in np.flatnonzero(slots < self.capacity):
            chosen[int(slots[token])] = int(token)
        for slot in sorted(chosen):
            if slot == len(self.samples):
                self.samples.append(sample)
                self.timesteps.append(timestep)
            else:
                self.samples[slot], self.timesteps[slot] = sample, timestep
        return np.array(list(chosen.values()), dtype=np.int64), np.array(list(chosen), dtype=np.int64)


@dataclass
class SiteSums:
    """Running sums of one task, path, layer and site, on the device."""

    absolute: torch.Tensor
    square: torch.Tensor
    largest: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def zeros(cls, channels: int, capacity: int, device) -> "SiteSums":
        wide = {"dtype": torch.float64, "device": device}
        return cls(
            torch.zeros(channels, **wide),
            torch.zeros(channels, **wide),
            torch.zeros(channels, dtype=torch.float32, device=device),
            torch.zeros(capacity, channels, dtype=torch.bfloat16, device=device),
        )

    def add(self, x: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor) -> None:
        """x [n, I]; the chosen tokens go to their slots."""
        wide = x.float()
        self.absolute += wide.abs().sum(0)
        self.square += wide.square().sum(0)
        torch.maximum(self.largest, wide.abs().amax(0), out=self.largest)
        self.rows.index_copy_(0, slots, x.index_select(0, tokens).to(torch.bfloat16))


class Recorder:
    """See the module's lifecycle. rows_per_site is the budget of a site, split over the tasks that reach its path."""

    def __init__(self, lance: Lance, tasks: list[str], rows_per_site: int, seed: int):
        self.lance, self.tasks = lance, tasks
        reached = {"und": tasks, "gen": [task for task in tasks if task in GENERATION]}
        self.sums: dict[Key, SiteSums] = {}
        self.reservoirs = {
            (task, path): Reservoir(
                max(1, rows_per_site // max(1, len(reached[path]))), np.random.default_rng([seed, index, side])
            )
            for index, task in enumerate(tasks)
            for side, path in enumerate(PATHS)
        }
        self._now: tuple[str, int, float] | None = None
        self._plan: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles: list = []
        self._states: list[torch.Tensor] | None = None
        self._call: dict | None = None
        self.sequences: list[dict] = []
        self.hidden: list[list[torch.Tensor]] = []

    def __enter__(self) -> "Recorder":
        decoder = self.lance.language_model.model
        self._handles.append(decoder.register_forward_pre_hook(self._on_call, with_kwargs=True))
        for index, layer in enumerate(decoder.layers):
            self._handles.append(layer.register_forward_pre_hook(self._on_layer))
            heard = set()
            for target in layer_targets(self.lance.config, index):
                if (target.path, target.site) in heard:
                    continue  # linears of a site read the same input: one of them is listened to
                heard.add((target.path, target.site))
                module = self.lance.get_submodule(target.name)
                self._handles.append(module.register_forward_pre_hook(self._site_hook(target)))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, task: str, sample: int, timestep: float = float("nan")) -> None:
        """The forward calls that follow belong to this task, sample index and timestep."""
        self._now = (task, sample, timestep)

    def pause(self) -> None:
        """The forward calls that follow are not recorded."""
        self._now = None

    def _on_call(self, module, args, kwargs) -> None:
        hidden, positions, routing = args[:3]
        if self._states is not None:
            self._call = {"positions": positions, "routing": routing}
        if self._now is None:
            return
        counts = {"und": hidden.shape[1] if routing.und is None else len(routing.und)}
        counts["gen"] = 0 if routing.gen is None else len(routing.gen)
        task, sample, timestep = self._now
        for path, count in counts.items():
            if count:
                chosen = self.reservoirs[task, path].offer(count, sample, timestep)
                self._plan[path] = tuple(_sent(torch.from_numpy(part), hidden.device) for part in chosen)

    def _on_layer(self, module, args) -> None:
        if self._states is not None:
            x, call = args
            self._states.append(call.routing.merge(x)[0].to("cpu", torch.bfloat16))

    def _site_hook(self, target):
        def hook(module, args) -> None:
            if self._now is None:
                return
            x = args[0].flatten(0, -2)
            key = (self._now[0], target.path, target.layer, target.site)
            if key not in self.sums:
                self.sums[key] = SiteSums.zeros(
                    target.in_features, self.reservoirs[self._now[0], target.path].capacity, x.device
                )
            self.sums[key].add(x, *self._plan[target.path])

        return hook

    @contextmanager
    def keep_sequence(self, spans: list[tuple[int, int, str]], task: str, timestep: float) -> Iterator[None]:
        """Keep the states entering each layer of the one whole-sequence forward inside the block."""
        self._states = []
        try:
            yield
            positions, routing = self._call["positions"].cpu(), self._call["routing"]
        finally:
            states, self._states, self._call = self._states, None, None
        count = positions.shape[-1]
        expert = np.full(count, "und", dtype=object)
        if routing.gen is not None:
            expert[routing.gen.cpu().numpy()] = "gen"
        split = np.concatenate([np.full(end - start, index) for index, (start, end, _) in enumerate(spans)])
        self.sequences.append(
            {
                "sequence": np.full(count, len(self.sequences), dtype=np.int32),
                "task": np.full(count, task, dtype=object),
                "timestep": np.full(count, timestep, dtype=np.float32),
                "token": np.arange(count, dtype=np.int32),
                **{axis: row.numpy().astype(np.int32) for axis, row in zip("thw", positions, strict=True)},
                "split": split.astype(np.int32),
                "mode": np.array([spans[index][2] for index in split], dtype=object),
                "expert": expert,
            }
        )
        self.hidden.append(states)

    def tokens(self, task: str, path: str) -> int:
        """Tokens that every site of this path saw in this task."""
        return self.reservoirs[task, path].seen

    def write(self, folder: Path) -> None:
        """Write the Parquet files of `activations.py` into an existing folder."""
        layers = range(self.lance.config.num_hidden_layers)
        coverage = [
            {"task": task, "path": path, "layer": layer, "site": site, "tokens": self.tokens(task, path)}
            for task in self.tasks
            for path in PATHS
            for layer in layers
            for site in SITES
        ]
        pq.write_table(pa.Table.from_pylist(coverage), folder / "coverage.parquet")
        for path in PATHS:
            for layer in layers:
                self._write_layer(folder, path, layer)
        if self.sequences:
            names = self.sequences[0]
            table = {name: np.concatenate([sequence[name] for sequence in self.sequences]) for name in names}
            pq.write_table(pa.table(table), folder / "sequences.parquet")
            for layer in layers:
                self._write_hidden(folder, layer)

    def _write_layer(self, folder: Path, path: str, layer: int) -> None:
        statistics, rows = [], []
        for site in SITES:
            for task in self.tasks:
                sums = self.sums.get((task, path, layer, site))
                if sums is None:
                    continue
                kept = self.reservoirs[task, path]
                count = len(sums.absolute)
                statistics.append(
                    pa.table(
                        {
                            "task": [task] * count,
                            "site": [site] * count,
                            "channel": np.arange(count, dtype=np.int32),
                            "mean_abs": (sums.absolute / kept.seen).float().cpu().numpy(),
                            "mean_sq": (sums.square / kept.seen).float().cpu().numpy(),
                            "max_abs": sums.largest.cpu().numpy(),
                        }
                    )
                )
                count = len(kept.samples)
                rows.append(
                    pa.table(
                        {
                            "task": [task] * count,
                            "site": [site] * count,
                            "sample": np.array(kept.samples, dtype=np.int32),
                            "timestep": np.array(kept.timesteps, dtype=np.float32),
                            "row": bit_patterns(list(sums.rows[:count].cpu())),
                        }
                    )
                )
        for kind, tables, schema in (("statistics", statistics, STATISTICS_SCHEMA), ("rows", rows, ROWS_SCHEMA)):
            file = layer_file(folder, kind, path, layer)
            file.parent.mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(file, schema) as writer:  # a row group a site and task: readers take what they need
                for table in tables:
                    writer.write_table(table.cast(schema))

    def _write_hidden(self, folder: Path, layer: int) -> None:
        file = folder / "hidden" / f"layer={layer}" / "part.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(file, HIDDEN_SCHEMA) as writer:
            for index, states in enumerate(self.hidden):
                count = len(states[layer])
                columns = {
                    "sequence": np.full(count, index, dtype=np.int32),
                    "token": np.arange(count, dtype=np.int32),
                    "state": bit_patterns(list(states[layer])),
                }
                writer.write_table(pa.table(columns).cast(HIDDEN_SCHEMA))


def _sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without waiting for it: a copy from pageable memory would."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
