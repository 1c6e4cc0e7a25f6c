"""`Recorder`: hooks at the four input sites of both paths of the layer at hand; a layer's Parquet is written at once.

Lifecycle of a pass:
1. `recorder.start(pass)` makes room for the rows of its forwards;
2. for each layer `recorder.listen(layer)`, then `recorder.begin(place, hidden)` before each forward (`quiet()` before
   one that is not recorded), then `recorder.finish(index)`;
3. after the last pass, `recorder.close()`.

What a layer has seen so far waits on disk between passes. Nothing waits for the device during a forward: counts are
known from shapes, and rows were drawn on the host beforehand, so that a path's sites keep rows of the same tokens.
"""

import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lance_quant.calibration.activations import (
    HIDDEN,
    ROWS_SCHEMA,
    STATES_SCHEMA,
    STATISTICS_SCHEMA,
    bit_patterns,
    layer_file,
    states_file,
    table_writer,
    write_states,
)
from lance_quant.calibration.plan import KeptSequence, Plan
from lance_quant.checkpoint.layout import PATHS, SITES, layer_prefix, layer_targets
from lance_quant.model.config import LanceConfig
from lance_quant.model.decoder import Layer

SCRATCH = "scratch"


@dataclass
class SiteSums:
    """Weighted sums of one task, path and site: float64, the largest as it is."""

    absolute: torch.Tensor
    square: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def zeros(cls, channels: int, device) -> "SiteSums":
        return cls(*(torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, x: torch.Tensor, weight: float) -> None:
        """x [n, I]: each reduction reads it once and copies nothing."""
        norm = torch.linalg.vector_norm
        self.absolute.add_(norm(x, 1, dim=0, dtype=torch.float32), alpha=weight)
        length = norm(x, 2, dim=0, dtype=torch.float32).double()
        self.square.addcmul_(length, length, value=weight)
        torch.maximum(self.largest, norm(x, torch.inf, dim=0).double(), out=self.largest)

    def to(self, device) -> "SiteSums":
        return SiteSums(self.absolute.to(device), self.square.to(device), self.largest.to(device))


Sums = dict[tuple[str, str, str], SiteSums]  # task, path, site
Rows = dict[tuple[str, str], torch.Tensor]  # path, site -> bfloat16 [n, I]


class Recorder:
    """See the module's lifecycle."""

    def __init__(
        self, plan: Plan, config: LanceConfig, sequences: Sequence[KeptSequence], passes: int, out: Path, device: str
    ):
        self.plan, self.config, self.sequences, self.out, self.device = plan, config, sequences, Path(out), device
        self._passes, self._pass = passes, -1
        self._width = {(target.path, target.site): target.in_features for target in layer_targets(config, 0)}
        self._kept = {place for sequence in sequences for place in sequence.places}
        self._aside: dict[int, Sums] = {}
        self._slots: list[dict[str, np.ndarray]] = []
        self._sums: Sums = {}
        self._rows: Rows = {}
        self._entering: dict[int, torch.Tensor] = {}
        self._handles: list = []
        self._now: int | None = None
        self._taken: dict[tuple[int, str], tuple[torch.Tensor, int]] = {}
        self._writer = ThreadPoolExecutor(1)
        self._written: Future | None = None

    def start(self, places: Sequence[int]) -> None:
        """A pass over these places of `plan.forwards`, in order."""
        self._pass += 1
        self._taken, slots = {}, {path: [] for path in PATHS}
        for place in places:
            for path in PATHS:
                share = self.plan.shares.get((place, path))
                if share is not None:
                    tokens = torch.from_numpy(share.tokens).to(self.device)
                    self._taken[place, path] = (tokens, len(slots[path]))
                    slots[path] += range(share.first, share.first + len(share.tokens))
        self._slots.append({path: np.array(rows, dtype=np.int64) for path, rows in slots.items()})

    def listen(self, index: int, layer: Layer) -> None:
        """Put the hooks on a layer's linears: those of a site read the same input, so one of them is enough."""
        self._sums = {key: sums.to(self.device) for key, sums in self._aside.pop(index, {}).items()}
        self._rows = {
            (path, site): torch.empty(len(self._slots[-1][path]), width, dtype=torch.bfloat16, device=self.device)
            for (path, site), width in self._width.items()
        }
        heard = set()
        for target in layer_targets(self.config, index):
            if (target.path, target.site) not in heard:
                heard.add((target.path, target.site))
                module = layer.get_submodule(target.name.removeprefix(layer_prefix(index)))
                self._handles.append(module.register_forward_pre_hook(self._hook(target.path, target.site)))

    def begin(self, place: int, hidden: torch.Tensor) -> None:
        """The call that follows is this forward; hidden [1, n, H] enters the layer."""
        self._now = place
        if place in self._kept:
            self._entering[place] = hidden[0].to(torch.bfloat16, copy=True)

    def quiet(self) -> None:
        """The call that follows is not recorded."""
        self._now = None

    def _hook(self, path: str, site: str):
        def hook(module, args) -> None:
            share = None if self._now is None else self.plan.shares.get((self._now, path))
            if share is None:
                return
            x = args[0].flatten(0, -2)
            key = (self.plan.forwards[self._now].task, path, site)
            if key not in self._sums:
                self._sums[key] = SiteSums.zeros(x.shape[1], self.device)
            self._sums[key].add(x, share.weight)
            tokens, first = self._taken[self._now, path]
            self._rows[path, site][first : first + len(tokens)] = x.index_select(0, tokens).to(torch.bfloat16)

        return hook

    def finish(self, index: int) -> None:
        """Set a layer aside for the next pass or, after the last one, write it, while the next layer runs."""
        while self._handles:
            self._handles.pop().remove()
        sums = {key: value.to("cpu") for key, value in self._sums.items()}
        rows = {key: value.cpu() for key, value in self._rows.items()}
        states = {place: value.cpu() for place, value in self._entering.items()}
        self._sums, self._rows, self._entering = {}, {}, {}
        self._wait()  # one layer at most waits to be written
        if self._pass + 1 == self._passes:
            self._written = self._writer.submit(self._write, index, sums, rows, states)
        else:
            self._aside[index] = sums
            self._written = self._writer.submit(self._put_aside, index, self._pass, rows, states)

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()
            self._written = None

    def close(self) -> None:
        """Write what all layers share and wait for the rest."""
        layers = range(self.config.num_hidden_layers)
        coverage = [
            {"task": task, "path": path, "layer": layer, "site": site}
            | {"tokens": tokens[path], "weight": self.plan.weights[task][path]}
            for task, tokens in self.plan.tokens.items()
            for path in PATHS
            for layer in layers
            for site in SITES
        ]
        pq.write_table(pa.Table.from_pylist(coverage), self.out / "coverage.parquet")
        self._wait()
        shutil.rmtree(self.out / SCRATCH, ignore_errors=True)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception) -> None:
        self._writer.shutdown(cancel_futures=True)

    # on the writer's thread

    def _scratch(self, index: int, number: int, what: str) -> Path:
        return self.out / SCRATCH / f"layer={index}" / f"{number}-{what}.npy"

    def _put_aside(self, index: int, number: int, rows: Rows, states: dict[int, torch.Tensor]) -> None:
        named = {f"{path}-{site}": value for (path, site), value in rows.items()}
        named |= {f"state-{place}": value for place, value in states.items()}
        for what, value in named.items():
            file = self._scratch(index, number, what)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, value.view(torch.int16).numpy(), allow_pickle=False)

    def _write(self, index: int, sums: Sums, rows: Rows, states: dict[int, torch.Tensor]) -> None:
        for path in PATHS:
            self._write_statistics(index, path, sums)
            self._write_rows(index, path, rows)
        if self.sequences:
            for file in (self.out / SCRATCH / f"layer={index}").glob("*-state-*.npy"):
                states[int(file.stem.split("-")[-1])] = _load(file)
            self._write_hidden(index, states)
        shutil.rmtree(self.out / SCRATCH / f"layer={index}", ignore_errors=True)

    def _whole(self, index: int, path: str, site: str, rows: Rows) -> torch.Tensor:
        """Rows of all passes, in the plan's order."""
        last = rows[path, site]
        if len(self._slots) == 1:
            return last
        whole = last.new_empty(self.plan.rows(path), last.shape[1])
        for number, slots in enumerate(self._slots[:-1]):
            whole[torch.from_numpy(slots[path])] = _load(self._scratch(index, number, f"{path}-{site}"))
        whole[torch.from_numpy(self._slots[-1][path])] = last
        return whole

    def _write_statistics(self, index: int, path: str, sums: Sums) -> None:
        with table_writer(layer_file(self.out, "statistics", path, index), STATISTICS_SCHEMA) as writer:
            for site in SITES:
                for task in self.plan.tokens:
                    found = sums.get((task, path, site))
                    if found is None:
                        continue
                    count = len(found.absolute)
                    columns = {
                        "task": [task] * count,
                        "site": [site] * count,
                        "channel": np.arange(count, dtype=np.int32),
                        "mean_abs": found.absolute.float().numpy(),
                        "mean_sq": found.square.float().numpy(),
                        "max_abs": found.largest.float().numpy(),
                    }
                    writer.write_table(pa.table(columns).cast(STATISTICS_SCHEMA))

    def _write_rows(self, index: int, path: str, rows: Rows) -> None:
        """A row group a site and task, so that readers take what they need."""
        tasks = self.plan.row_tasks[path]
        with table_writer(layer_file(self.out, "rows", path, index), ROWS_SCHEMA) as writer:
            for site in SITES:
                whole = self._whole(index, path, site, rows)
                for task in dict.fromkeys(tasks):
                    at = slice(tasks.index(task), tasks.index(task) + tasks.count(task))
                    count = at.stop - at.start
                    columns = {
                        "task": [task] * count,
                        "site": [site] * count,
                        "sample": np.array(self.plan.row_samples[path][at], dtype=np.int32),
                        "timestep": np.array(self.plan.row_timesteps[path][at], dtype=np.float32),
                        "row": bit_patterns(whole[at]),
                    }
                    writer.write_table(pa.table(columns).cast(ROWS_SCHEMA))

    def _write_hidden(self, index: int, states: dict[int, torch.Tensor]) -> None:
        with table_writer(states_file(self.out, HIDDEN, index), STATES_SCHEMA) as writer:
            for number, sequence in enumerate(self.sequences):
                write_states(writer, number, torch.cat([states[place] for place in sequence.places]))


def _load(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(file, allow_pickle=False)).view(torch.bfloat16)
