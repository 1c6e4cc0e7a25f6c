"""Where calibration samples come from: one function for each `CalibrationConfig.source`, task by task."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from lance_quant.calibration.config import CalibrationConfig, calibrated_tasks
from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.errors import LanceQuantError
from lance_quant.model.prompts import encode
from lance_quant.model.request import Request

TEXT_SUFFIXES = (".txt", ".md")


def calibration_requests(checkpoint: Checkpoint, cfg: CalibrationConfig) -> Iterator[Request]:
    """Requests in the order of the tasks; made as they are asked for, since clips are large."""
    for task in calibrated_tasks(cfg, checkpoint.layout):
        yield from SOURCES[cfg.source](checkpoint, cfg, task)


def _scenes(checkpoint: Checkpoint, cfg: CalibrationConfig, task: str) -> list[Request]:
    from lance_quant.tiny.requests import scene_requests

    edge = checkpoint.edges(task).image_edge
    return scene_requests([task], cfg.samples, edge, seed=cfg.seed, unseen=False)


def _bundled(checkpoint: Checkpoint, cfg: CalibrationConfig, task: str) -> Iterator[Request]:
    from lance_quant.calibration.bundled import iterate_requests

    return iterate_requests(checkpoint, [task], cfg.samples, seed=cfg.seed, held_out=False)


def _published(checkpoint: Checkpoint, cfg: CalibrationConfig, task: str) -> Iterator[Request]:
    from lance_quant.examples import list_examples

    edge = checkpoint.edges(task).image_edge
    for example in list_examples(examples_file(cfg, task), task)[: cfg.samples]:
        yield example.request(height=edge, width=edge, frames=checkpoint.frames)


SOURCES = {"scenes": _scenes, "bundled": _bundled, "published": _published}


def most_samples(cfg: CalibrationConfig, tasks: Iterable[str]) -> int:
    """How many requests there will be at most, for whoever tells of progress."""
    from lance_quant.calibration.bundled import COUNTS

    return sum(min(cfg.samples, COUNTS[task]) if cfg.source == "bundled" else cfg.samples for task in tasks)


def examples_file(cfg: CalibrationConfig, task: str) -> Path:
    """Lance's example file of a task. Raises LanceQuantError where the folder lacks it."""
    if not cfg.examples:
        raise LanceQuantError(
            "calibration=published takes Lance's example files: give their folder as "
            "calibration.examples=/path/to/Lance/config/examples"
        )
    file = Path(cfg.examples).expanduser() / f"{task}_example.json"
    if not file.is_file():
        raise LanceQuantError(f"{file} is missing: give Lance's folder config/examples as calibration.examples=...")
    return file


def text_files(cfg: CalibrationConfig) -> list[Path]:
    """The text files that `calibration.path` names, those of a folder in order of name. Raises LanceQuantError."""
    if not cfg.path:
        raise LanceQuantError("calibration=text has no text: give files or a folder as calibration.path=...")
    named = [cfg.path] if isinstance(cfg.path, str) else list(cfg.path)
    out = []
    for name in named:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES)
            if not found:
                raise LanceQuantError(f"calibration.path={path} holds no {' or '.join(TEXT_SUFFIXES)} file")
            out += found
        elif path.is_file():
            out.append(path)
        else:
            raise LanceQuantError(f"calibration.path={path} is neither a file nor a folder")
    return out


def text_pieces(tokenizer: Tokenizer, cfg: CalibrationConfig) -> list[list[int]]:
    """`samples` pieces of `text_tokens` ids, drawn from all the text; fewer where there is less, at least one.

    A file's last ids that make no piece are left out; files shorter than a piece are joined, an empty line between.
    Raises LanceQuantError where all that does not make one piece.
    """
    length, between = cfg.text_tokens, encode(tokenizer, "\n\n")
    texts, short = [], []
    for file in text_files(cfg):
        try:
            ids = encode(tokenizer, file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise LanceQuantError(f"{file} is not UTF-8 text: leave it out of calibration.path") from None
        if len(ids) >= length:
            texts.append(ids)
        elif ids:
            short += between + ids if short else ids
    pieces = [ids[end - length : end] for ids in [*texts, short] for end in range(length, len(ids) + 1, length)]
    if not pieces:
        raise LanceQuantError(
            f"calibration.path={cfg.path} holds {len(short)} tokens of text, which do not make a piece of {length}: "
            "give more text"
        )
    if len(pieces) <= cfg.samples:
        return pieces
    return [pieces[index] for index in sorted(random.Random(cfg.seed).sample(range(len(pieces)), cfg.samples))]


def fingerprint(checkpoint: Checkpoint, cfg: CalibrationConfig) -> dict[str, str]:
    """Role -> SHA-256 of what lies in the user's own files, wherever they lie; nothing for samples made by code."""
    digest = hashlib.sha256()
    if cfg.source == "text":
        for file in text_files(cfg):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    elif cfg.source == "published":
        for request in calibration_requests(checkpoint, cfg):
            digest.update(repr((request.task, request.prompt, request.instruction, request.answer)).encode())
            digest.update(repr((request.height, request.width, request.frames)).encode())
            for frame in (request.image, *request.video, *request.target):
                if frame is not None:
                    digest.update(repr((frame.mode, frame.size)).encode() + frame.tobytes())
    else:
        return {}
    return {"samples": digest.hexdigest()}
