"""Devices on lease, progress lines and the stop between two units of work."""

import logging
import threading

import pytest
import torch

from lance_quant.errors import LanceQuantError
from tasks import stage
from tasks.config import RunnerConfig
from tasks.stage import Devices, Progress, Stopped
from tasks.store import Artifact, Kept


@pytest.fixture
def stopped():
    stage.stop.set()
    yield
    stage.stop.clear()


@pytest.mark.parametrize(
    ("devices", "workers", "expected"),
    [
        (["cuda:0", "cuda:1"], 0, ["cuda:0", "cuda:1"]),
        (["cuda:0", "cuda:1"], 3, ["cuda:0", "cuda:1", "cuda:0"]),
        (["cuda:0", "cuda:1"], 1, ["cuda:0"]),
    ],
)
def test_devices_share_the_workers_in_turn(devices, workers, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Devices.of(RunnerConfig(devices=devices, workers=workers)).names == expected


@pytest.mark.parametrize("given", ["cuda:2", "cpu0"])
def test_a_device_that_is_not_there_is_refused(given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LanceQuantError, match=f"runner.devices={given}"):
        Devices.of(RunnerConfig(devices=["cpu", given]))


def test_auto_finds_a_device():
    assert Devices.of(RunnerConfig()).names[0].split(":")[0] in ("cpu", "cuda")


def test_a_device_serves_one_unit_at_a_time():
    devices, inside, most = Devices(["a", "b"]), [], []

    def work():
        with devices.lease(128) as name:
            inside.append(name)
            most.append(sorted(inside))
            threading.Event().wait(0.02)
            inside.remove(name)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most, key=len) == ["a", "b"]
    assert len(most) == 6


def test_a_device_comes_back_after_a_fault():
    devices = Devices(["a"])
    with pytest.raises(RuntimeError), devices.lease(128):
        raise RuntimeError
    with devices.lease(128) as name:
        assert name == "a"


def test_nothing_begins_or_goes_on_after_a_stop(stopped):
    with pytest.raises(Stopped), Devices(["a"]).lease(128):
        pass
    with pytest.raises(Stopped):
        Progress("capture")(1, 2)


def test_progress_says_at_most_ten_lines(caplog, monkeypatch):
    monkeypatch.setattr(stage, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO, "lance_quant"):
        progress = Progress("capture")
        for done in range(1, 101):
            progress(done, 100, f"scene-{done}")
    lines = [record.message for record in caplog.records]
    assert len(lines) == 10
    assert lines[0] == "capture: 10 of 100 scene-10"
    assert lines[-1] == "capture: 100 of 100 scene-100"


def test_freed_memory_goes_back_after_a_stage(tmp_path, monkeypatch):
    stage.release_memory()
    told = []
    monkeypatch.setattr(stage, "release_memory", lambda: told.append(True))
    for cached in (True, False):
        stage.as_state(Kept(artifact=Artifact(stage="search", key="k", path=tmp_path, summary={}), cached=cached))
    assert told == [True]


def test_a_found_artifact_shows_as_cached(tmp_path):
    artifact = Artifact(stage="search", key="k", path=tmp_path, summary={})
    assert stage.as_state(Kept(artifact=artifact, cached=False)) is artifact
    state = stage.as_state(Kept(artifact=artifact, cached=True))
    assert (state.name, state.message, state.is_completed()) == ("Cached", "search/k", True)
    assert state.result() is artifact


def test_a_small_model_on_the_cpu_takes_one_thread():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with Devices(["cpu"]).lease(2048):
            assert torch.get_num_threads() == 2
        with Devices(["cpu"]).lease(128):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
