"""What the six stages share: the Cached state, devices on lease, progress lines, a stop between two units of work."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator

from prefect.client.schemas.objects import State
from prefect.states import Completed

from lance_quant.devices import current, exact_device, found_devices
from lance_quant.memory import release_memory
from tasks.config import SMALL_WIDTH, RunnerConfig
from tasks.store import Artifact, Kept

POLL_SECONDS = 0.2
PROGRESS_LINES = 10
SECONDS_BETWEEN_LINES = 2.0

log = logging.getLogger("lance_quant")
stop = threading.Event()
finished: dict[str, Artifact] = {}  # by stage, of this process's run: what no lost Prefect server can take away


class Stopped(Exception):
    """The run was interrupted; this unit of work ends here and leaves nothing behind."""


def as_state(kept: Kept) -> Artifact | State:
    """What a task returns: the artifact built, or for one that was found a state that Prefect shows as Cached."""
    artifact = kept.artifact
    finished[artifact.stage] = artifact
    if not kept.cached:
        release_memory()
        return artifact
    return Completed(name="Cached", message=f"{artifact.stage}/{artifact.key}", data=artifact)


class Devices:
    """Device names on lease: as many units of work at a time as there are entries."""

    def __init__(self, names: list[str]):
        self.names = names
        self._free: queue.Queue[str] = queue.Queue()
        for name in names:
            self._free.put(name)

    @classmethod
    def of(cls, runner: RunnerConfig) -> "Devices":
        """Resolve `auto`, and repeat the devices in turn up to `workers` entries.

        Raises LanceQuantError for a device that this machine does not have.
        """
        auto = runner.devices == "auto"
        names = found_devices() if auto else [exact_device(name, "runner.devices") for name in runner.devices]
        return cls([names[i % len(names)] for i in range(runner.workers or len(names))])

    @contextlib.contextmanager
    def lease(self, width: int) -> Iterator[str]:
        """A device for a unit of work on a model of hidden size `width`; waits until one is free."""
        name = self._take()
        try:
            with _shared_cores() if name == "cpu" and width < SMALL_WIDTH else contextlib.nullcontext():
                with current(name):
                    yield name
        finally:
            self._free.put(name)

    def _take(self) -> str:
        while True:
            halt()
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=POLL_SECONDS)


@contextlib.contextmanager
def _shared_cores() -> Iterator[None]:
    """A small model gains nothing from a second thread, and waits long for it where another process has the core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def halt() -> None:
    """Raise `Stopped` once the run was asked to stop."""
    if stop.is_set():
        raise Stopped("stopped on request")


class Progress:
    """`progress(done, total, what)` for the library: at most ten lines a phase, and the place where a stage stops."""

    def __init__(self, stage: str):
        self.stage = stage
        self._told = 0
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES

    def __call__(self, done: int, total: int, what: str = "") -> None:
        halt()
        tenth = PROGRESS_LINES * done // max(total, 1)
        self._told = min(self._told, tenth)  # another phase begins
        if tenth > self._told and time.monotonic() >= self._next:
            self._told, self._next = tenth, time.monotonic() + SECONDS_BETWEEN_LINES
            log.info("%s: %d of %d %s", self.stage, done, total, what)
