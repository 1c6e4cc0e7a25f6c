"""What an artifact store must survive: deletion, damage, a changed input, failure, kill -9, two runs at once."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.store import MANIFEST, Identity, Store

IDENTITY = Identity(stage="capture", revision=1, upstream={"load": "aa"}, config={"samples": 2}, files={"model": "bb"})


class Build:
    """Counts its calls and writes two files."""

    def __init__(self):
        self.calls = 0

    def __call__(self, out: Path) -> dict:
        self.calls += 1
        (out / "path=und").mkdir()
        (out / "path=und" / "part.bin").write_bytes(b"12345")
        (out / "coverage.bin").write_bytes(b"1")
        return {"tokens": 7, "uncovered": []}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "artifacts")


def leftovers(store):
    return [path for path in store.root.glob("*/.*")]


def test_same_inputs_again_are_found(store):
    build = Build()
    first, second = store.keep(IDENTITY, build), store.keep(IDENTITY, build)
    assert (first.cached, second.cached, build.calls) == (False, True, 1)
    assert first.artifact == second.artifact
    assert second.artifact.summary == {"tokens": 7, "uncovered": []}
    assert second.artifact.path == store.root / "capture" / IDENTITY.key
    assert leftovers(store) == []


def test_manifest_fields(store):
    artifact = store.keep(IDENTITY, Build()).artifact
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    fields = "stage revision upstream config files key created seconds versions outputs summary"
    assert set(manifest) == set(fields.split())
    assert manifest["outputs"]["path=und/part.bin"] == {"bytes": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}
    assert {"lance_quant", "torch"} <= set(manifest["versions"])


@pytest.mark.parametrize(
    "change",
    [{"stage": "x"}, {"revision": 2}, {"upstream": {"load": "ab"}}, {"config": {"samples": 3}}, {"files": {}}],
)
def test_every_field_is_in_the_key(change):
    assert replace(IDENTITY, **change).key != IDENTITY.key


def test_key_is_pinned():
    """A key that changes by accident throws away everybody's artifacts."""
    assert IDENTITY.key == replace(IDENTITY, config={"samples": 2}).key == "b42e44e598586a048a681abb"


def test_deleted_artifact_is_rebuilt(store):
    build = Build()
    shutil.rmtree(store.keep(IDENTITY, build).artifact.path)
    assert not store.keep(IDENTITY, build).cached
    assert build.calls == 2


def missing_file(folder):
    (folder / "coverage.bin").unlink()


def truncated_file(folder):
    (folder / "path=und" / "part.bin").write_bytes(b"123")


def missing_manifest(folder):
    (folder / MANIFEST).unlink()


def empty_manifest(folder):
    (folder / MANIFEST).write_text("")


def half_a_manifest(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


@pytest.mark.parametrize("damage", [missing_file, truncated_file, missing_manifest, empty_manifest, half_a_manifest])
def test_damaged_artifact_is_rebuilt_whole(store, damage):
    build = Build()
    folder = store.keep(IDENTITY, build).artifact.path
    (folder / "stray").write_text("left by hand")
    damage(folder)
    assert not store.keep(IDENTITY, build).cached
    assert store.keep(IDENTITY, build).cached
    assert (folder / "path=und" / "part.bin").read_bytes() == b"12345"
    assert not (folder / "stray").exists()


def test_failed_build_leaves_nothing(store):
    def fail(out):
        (out / "half").write_text("written")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.keep(IDENTITY, fail)
    assert list((store.root / "capture").iterdir()) == []
    assert not store.keep(IDENTITY, Build()).cached


KILLED = """
    import sys, time
    from tasks.store import Identity, Store

    def build(out):
        (out / "half").write_bytes(b"1")
        print("building", flush=True)
        time.sleep(60)

    Store(sys.argv[1]).keep(Identity(stage="capture", revision=1, upstream={"load": "aa"}, config={"samples": 2},
                                     files={"model": "bb"}), build)
"""


def test_kill_9_midway(store):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(store.root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "building\n"
    assert store.sweep() == []  # its lock is held
    process.send_signal(signal.SIGKILL)
    process.wait()
    (draft,) = (path for path in leftovers(store) if path.is_dir())
    assert not (store.root / "capture" / IDENTITY.key).exists()

    assert store.sweep() == [draft]
    assert leftovers(store) == []
    assert not store.keep(IDENTITY, Build()).cached


def test_next_build_of_a_killed_key_clears_its_draft(store):
    draft = store.root / "capture" / f".{IDENTITY.key}.0123abcd"
    draft.mkdir(parents=True)
    store.keep(IDENTITY, Build())
    assert leftovers(store) == []


RACER = """
    import os, sys, time
    from tasks.store import Identity, Store

    def build(out):
        time.sleep(0.05)
        with open(sys.argv[2], "a") as log:
            log.write(f"{os.getpid()}\\n")
        return {}

    for layer in range(6):
        Store(sys.argv[1]).keep(Identity(stage="search", revision=1, config={"layer": layer}), build)
"""


def test_two_runs_at_once_build_each_artifact_once(store, tmp_path):
    log = tmp_path / "builds"
    command = [sys.executable, "-c", textwrap.dedent(RACER), str(store.root), str(log)]
    racers = [subprocess.Popen(command) for _ in range(2)]
    assert [racer.wait() for racer in racers] == [0, 0]
    assert len(log.read_text().split()) == 6
    assert leftovers(store) == []


def test_threads_share_a_key(store):
    build = Build()
    threads = [threading.Thread(target=store.keep, args=(IDENTITY, build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1


def test_built_and_found_summaries_are_the_same_type(store):
    built = store.keep(IDENTITY, lambda out: {"edges": (1, 2)}).artifact
    assert built.summary == {"edges": [1, 2]} == store.find(IDENTITY).summary


def test_place_is_not_in_the_key(tmp_path):
    here, there = Store(tmp_path / "a"), Store(tmp_path / "b")
    assert here.keep(IDENTITY, Build()).artifact.key == there.keep(IDENTITY, Build()).artifact.key


def test_relative_root_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("artifacts")
    os.chdir("/")
    assert store.keep(IDENTITY, Build()).artifact.path.is_relative_to(tmp_path)
