"""The capture artifact, read back with pandas or `read_layer`; its Parquet schema is written down here.

    statistics/path=und/layer=3/part.parquet   task, site, channel, mean_abs, mean_sq, max_abs (float32)
    coverage.parquet                           task, path, layer, site, tokens, weight (what the task counts)
    rows/path=und/layer=3/part.parquet         task, site, sample, timestep (NaN: none), row (list of uint16)
    sequences.parquet                          sequence, sample, task, timestep, token, t, h, w, split, mode, expert,
                                               output
    hidden/layer=3/part.parquet                sequence, token, state (list of uint16)
    gradients/layer=3/part.parquet             the same of some sequences, `gradients.py`

A row or state is bfloat16 bit patterns: `numpy.uint32(row) << 16` viewed as float32 gives the values back (float16
would overflow). Sites are the inputs that linears share: qkv, o, gate_up, down. output: what is asked of a token,
"velocity", "logits" or "".
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lance_quant.checkpoint.layout import PATHS, SITES
from lance_quant.errors import LanceQuantError

STATISTICS = ("mean_abs", "mean_sq", "max_abs")
BITS = ("row", "state")  # columns of bfloat16 bit patterns
READ_ROWS = 512  # at a time
HIDDEN, GRADIENTS = "hidden", "gradients"  # kinds of states

STATISTICS_SCHEMA = pa.schema(
    [("task", pa.string()), ("site", pa.string()), ("channel", pa.int32())]
    + [(name, pa.float32()) for name in STATISTICS]
)
ROWS_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("site", pa.string()),
        ("sample", pa.int32()),
        ("timestep", pa.float32()),
        ("row", pa.list_(pa.uint16())),
    ]
)
STATES_SCHEMA = pa.schema([("sequence", pa.int32()), ("token", pa.int32()), ("state", pa.list_(pa.uint16()))])


@dataclass(frozen=True, kw_only=True)
class SiteActivations:
    """What one input site of one layer and path saw, apart by task.

    tokens: task -> count; mean_abs, mean_sq, max_abs: task -> float32 [I]; rows: bfloat16 [n, I] with row_tasks [n],
    row_samples [n] (the calibration sample that a row is of) and row_timesteps float32 [n] (NaN where the task has
    none). weights: task -> what it counts beside others, 1 where unnamed.
    """

    tasks: list[str]
    tokens: dict[str, int]
    mean_abs: dict[str, torch.Tensor]
    mean_sq: dict[str, torch.Tensor]
    max_abs: dict[str, torch.Tensor]
    rows: torch.Tensor
    row_tasks: list[str]
    row_samples: list[int]
    row_timesteps: torch.Tensor
    weights: dict[str, float] = field(default_factory=dict)


def layer_file(folder: Path, kind: str, path: str, layer: int) -> Path:
    return Path(folder) / kind / f"path={path}" / f"layer={layer}" / "part.parquet"


def states_file(folder: Path, kind: str, layer: int) -> Path:
    """kind: HIDDEN, what enters a layer, or GRADIENTS, at what it puts out."""
    return Path(folder) / kind / f"layer={layer}" / "part.parquet"


def table_writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    file.parent.mkdir(parents=True, exist_ok=True)
    encoded = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in BITS if name in schema.names}
    return pq.ParquetWriter(
        file, schema, compression="zstd", compression_level=1, use_dictionary=["task", "site"], column_encoding=encoded
    )


def write_states(writer: pq.ParquetWriter, sequence: int, states: torch.Tensor) -> None:
    """bfloat16 [n, H] of a kept sequence, on the CPU."""
    columns = {
        "sequence": np.full(len(states), sequence, dtype=np.int32),
        "token": np.arange(len(states), dtype=np.int32),
        "state": bit_patterns(states),
    }
    writer.write_table(pa.table(columns).cast(STATES_SCHEMA))


def bit_patterns(rows: torch.Tensor) -> pa.Array:
    """bfloat16 [n, I] -> list<uint16> array."""
    flat = rows.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), pa.array(flat))


def read_states(file: Path) -> torch.Tensor:
    """A layer's `state` column, bfloat16 [n, H]."""
    with pq.ParquetFile(file, pre_buffer=False) as table:
        return _column(table, "state", range(table.num_row_groups))


def _column(table: pq.ParquetFile, name: str, groups: Sequence[int]) -> torch.Tensor:
    """bfloat16 [n, I] of some row groups, decoded some rows at a time: Arrow keeps what it has read ahead."""
    count = sum(table.metadata.row_group(group).num_rows for group in groups)
    batches = table.iter_batches(READ_ROWS, list(groups), [name], use_threads=False)
    return _filled((batch[name] for batch in batches), count)


def _filled(blocks: Iterable[pa.ListArray], count: int) -> torch.Tensor:
    """[count, I] of lists of equal lengths, block by block: nothing is there twice."""
    out, start = torch.empty(0, 0, dtype=torch.int16), 0
    for block in blocks:
        if not len(block):
            continue
        values = block.flatten().to_numpy(zero_copy_only=False).view(np.int16).reshape(len(block), -1)
        if not start:
            out = torch.empty(count, values.shape[1], dtype=torch.int16)
        out.numpy()[start : start + len(block)] = values
        start += len(block)
    return out.view(torch.bfloat16)


def _groups_of(table: pq.ParquetFile, site: str) -> list[int]:
    """A row group holds one site's rows."""
    at = table.schema_arrow.get_field_index("site")
    seen = (table.metadata.row_group(group).column(at).statistics for group in range(table.num_row_groups))
    return [group for group, values in enumerate(seen) if values.min == site]


def read_layer(folder: Path, layer: int) -> dict[tuple[str, str], SiteActivations]:
    """(path, site) -> activations of a layer. Raises LanceQuantError where the folder holds no such layer."""
    coverage = pq.read_table(Path(folder) / "coverage.parquet").to_pandas()
    coverage = coverage[coverage.layer == layer]
    if coverage.empty:
        raise LanceQuantError(f"the capture in {folder} has no layer {layer}: it belongs to another checkpoint")
    return {(path, site): _site(folder, coverage, path, layer, site) for path in PATHS for site in SITES}


def _site(folder: Path, coverage, path: str, layer: int, site: str) -> SiteActivations:
    seen = coverage[(coverage.path == path) & (coverage.site == site)]
    tokens = {row.task: int(row.tokens) for row in seen.itertuples()}
    tasks = [task for task in tokens if tokens[task]]
    only = [("site", "=", site)]
    statistics = pq.read_table(layer_file(folder, "statistics", path, layer), filters=only, partitioning=None)
    with pq.ParquetFile(layer_file(folder, "rows", path, layer), pre_buffer=False) as table:
        groups = _groups_of(table, site)
        rows = _column(table, "row", groups)
        known = table.read_row_groups(groups, ["task", "sample", "timestep"])
    by_task = {task: table for task, table in statistics.to_pandas().groupby("task")}
    values = {
        name: {task: torch.tensor(by_task[task][name].to_numpy(), dtype=torch.float32) for task in tasks}
        for name in STATISTICS
    }
    return SiteActivations(
        tasks=tasks,
        tokens=tokens,
        **values,
        rows=rows,
        row_tasks=known["task"].to_pylist(),
        row_samples=known["sample"].to_pylist(),
        row_timesteps=torch.tensor(known["timestep"].to_pylist(), dtype=torch.float32),
        weights={row.task: float(row.weight) for row in seen.itertuples() if row.task in tasks},
    )
