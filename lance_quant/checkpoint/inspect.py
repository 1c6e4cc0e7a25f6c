"""`inspect_checkpoint`: is this the checkpoint that its config describes, and which one exactly.

Only headers are read for the check; the fingerprint reads each file once and remembers it by size and time.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

from lance_quant.checkpoint.fill import check_keys
from lance_quant.checkpoint.layout import (
    PATHS,
    POSITION_TABLE,
    VIT_PREFIX,
    Checkpoint,
    expected_shapes,
    targets,
    vision_shapes,
)
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import read_json

SOURCE_DTYPES = ("F32", "BF16", "F16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
BLOCK = 2**24


@dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """What the load stage found. targets: path -> linears to quantize; files: role -> path, sha256, bytes."""

    layout: str
    layers: int
    tensors: int
    parameters: int
    bytes: int
    targets: dict[str, int]
    fingerprint: str
    files: dict[str, dict]


def inspect_checkpoint(checkpoint: Checkpoint, hash_cache: Path) -> CheckpointSummary:
    """Check every key, shape and dtype of the model and the vision tower, and fingerprint all files.

    hash_cache: JSON file that keeps sha256 beside size and modification time. Raises LanceQuantError naming the first
    fault.
    """
    text = checkpoint.layout == "text"
    shapes = expected_shapes(checkpoint.config, adapters=not text)
    tower = {} if text else vision_shapes(read_json(checkpoint.vit_config_file))
    if checkpoint.vit_file is None:
        shapes |= {VIT_PREFIX + name: shape for name, shape in tower.items()}
    else:
        _check_file(checkpoint.vit_file, tower)
    parameters, size = _check_file(checkpoint.model_file, shapes, checkpoint)
    files = {
        role: {"path": str(path), "sha256": file_hash(path, hash_cache), "bytes": path.stat().st_size}
        for role, path in checkpoint_files(checkpoint).items()
    }
    everything = "\n".join(f"{role} {entry['sha256']}" for role, entry in sorted(files.items()))
    found = targets(checkpoint.config)
    return CheckpointSummary(
        layout=checkpoint.layout,
        layers=checkpoint.config.num_hidden_layers,
        tensors=len(shapes) + (not text),  # and the position table
        parameters=parameters,
        bytes=size,
        targets={path: sum(target.path == path for target in found) for path in PATHS},
        fingerprint=hashlib.sha256(everything.encode()).hexdigest(),
        files=files,
    )


def checkpoint_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """role -> file, of all that determines results."""
    files = {
        "model": checkpoint.model_file,
        "config": checkpoint.config_file,
        "vit_config": checkpoint.vit_config_file,
        "vae": checkpoint.vae_file,
        "vit": checkpoint.vit_file,
    }
    files = {role: file for role, file in files.items() if file is not None}
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            files[name] = checkpoint.folder / name
    return files


def _check_file(
    path: Path, shapes: dict[str, tuple[int, ...]], checkpoint: Checkpoint | None = None
) -> tuple[int, int]:
    """(parameters, bytes) of a file whose tensors are exactly `shapes`; the model's file holds a position table too."""
    with TensorReader(path) as reader:
        check_keys(path, shapes, reader.names())
        parameters = 0
        for name in reader.names():
            shape = reader.shape(name)
            if reader.dtype(name) not in SOURCE_DTYPES:
                raise LanceQuantError(
                    f"{path}: '{name}' is {reader.dtype(name)}, expected one of {', '.join(SOURCE_DTYPES)}: take the "
                    "original checkpoint, not a quantized one"
                )
            if name != POSITION_TABLE and shape != shapes[name]:
                raise LanceQuantError(f"{path}: '{name}' is {list(shape)}, the config asks for {list(shapes[name])}")
            parameters += prod(shape)
        if checkpoint is not None and checkpoint.layout != "text":
            _check_position_table(path, reader, checkpoint)
    return parameters, path.stat().st_size


def _check_position_table(path: Path, reader: TensorReader, checkpoint: Checkpoint) -> None:
    """[rows, hidden] with whole frames of max_latent_size squared; regenerated at run time, so no value is read."""
    if POSITION_TABLE not in reader:
        raise LanceQuantError(f"{path} lacks the tensor '{POSITION_TABLE}': it is not a whole Lance checkpoint")
    rows, hidden = reader.shape(POSITION_TABLE)
    frame = checkpoint.config.max_latent_size**2
    if hidden != checkpoint.config.hidden_size or rows % frame:
        raise LanceQuantError(
            f"{path}: '{POSITION_TABLE}' is {[rows, hidden]}, expected a multiple of {frame} rows of "
            f"{checkpoint.config.hidden_size}"
        )


def file_hash(path: Path, cache: Path) -> str:
    """sha256 of a file, read only where `cache` does not know its size and modification time."""
    stat = path.stat()
    known = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    entries = _read_hashes(cache)
    key = str(path.resolve())
    entry = entries.get(key, {})
    if {name: entry.get(name) for name in known} == known:
        return entry["sha256"]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    entries[key] = known | {"sha256": digest.hexdigest()}
    cache.parent.mkdir(parents=True, exist_ok=True)
    draft = cache.with_name(f".{cache.name}.{os.getpid()}")
    draft.write_text(json.dumps(entries, indent=1))
    draft.replace(cache)
    return digest.hexdigest()


def _read_hashes(cache: Path) -> dict:
    """What is remembered; a file cut off by a power loss is worth no more than none."""
    try:
        return json.loads(cache.read_text())
    except (FileNotFoundError, ValueError):
        return {}
