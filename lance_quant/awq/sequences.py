"""`read_sequences`: the whole sequences that a capture kept, with the states that enter one layer.

What a layer puts out for them is computed with its own code (`block.Block`), so that every row of every input site,
and the error behind the whole layer, follow from one tensor a sequence.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch

from lance_quant.calibration.activations import read_states
from lance_quant.model.attention import Span

SEQUENCES_FILE = "sequences.parquet"


@dataclass(frozen=True, kw_only=True)
class KeptSequence:
    """sample: the calibration sample that it is of; positions: int64 [3, n]; latent: bool [n], tokens of the generation
    path; states: bfloat16 [n, H]."""

    task: str
    sample: int
    timestep: float
    positions: torch.Tensor
    latent: torch.Tensor
    spans: tuple[Span, ...]
    states: torch.Tensor


def read_sequences(folder: Path, layer: int) -> list[KeptSequence]:
    """The kept sequences in order; none where the capture kept none."""
    if not (Path(folder) / SEQUENCES_FILE).is_file():
        return []
    tokens = pq.read_table(Path(folder) / SEQUENCES_FILE).to_pandas()
    states = read_states(Path(folder) / "hidden" / f"layer={layer}" / "part.parquet")  # in the order of `tokens`
    return [
        KeptSequence(
            task=str(rows.task.iloc[0]),
            sample=int(rows["sample"].iloc[0]),
            timestep=float(rows.timestep.iloc[0]),
            positions=torch.tensor(rows[["t", "h", "w"]].to_numpy().T.copy(), dtype=torch.int64),
            latent=torch.tensor((rows.expert == "gen").to_numpy().copy()),
            spans=spans_of(rows.split.tolist(), rows["mode"].tolist()),
            states=states[rows.index[0] : rows.index[-1] + 1],
        )
        for _, rows in tokens.groupby("sequence", sort=True)
    ]


def spans_of(splits: list[int], modes: list[str]) -> tuple[Span, ...]:
    """Each token's split and mode -> (start, end, mode) of every split."""
    starts = [at for at in range(len(splits)) if at == 0 or splits[at] != splits[at - 1]]
    return tuple((start, end, modes[start]) for start, end in zip(starts, [*starts[1:], len(splits)], strict=True))
