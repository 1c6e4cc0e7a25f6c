"""`Beside`: the understanding expert's few rows on a stream of their own while the other expert multiplies its many.

    beside.fork()                         # what is launched within may read what the caller's stream has done so far
    with beside.launched(attended):       # `attended` is the caller's, and lives until the next join
        ...
    beside.join()                         # the caller's stream goes on when both are done

Few rows wait for memory, many for arithmetic, and neither expert needs the other but in attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """Of one device. What is made within belongs to this stream: its memory serves this stream again, and only what is
    launched after the next `fork`, when the caller's stream has read it."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.lent: list[torch.Tensor | None] = []

    def fork(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())

    @contextmanager
    def launched(self, *lent: torch.Tensor | None) -> Iterator[None]:
        self.lent.extend(lent)
        with torch.cuda.stream(self.stream):  # of None: where the caller is
            yield

    def join(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.lent.clear()
