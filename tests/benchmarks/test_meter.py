"""The meter sees what a child process holds, and not what a stranger does."""

import subprocess
import sys

from benchmarks.meter import Meter

HOLD = "held = bytearray(b'x') * 2**26; print('held', flush=True); input()"


def child():
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_child_counts():
    with Meter() as alone:
        pass
    process = child()
    with Meter() as together, Meter(process.pid) as its_own:
        pass
    process.communicate("\n")
    assert together.host_bytes - alone.host_bytes > 2**26
    assert 2**26 < its_own.host_bytes < together.host_bytes
    with Meter(process.pid) as gone:
        pass
    assert gone.host_bytes == 0
