"""A Prefect server of our own for the length of one run, where `PREFECT_API_URL` names none.

Prefect's built-in temporary server hangs on Ctrl-C and outlives `kill -9`. This child sits in its own session, so
that Ctrl-C does not reach it, and asks the kernel (PR_SET_PDEATHSIG, Linux) to end it after its parent: nobody stops
it, and the client can send its last events at exit.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from lance_quant.errors import LanceQuantError

STARTUP_SECONDS = 90  # the first start creates the database, 20 s on a slow machine
POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(STARTUP_SECONDS),
    "PREFECT_LOGGING_EXTRA_LOGGERS": "lance_quant",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # a failed flow's exception is stored, by default as a pickle
}


def prepare() -> None:
    """Settings that Prefect reads when it is imported: call before that. What the user has set stays."""
    logging.getLogger("lance_quant").setLevel(logging.INFO)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Server:
    """A starting server: its process, address and log file."""

    process: subprocess.Popen
    url: str
    log: Path

    def wait(self) -> None:
        """Return once it answers."""
        deadline = time.monotonic() + STARTUP_SECONDS
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                direct.open(f"{self.url}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(POLL_SECONDS)
        raise LanceQuantError(
            f"the Prefect server for this run did not start: {self.log} says why; "
            "`prefect server start` and PREFECT_API_URL do without it"
        )


def start(log: Path) -> Server | None:
    """Start the server unless the user has named one; None then. Does not wait for it."""
    if os.environ.get("PREFECT_API_URL") or _profile_names_one():
        return None
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(port), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PREFECT_SERVER_UI_API_URL": url},  # else the UI asks port 4200
        )
    os.environ["PREFECT_API_URL"] = url
    return Server(process, url, log)


def _profile_names_one() -> bool:
    """Whether `prefect config set PREFECT_API_URL=...` was used. Read here: Prefect itself takes a second to import."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    file = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    if not file.is_file():
        return False
    profiles = tomllib.loads(file.read_text())
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
    return "PREFECT_API_URL" in profiles.get("profiles", {}).get(active, {})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with(parent: int) -> None:
    """Have the kernel end this process after its parent, which has the id `parent` (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the parent is gone already")


def _serve(port: int, parent: int) -> None:
    end_with(parent)
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
