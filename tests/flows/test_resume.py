"""Runs in processes of their own, over stand-ins: killed, interrupted, two at once, without any server."""

import os
import signal
import subprocess
import time

import pytest

from tests.flows.stand_ins import LAYERS

SECONDS = 60.0  # one minute of work, so that a signal always meets it


@pytest.fixture
def reporting(monkeypatch, prefect_url):
    """Children report to the running server: they start in 3 s, not in 10."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)


def wait_for(bench, call: str) -> None:
    for _ in range(600):
        if bench.calls.exists() and call in bench.calls.read_text().split():
            return
        time.sleep(0.1)
    raise AssertionError(f"{call} did not begin")


def drafts(bench) -> list:
    return [path for path in bench.artifacts.glob("*/.*") if path.is_dir()]


def test_kill_9_keeps_what_was_done(bench, reporting):
    process = bench.start(SLOW_FROM="2", SECONDS=str(SECONDS))
    wait_for(bench, "search-2")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(drafts(bench)) == 1
    bench.took()

    again = bench.run()
    assert again.returncode == 0, again.stderr
    assert bench.took() == dict.fromkeys(["search-2", "search-3", "baseline", "pack", "evaluate", "report"], 1)
    assert drafts(bench) == []
    for name in ("load", "capture", "search-0", "search-1"):
        assert any(name in line and "Cached(" in line for line in again.stderr.splitlines()), again.stderr
    assert "report.html" in again.stdout and "KL 0.25" in again.stdout


def test_ctrl_c_ends_within_seconds_and_says_how_to_go_on(bench, reporting):
    process = bench.start(SLOW_FROM="1", SECONDS=str(SECONDS))
    wait_for(bench, "search-1")
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    _, err = process.communicate(timeout=SECONDS / 2)
    assert time.monotonic() - pressed < 10
    assert process.returncode == 130
    assert "run the same command to go on" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_ctrl_c_between_two_units_of_work_shows_no_fault(bench, reporting):
    process = bench.start(CAPTURE_SECONDS=str(SECONDS))
    wait_for(bench, "capture")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS / 2)
    assert process.returncode == 130
    assert "run the same command to go on" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert drafts(bench) == []


def test_two_runs_at_once_share_the_work(bench, reporting):
    runs = [bench.start(SLOW_FROM="0", SECONDS="0.5") for _ in range(2)]
    for process in runs:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    took = bench.took()
    assert set(took.values()) == {1}
    assert sum(name.startswith("search") for name in took) == LAYERS


def test_without_a_server_one_is_started_and_ends_with_the_run(bench, own_home):
    process = bench.start(PREFECT_HOME=own_home, SLOW_FROM="3", SECONDS="1")
    wait_for(bench, "search-3")
    assert len(server_children(bench)) == 1
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    for _ in range(100):
        if not server_children(bench):
            return
        time.sleep(0.1)
    raise AssertionError("the server outlived its run")


def test_a_server_that_dies_is_started_again_and_the_run_goes_on(bench, own_home):
    process = bench.start(PREFECT_HOME=own_home, SLOW_FROM="3", SECONDS="1")
    wait_for(bench, "search-3")
    (server,) = server_children(bench)
    os.kill(int(server), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "report.html" in out
    assert "the Prefect server of this run ended (exit code -9" in err and "Traceback" not in err


def server_children(bench) -> list[str]:
    """Servers of this repository's runs that are still alive, by their log file's place."""
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    pids = [line.split()[0] for line in listing.splitlines() if "flows.server" in line]
    return [pid for pid in pids if str(bench.artifacts) in _open_files(pid)]


def _open_files(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except FileNotFoundError:
        return ""
