"""`read_sequences`: the whole sequences that a capture kept, with the states that enter one layer; `read_gradients`.

What a layer puts out for them is computed with its own code (`awq.block.Block`), so that every row of every input site,
and the error behind the whole layer, follow from one tensor a sequence.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from lance_quant.calibration.activations import GRADIENTS, HIDDEN, read_states, states_file
from lance_quant.model.attention import Span
from lance_quant.model.decoder import Call, Decoder
from lance_quant.model.routing import Routing

SEQUENCES_FILE = "sequences.parquet"
VELOCITY, LOGITS = "velocity", "logits"  # what is asked of a token


@dataclass(frozen=True, kw_only=True)
class KeptSequence:
    """sample: the calibration sample that it is of; positions: int64 [3, n]; latent: bool [n], tokens of the generation
    path; drawn, said: bool [n], tokens whose velocity or whose logits are asked for; states: bfloat16 [n, H]."""

    task: str
    sample: int
    timestep: float
    positions: torch.Tensor
    latent: torch.Tensor
    drawn: torch.Tensor
    said: torch.Tensor
    spans: tuple[Span, ...]
    states: torch.Tensor

    def call(self, decoder: Decoder, states: torch.Tensor) -> Call:
        """What a layer is to know of states [B, n, H] of sequences like this one."""
        routing = Routing.of(self.latent).to(states.device)
        return decoder.call(states, self.positions.to(states.device), routing, self.spans)


def read_sequences(folder: Path, layer: int) -> list[KeptSequence]:
    """The kept sequences in order; none where the capture kept none."""
    if not (Path(folder) / SEQUENCES_FILE).is_file():
        return []
    table = pq.read_table(Path(folder) / SEQUENCES_FILE)
    column = {name: table[name].to_numpy() for name in table.column_names}
    latent, drawn, said = (
        torch.from_numpy(column[name] == value)
        for name, value in (("expert", "gen"), ("output", VELOCITY), ("output", LOGITS))
    )
    positions = torch.from_numpy(np.stack([column[axis] for axis in "thw"]).astype(np.int64))
    states = read_states(states_file(folder, HIDDEN, layer))  # in the order of the tokens
    return [
        KeptSequence(
            task=str(column["task"][start]),
            sample=int(column["sample"][start]),
            timestep=float(column["timestep"][start]),
            positions=positions[:, start:end],
            latent=latent[start:end],
            drawn=drawn[start:end],
            said=said[start:end],
            spans=spans_of(column["split"][start:end], column["mode"][start:end]),
            states=states[start:end],
        )
        for start, end in stretches(column["sequence"])
    ]


def read_gradients(folder: Path, layer: int) -> dict[int, torch.Tensor]:
    """Sequence number -> gradient at what the layer puts out, bfloat16 [n, H]; empty where the capture has none."""
    file = states_file(folder, GRADIENTS, layer)
    if not file.is_file():
        return {}
    numbers = pq.read_table(file, columns=["sequence"], partitioning=None)["sequence"].to_numpy()
    gradients = read_states(file)
    return {int(numbers[start]): gradients[start:end] for start, end in stretches(numbers)}


def stretches(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Where each stretch of equal numbers begins and ends."""
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return list(pairwise(edges))


def spans_of(splits: np.ndarray, modes: np.ndarray) -> tuple[Span, ...]:
    """Each token's split and mode -> (start, end, mode) of every split."""
    return tuple((start, end, str(modes[start])) for start, end in stretches(splits))
