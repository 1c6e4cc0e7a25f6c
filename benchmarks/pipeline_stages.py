"""Stages of full_size.py that run stages of the pipeline: capture, offload, run, pack."""

import contextlib
import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench import GB, Bench, gigabytes, held_to, host
from meter import Meter, host_bytes, pinned_bytes

from lance_quant.awq.pack import PackJob, pack
from lance_quant.calibration.capture import capture
from lance_quant.checkpoint.layout import Checkpoint, layout_of, targets
from lance_quant.checkpoint.native import PARTS, STATE_FILE
from lance_quant.checkpoint.reader import PIECE_BYTES, READERS, TensorReader
from lance_quant.errors import LanceQuantError

OFFLOAD_GB = 7.5
PACKED_GB = {"image": 4.307, "video": 6.148}
FLOW = "flow"  # first word of the command line under which full_size.py runs full_run and tells its peaks


def stage_capture(bench: Bench) -> dict:
    return captured(bench, "capture", 0.0)


def stage_offload(bench: Bench) -> dict:
    with held_to(OFFLOAD_GB):
        return captured(bench, "offload", OFFLOAD_GB)


def captured(bench: Bench, name: str, memory_gb: float) -> dict:
    bench.forget()
    cfg = dataclasses.replace(bench.config.calibration, memory_gb=memory_gb)
    folder = Path(bench.settings.folder) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    said = [time.monotonic()]

    def progress(done: int, total: int, what: str) -> None:
        if time.monotonic() - said[0] > 15:
            said[0] = time.monotonic()
            print(f"{name} {done}/{total} {what}", flush=True)

    with Meter() as meter:
        summary = capture(bench.checkpoint, cfg, folder, bench.device, progress)
    shutil.rmtree(folder)
    bench.tell(
        f"{name} of {summary.samples} samples",
        f"{summary.seconds} s, GPU {gigabytes(meter.gpu_bytes)} (reserved {gigabytes(meter.gpu_reserved_bytes)}), "
        f"host {gigabytes(meter.host_bytes + meter.pinned_bytes)}",
    )
    return dataclasses.asdict(summary) | host(meter)


def stage_run(bench: Bench) -> dict:
    """full_run in a process of its own; told of its stages whether it ends or is stopped."""
    bench.forget()
    script = Path(__file__).with_name("full_size.py")
    devices = ["runner.devices=[cpu]"] if bench.device == "cpu" else []
    command = [sys.executable, str(script), FLOW, *bench.overrides, *devices]
    started, begun = time.monotonic(), time.time()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks, stopped = {}, False
    with Meter(process.pid) as meter, stopping(process, bench.left) as was_stopped:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("peaks "):
                peaks = json.loads(line.removeprefix("peaks "))
        process.wait()
        stopped = was_stopped()
    seconds = round(time.monotonic() - started, 1)
    stages = seconds_by_stage(bench.artifacts, begun)
    pinned = peaks.get("pinned", READERS * PIECE_BYTES)
    bench.tell("full_run", f"{seconds} s{', STOPPED' if stopped else ''}, exit code {process.returncode}")
    since = begun
    for stage, entry in stages.items():
        units = f" in {entry['count']} units" if entry["count"] > 1 else ""
        end = begun + entry["at"]
        held = meter.most_between(since, end)
        entry["host"], since = held, end
        bench.tell(
            f"full_run: {stage}",
            f"{entry['seconds']:.1f} s{units}, there {entry['at']:.0f} s after the start, "
            f"host memory {gigabytes(sum(held.values()) + pinned)}",
        )
    bench.tell("full_run: host memory, all processes", gigabytes(meter.host_bytes + pinned))
    bench.tell(
        "full_run: GPU memory", f"{gigabytes(peaks.get('gpu'))}, reserved {gigabytes(peaks.get('gpu_reserved'))}"
    )
    found = {"seconds": seconds, "stages": stages, "exit_code": process.returncode, "stopped": stopped}
    return found | {"host_bytes": meter.host_bytes, "pinned_bytes": pinned} | peaks


@contextlib.contextmanager
def stopping(process: subprocess.Popen, seconds: float) -> Iterator[Callable[[], bool]]:
    """Ctrl-C to the process after `seconds`; yields a function that says whether it came to that."""
    sent = []

    def stop() -> None:
        sent.append(True)
        process.send_signal(signal.SIGINT)

    timer = threading.Timer(max(1.0, seconds), stop)
    timer.start()
    try:
        yield lambda: bool(sent)
    finally:
        timer.cancel()


def seconds_by_stage(artifacts: Path, since: float) -> dict[str, dict]:
    """Stage -> artifacts written since then, their seconds, and when the last one was there; in that order.

    What a stage does before it can name its artifact, as the hashing in load, is in `at` alone.
    """
    stages: dict[str, dict] = {}
    for manifest in sorted(artifacts.glob("*/*/manifest.json"), key=lambda path: path.stat().st_mtime):
        written = manifest.stat().st_mtime
        if written < since:
            continue
        entry = stages.setdefault(manifest.parents[1].name, {"seconds": 0.0, "count": 0})
        entry["seconds"] = round(entry["seconds"] + json.loads(manifest.read_text())["seconds"], 2)
        entry["count"] += 1
        entry["at"] = round(written - since, 1)
    return stages


def stage_pack(bench: Bench) -> dict:
    """The newest packed folder's size and keys; then packing again, for its own seconds and memory."""
    bench.forget()
    packed = newest(bench.artifacts, "pack")
    found = check_packed(bench.checkpoint, packed / STATE_FILE)
    size = found["bytes"] / GB
    wanted = PACKED_GB[bench.settings.variant]
    verdict = "" if bench.tiny else f" (asked for {wanted}, within 0.002: {abs(size - wanted) <= 0.002})"
    bench.tell("packed file", f"{size:.3f} GB{verdict}")
    bench.tell("packed keys are the source's, weights in three parts", str(found["keys_as_source"]))
    searched = json.loads((packed / "manifest.json").read_text())["upstream"]["search"]
    job = PackJob(
        checkpoint=bench.checkpoint,
        layers=[bench.artifacts / "search" / key for key in searched],
        recipe=bench.config.recipe,
        group_size=bench.config.group_size,
        bits=bench.config.bits,
        tasks_calibrated=[],
    )
    folder = Path(bench.settings.folder) / "packed_again"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with Meter() as meter:
        before = host_bytes(os.getpid())
        started = time.monotonic()
        pack(job, folder)
        found["seconds"] = round(time.monotonic() - started, 1)
    found["same_bytes"] = (folder / STATE_FILE).stat().st_size == found["bytes"]
    shutil.rmtree(folder)
    found |= {"host_bytes": meter.host_bytes, "host_bytes_added": meter.host_bytes - before}
    bench.tell(
        "packing alone",
        f"{found['seconds']} s, host memory {gigabytes(found['host_bytes_added'])} above the process's own",
    )
    return found


def newest(artifacts: Path, stage: str) -> Path:
    found = sorted((artifacts / stage).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise LanceQuantError(f"{artifacts} holds no {stage} artifact: run stage=run first")
    return found[-1].parent


def check_packed(checkpoint: Checkpoint, file: Path) -> dict:
    """Are its keys the source's with each target's weight in parts? The source's layout too must be the same."""
    with TensorReader(checkpoint.model_file) as reader:
        wanted = set(reader.names())
    for target in targets(checkpoint.config):
        wanted.remove(f"{target.name}.weight")
        wanted |= {f"{target.name}.{part}" for part in PARTS}
    with TensorReader(file) as reader:
        names = reader.names()
    same = set(names) == wanted and layout_of(names) == checkpoint.layout
    return {"bytes": file.stat().st_size, "tensors": len(names), "keys_as_source": same}


def run_flow(arguments: list[str]) -> None:
    """`python -m flows.full_run`, which tells of its GPU and pinned memory at the end."""
    sys.argv = ["full_run", *arguments]
    try:
        runpy.run_module("flows.full_run", run_name="__main__", alter_sys=True)
    finally:
        peaks = {"pinned": pinned_bytes()}
        if torch.cuda.is_initialized():
            peaks |= {"gpu": torch.cuda.max_memory_allocated(), "gpu_reserved": torch.cuda.max_memory_reserved()}
        print("peaks " + json.dumps(peaks), flush=True)
