"""`artifacts/<stage>/<key>/`: an artifact exists whole or not at all, and its key is a hash of what determines it.

    Store("artifacts").keep(Identity(stage="capture", revision=1, config={...}), build)   # build(folder) -> summary

1. The key is the SHA-256 of the canonical JSON of an `Identity`. Devices, times and places are not part of it.
2. A hit is a folder whose `manifest.json` is whole and lists files that are all there with their sizes.
3. A miss takes the key's lock (`flock`: the kernel frees it when a process dies), looks again, builds in
   `.<key>.<random>/`, writes `manifest.json` last and renames the folder into place.
4. Folders of killed builds are swept once their lock is free.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import lance_quant

MANIFEST = "manifest.json"
KEY_DIGITS = 24
LOCK_POLL_SECONDS = 0.2
VERSIONED = ("torch", "transformers", "diffusers", "numpy", "prefect")

log = logging.getLogger("lance_quant")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What determines an artifact. `revision` rises when the stage's code gives another result for the same input."""

    stage: str
    revision: int
    upstream: dict = field(default_factory=dict)  # name -> key, or list of keys
    config: dict = field(default_factory=dict)  # the fields that the stage reads
    files: dict[str, str] = field(default_factory=dict)  # role -> SHA-256 of an input file

    @property
    def fields(self) -> dict:
        return {name: getattr(self, name) for name in ("stage", "revision", "upstream", "config", "files")}

    @property
    def key(self) -> str:
        canonical = json.dumps(self.fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_DIGITS]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A finished artifact: all that passes between tasks."""

    stage: str
    key: str
    path: Path
    summary: dict


@dataclass(frozen=True, kw_only=True)
class Kept:
    """An artifact and whether it was found (`cached`) or built just now."""

    artifact: Artifact
    cached: bool


class Store:
    """The artifact folder. Any number of threads and processes may share one."""

    def __init__(self, root: str | Path):
        self.root = Path(root).absolute()

    def keep(self, identity: Identity, build: Callable[[Path], dict]) -> Kept:
        """The artifact of `identity`, built by `build(empty folder) -> JSON-able summary` where it is missing."""
        found = self.find(identity)
        if found:
            return Kept(artifact=found, cached=True)
        stage = self.root / identity.stage
        stage.mkdir(parents=True, exist_ok=True)
        with _locked(stage / f".{identity.key}.lock"):
            found = self.find(identity)
            if found:
                return Kept(artifact=found, cached=True)
            _remove(_temporaries(stage, identity.key))
            if (stage / identity.key).exists():
                log.warning("%s/%s is damaged: building it again", identity.stage, identity.key)
                _remove([stage / identity.key])
            return Kept(artifact=self._build(identity, build, stage), cached=False)

    def find(self, identity: Identity) -> Artifact | None:
        """The artifact if it is there and undamaged: its manifest, and every file at its size."""
        folder = self.root / identity.stage / identity.key
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (FileNotFoundError, ValueError):  # not there, or not the JSON that was written
            return None
        for name, output in manifest["outputs"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != output["bytes"]:
                return None
        return Artifact(stage=identity.stage, key=identity.key, path=folder, summary=manifest["summary"])

    def sweep(self) -> list[Path]:
        """Remove what killed runs left behind: temporary folders whose key nobody has locked."""
        swept = []
        for folder in self.root.glob("*/.*.*"):
            key = folder.name.split(".")[1]
            if folder.is_dir() and len(key) == KEY_DIGITS:
                with _locked(folder.parent / f".{key}.lock", wait=False) as free:
                    if free:
                        _remove([folder])
                        swept.append(folder)
        return swept

    def _build(self, identity: Identity, build: Callable[[Path], dict], stage: Path) -> Artifact:
        draft = stage / f".{identity.key}.{secrets.token_hex(4)}"
        draft.mkdir()
        started = time.monotonic()
        try:
            summary = build(draft)
            outputs = {name: _describe(draft / name) for name in _files(draft)}
            manifest = identity.fields | {
                "key": identity.key,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - started, 3),
                "versions": _versions(),
                "outputs": outputs,
                "summary": summary,
            }
            _write_through(draft / MANIFEST, json.dumps(manifest, indent=1))
        except BaseException:
            _remove([draft])
            raise
        draft.rename(stage / identity.key)
        # read back, so that a built artifact and a found one carry the same summary (JSON has no tuples or Paths)
        return self.find(identity)


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`; yields False where `wait` is off and another holds it. The file goes with the lock."""
    told = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(path, handle):
                break
            os.close(handle)  # its last holder removed the file between our open and our lock
        except BlockingIOError:
            os.close(handle)
            if not wait:
                yield False
                return
            if not told:
                log.info("waiting for another run that builds %s%s", path.parent.name, path.stem.replace(".", "/"))
                told = True
            time.sleep(LOCK_POLL_SECONDS)
    try:
        yield True
    finally:
        path.unlink()
        os.close(handle)


def _is_file(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _temporaries(stage: Path, key: str) -> list[Path]:
    return [folder for folder in stage.glob(f".{key}.*") if folder.is_dir()]


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def _files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _write_through(file: Path, text: str) -> None:
    """Write and wait for the disk, so that a power cut after the rename finds the text and not an empty file."""
    with file.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _describe(file: Path) -> dict:
    with file.open("rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _versions() -> dict[str, str]:
    return {"lance_quant": lance_quant.__version__} | {name: metadata.version(name) for name in VERSIONED}
