"""A run over stand-ins: its checkpoint folder, its artifact folder, its settings and the calls it made."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.flows import stand_ins

ROOT = Path(__file__).parents[2]
NO_SERVER = "http://127.0.0.1:9/api"  # nothing listens: for commands that must end before they need one


@pytest.fixture(autouse=True)
def hydra_as_it_was(monkeypatch):
    """A command that runs inside the test process sets Hydra's variable, which later children would inherit."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@dataclass(frozen=True)
class Bench:
    """The places of one test, and commands that run there."""

    folder: Path
    checkpoint: Path
    artifacts: Path
    calls: Path

    @property
    def overrides(self) -> list[str]:
        return [f"checkpoint.path={self.checkpoint}", f"artifacts={self.artifacts}", "runner.devices=[cpu]"]

    def took(self) -> Counter:
        """What was called since the last time."""
        counts = Counter(self.calls.read_text().split()) if self.calls.exists() else Counter()
        self.calls.unlink(missing_ok=True)
        return counts

    def start(self, *overrides: str, **environment: str) -> subprocess.Popen:
        """`full_run` over the stand-ins in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.flows.stand_ins", *self.overrides, *overrides],
            cwd=ROOT,
            env=os.environ | {"CALLS": str(self.calls)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*overrides, **environment)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path, stand_ins.write_checkpoint(tmp_path), tmp_path / "artifacts", tmp_path / "calls")


@pytest.fixture
def stages(bench, monkeypatch) -> Bench:
    """The stand-ins in this process."""
    monkeypatch.setenv("CALLS", str(bench.calls))
    stand_ins.install(monkeypatch.setattr)
    return bench


@pytest.fixture
def config(bench):
    """A composed and resolved config of the bench, with overrides."""
    from tasks.config import compose_config

    return lambda *overrides: compose_config([*bench.overrides, *overrides])


SMALL = ("calibration.samples=8", "evaluation.samples=2", "evaluation.steps=6", "evaluation.max_new_tokens=16")


@dataclass(frozen=True)
class ShippedRun:
    """One whole run on the checkpoint that ships, with few samples."""

    artifacts: Path
    out: str
    err: str

    @property
    def overrides(self) -> list[str]:
        return [*SMALL, f"artifacts={self.artifacts}"]


@pytest.fixture(scope="session")
def own_home(tmp_path_factory) -> str:
    """A Prefect home for runs that start their own server: two servers must not share a database."""
    return str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def shipped_run(tmp_path_factory, own_home) -> ShippedRun:
    artifacts = tmp_path_factory.mktemp("shipped") / "artifacts"
    done = full_run(*SMALL, f"artifacts={artifacts}", PREFECT_HOME=own_home)
    assert done.returncode == 0, done.stderr
    return ShippedRun(artifacts, done.stdout, done.stderr)


def full_run(*overrides: str, **environment: str) -> subprocess.CompletedProcess:
    """The command as a user gives it."""
    return subprocess.run(
        [sys.executable, "-m", "flows.full_run", *overrides],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
