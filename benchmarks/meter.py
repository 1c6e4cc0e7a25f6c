"""`Meter`: the most memory that a process tree and this process's GPU tensors held at a time.

Host memory is anonymous and shared memory of all processes under a root, file pages left out: RssAnon and RssShmem of
/proc, sampled. Pinned memory shows in neither, so this process's is added from PyTorch's own count.
"""

import os
import threading
import time
from pathlib import Path

import torch

SAMPLE_SECONDS = 0.1
COUNTED = ("RssAnon", "RssShmem")


class Meter:
    """Context manager; `host_bytes`, `pinned_bytes` and `gpu_bytes` are peaks, the last two of this process. samples:
    (when, as time.time() tells it; process -> its host bytes).

    root: the process whose tree is measured, this one where None; it may be set later.
    """

    def __init__(self, root: int | None = None):
        self.root = os.getpid() if root is None else root
        self.host_bytes = self.pinned_bytes = 0
        self.samples: list[tuple[float, dict[str, int]]] = []
        self.gpu_bytes = self.gpu_reserved_bytes = None
        self._done = threading.Event()

    def __enter__(self) -> "Meter":
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.gpu_bytes = torch.cuda.max_memory_allocated()
            self.gpu_reserved_bytes = torch.cuda.max_memory_reserved()
            self.pinned_bytes = pinned_bytes()

    def _sample(self) -> None:
        while True:
            held = host_of_each(self.root)
            self.samples.append((time.time(), held))
            self.host_bytes = max(self.host_bytes, sum(held.values()))
            if self._done.wait(SAMPLE_SECONDS):
                return

    def most_between(self, start: float, end: float) -> dict[str, int]:
        """Process -> host bytes at that time's highest moment; empty where none was seen."""
        seen = [held for at, held in self.samples if start < at <= end]
        return max(seen, key=lambda held: sum(held.values()), default={})


def host_bytes(root: int) -> int:
    """RssAnon + RssShmem of a process and all below it; 0 where it is gone."""
    return sum(host_of_each(root).values())


def host_of_each(root: int) -> dict[str, int]:
    """Process, named by its last words of command line and its number -> RssAnon + RssShmem."""
    parents, held = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            fields = status(folder)
            if "PPid" in fields:
                pid = int(folder.name)
                parents[pid] = int(fields["PPid"])
                held[pid] = sum(int(fields.get(name, "0").split()[0]) * 1024 for name in COUNTED)
    return {name_of(pid): size for pid, size in held.items() if below(pid, root, parents)}


def name_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        words = []
    return f"{' '.join(Path(word).name for word in words[1:4])} {pid}"


def status(folder: Path) -> dict[str, str]:
    """Fields of a process's status file, none where it ended meanwhile."""
    try:
        lines = (folder / "status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid != root:
        if pid not in parents:
            return False
        pid = parents[pid]
    return True


def pinned_bytes() -> int:
    """The most page-locked memory that PyTorch's allocator has held in this process."""
    if not torch.cuda.is_initialized() or not hasattr(torch.cuda, "host_memory_stats"):
        return 0
    stats = torch.cuda.host_memory_stats()
    return max((int(value) for name, value in stats.items() if name.endswith("bytes.peak")), default=0)
