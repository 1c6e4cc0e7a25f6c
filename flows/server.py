"""A Prefect server of our own for the length of one run, where `PREFECT_API_URL` names none.

Prefect's built-in temporary server hangs on Ctrl-C and outlives `kill -9`. This child sits in its own session, so
that Ctrl-C does not reach it, and asks the kernel (PR_SET_PDEATHSIG, Linux) to end it after its parent: nobody stops
it, and the client can send its last events at exit. Should something else end it, it is started again.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from pathlib import Path

from lance_quant.errors import LanceQuantError

STARTUP_SECONDS = 90  # the first start creates the database, 20 s on a slow machine
POLL_SECONDS = 1.0  # for an answer, between two looks at whether it still lives
STARTS = 3  # two first runs at once both create the tables of Prefect's database, and one of them fails
RESTARTS = 5
BACKLOG = 128  # requests that wait while there is no server
PR_SET_PDEATHSIG = 1

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(STARTUP_SECONDS),
    "PREFECT_LOGGING_EXTRA_LOGGERS": "lance_quant",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # of lines outside a flow: it warns of each
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # a failed flow's exception is stored, by default as a pickle
}


def prepare() -> None:
    """Settings that Prefect reads when it is imported: call before that. What the user has set stays."""
    logging.getLogger("lance_quant").setLevel(logging.INFO)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


class Server:
    """The server of this run: its address, its log file and its process, which is started again should it end.

    The listening socket belongs to this process and is lent to the server: the port cannot be taken by another
    program, and what is asked between two servers waits in it instead of being refused.
    """

    def __init__(self, log: Path):
        self.log = log
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/api"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process = self._start()

    def wait(self) -> None:
        """Return once it answers; from then on it is watched.

        Raises LanceQuantError where it does not start.
        """
        deadline, starts = time.monotonic() + STARTUP_SECONDS, 1
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                if starts == STARTS:
                    break
                self.process, starts = self._start(), starts + 1
            try:
                direct.open(f"{self.url}/health", timeout=POLL_SECONDS).close()
            except OSError:
                continue
            threading.Thread(target=self._watch, name="prefect-server", daemon=True).start()
            return
        self._listener.close()
        raise LanceQuantError(
            f"the Prefect server for this run did not start: {self.log} says why; "
            "`prefect server start` and PREFECT_API_URL do without it"
        )

    def _start(self) -> subprocess.Popen:
        lent = self._listener.fileno()
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.server", str(lent), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[lent],
                start_new_session=True,
                env=os.environ | {"PREFECT_SERVER_UI_API_URL": self.url},  # else the UI asks port 4200
            )

    def _watch(self) -> None:
        """Start it again where it ends. This thread lives as long as the process: PR_SET_PDEATHSIG minds its parent
        thread."""
        for _ in range(RESTARTS):
            code = self.process.wait()
            logging.getLogger("lance_quant").warning(
                "the Prefect server of this run ended (exit code %d, %s): starting it again", code, self.log
            )
            self.process = self._start()
        self.process.wait()
        self._listener.close()  # refuses from now on, where requests would wait for nobody


def start(log: Path) -> Server | None:
    """Start the server unless the user has named one; None then. Does not wait for it."""
    if os.environ.get("PREFECT_API_URL") or _profile_names_one():
        return None
    server = Server(log)
    os.environ["PREFECT_API_URL"] = server.url
    return server


def _profile_names_one() -> bool:
    """Whether `prefect config set PREFECT_API_URL=...` was used. Read here: Prefect itself takes a second to import."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    file = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    if not file.is_file():
        return False
    profiles = tomllib.loads(file.read_text())
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
    return "PREFECT_API_URL" in profiles.get("profiles", {}).get(active, {})


def end_with(parent: int) -> None:
    """Have the kernel end this process after its parent, which has the id `parent` (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the parent is gone already")


def _serve(listener: int, parent: int) -> None:
    end_with(parent)
    import uvicorn

    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, log_level="warning", timeout_graceful_shutdown=5
    )
    uvicorn.Server(config).run([socket.socket(fileno=listener)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
