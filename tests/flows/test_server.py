"""The server of one run: started again where its start fails, given up in one sentence."""

import sys

import pytest

from flows import server
from lance_quant.errors import LanceQuantError

# fails, with a word on stderr, as often as the file `left` says; then answers every request
STAND_IN = """
import pathlib, socket, sys
left = pathlib.Path("left")
count = int(left.read_text())
left.write_text(str(count - 1))
if count > 0:
    sys.exit("tables exist already")
listener = socket.socket(fileno=int(sys.argv[1]))
while True:
    client, _ = listener.accept()
    client.recv(1000)
    client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
    client.close()
"""


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """A Server whose first `times` starts fail."""
    started = []

    def popen(command, **settings):
        started.append(Popen([sys.executable, "-c", STAND_IN, *command[3:]], cwd=tmp_path, **settings))
        return started[-1]

    Popen = server.subprocess.Popen
    monkeypatch.setattr(server, "RESTARTS", 0)  # once it answers
    monkeypatch.setattr(server.subprocess, "Popen", popen)

    def make(times: int) -> server.Server:
        (tmp_path / "left").write_text(str(times))
        return server.Server(tmp_path / "logs" / "server.log")

    yield make
    for process in started:
        process.kill()
        process.wait()


def test_a_failed_start_is_tried_again(failing):
    child = failing(2)
    child.wait()
    assert child.process.poll() is None
    assert child.log.read_text() == "tables exist already\n" * 2


def test_three_failed_starts_are_one_sentence(failing):
    with pytest.raises(LanceQuantError, match=r"did not start: .*server\.log says why; `prefect server start`"):
        failing(3).wait()
