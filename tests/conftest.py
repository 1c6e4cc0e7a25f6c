"""Prefect in tests: a home of its own, no network, and one real `prefect server` on loopback for all flow tests."""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from flows import server

HOME = tempfile.mkdtemp(prefix="prefect-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ.pop("PREFECT_API_URL", None)
# tiny models gain nothing from threads, and on a busy machine wait for them; subprocesses inherit it
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRITON_INTERPRET"] = "0" if Path("/dev/nvidiactl").exists() else "1"  # read when triton is first imported
os.environ["PREFECT_HOME"] = HOME
os.environ["PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"] = "ignore"
server.prepare()  # before anything imports prefect

STARTUP_SECONDS = 120


@pytest.fixture(scope="session")
def prefect_url():
    """The address of a running `prefect server`. The kernel ends it after pytest: stopped by us, it would miss the
    client's last events, and the client would try to send them for a minute."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log, parent = tempfile.TemporaryFile(), os.getpid()
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"PREFECT_UI_ENABLED": "false"},
        preexec_fn=lambda: server.end_with(parent),
    )
    url = f"http://127.0.0.1:{port}/api"
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            return url
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                pytest.fail(f"prefect server did not start:\n{log.read().decode()}")
            time.sleep(0.2)


@pytest.fixture
def prefect_server(prefect_url):
    """Flows and tasks of this process report to the running server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_url}):
        yield prefect_url
