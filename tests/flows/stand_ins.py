"""Stand-ins for the library's stages, so that the pipeline around them runs in milliseconds.

    python -m tests.flows.stand_ins checkpoint.path=...     # `python -m flows.full_run` over the stand-ins

Each call appends its name to $CALLS. Layer $SLOW_FROM and those after it take $SECONDS each; layer or stage $BROKEN
raises, stage $REFUSED finds bad input. Capture shows $GEN_TOKENS tokens to the generation path and takes
$CAPTURE_SECONDS, in units of work of a tenth.
"""

import hashlib
import importlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lance_quant.errors import LanceQuantError

LAYERS = 4
SCORE = 0.25
TOKENS = 1000

CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"mrope_section": [8, 12, 12]},
    "eos_token_id": 0,
    "vision_start_token_id": 1,
    "vision_end_token_id": 2,
    "video_token_id": 3,
}


def write_checkpoint(root: Path) -> Path:
    """A folder that opens as a checkpoint, with hardly a weight in it."""
    folder, vit = root / "Lance_stand_in", root / "Qwen2.5-VL-ViT"
    folder.mkdir()
    vit.mkdir()
    save_file({"weight": np.zeros(4, np.float32)}, folder / "model.safetensors")
    (folder / "llm_config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    (vit / "config.json").write_text("{}")
    save_file({"weight": np.zeros(1, np.float32)}, vit / "vit.safetensors")
    save_file({"weight": np.zeros(1, np.float32)}, root / "Wan2.2_VAE.safetensors")
    return folder


@dataclass(frozen=True)
class CheckpointSummary:
    layout: str
    layers: int
    targets: dict
    fingerprint: str
    files: dict


@dataclass(frozen=True)
class CaptureSummary:
    tokens: dict


@dataclass(frozen=True)
class Summary:
    bytes: int = 1


@dataclass(frozen=True)
class Scores:
    metrics: dict


@dataclass(frozen=True)
class Written:
    html: str = "report.html"
    card: str = "README.md"
    headline: str = "4 of 4 answers unchanged"


def called(name: str) -> None:
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(f"{name}\n")
    if name == os.environ.get("REFUSED"):
        raise LanceQuantError("the picture is not a picture: fetch it again")
    if name == os.environ.get("BROKEN"):
        raise RuntimeError("device lost")


def inspect_checkpoint(checkpoint, hash_cache):
    digest = hashlib.sha256(checkpoint.model_file.read_bytes()).hexdigest()
    files = {"model": {"path": str(checkpoint.model_file), "sha256": digest, "bytes": 1}}
    return CheckpointSummary("image", LAYERS, {"und": 7 * LAYERS, "gen": 7 * LAYERS}, digest, files)


def check_vae(path):
    pass


def capture(checkpoint, cfg, out, device, progress=None):
    called("capture")
    (out / "coverage.parquet").write_bytes(b"1")
    units = int(10 * float(os.environ.get("CAPTURE_SECONDS", "0.1")))
    for unit in range(units):
        time.sleep(0.1 if units > 1 else 0)
        progress(unit + 1, units, "samples")
    gen = int(os.environ.get("GEN_TOKENS", TOKENS))
    return CaptureSummary({"x2t_image": {"und": TOKENS, "gen": 0}, "t2i": {"und": 0, "gen": gen}})


def search_layer(job, out, device):
    called(f"search-{job.layer}")
    if job.layer >= int(os.environ.get("SLOW_FROM", LAYERS)):
        time.sleep(float(os.environ["SECONDS"]))
    (out / "layer.safetensors").write_bytes(b"1")
    return Summary()


def pack(job, out, progress=None):
    called("pack")
    (out / "awq_state_dict.safetensors").write_bytes(b"4" * len(job.layers))
    (out / "awq_meta.json").write_text(json.dumps({"bits": job.bits}))
    return Summary()


def run_baseline(checkpoint, cfg, out, device, progress=None):
    called("baseline")
    (out / "answers.parquet").write_bytes(b"1")
    return Summary()


def compare(job, out, device, progress=None):
    called("evaluate")
    (out / "metrics.json").write_text("{}")
    return Scores({"kl": SCORE, "samples_x2t": 4})


def write_report(job, out):
    called("report")
    (out / "report.html").write_text("<html>")
    (out / "README.md").write_text("card")
    return Written()


STAND_INS = {
    "lance_quant.checkpoint.inspect": inspect_checkpoint,
    "lance_quant.model.vae": check_vae,
    "lance_quant.calibration.capture": capture,
    "lance_quant.awq.search": search_layer,
    "lance_quant.awq.pack": pack,
    "lance_quant.evaluation.baseline": run_baseline,
    "lance_quant.evaluation.compare": compare,
    "lance_quant.evaluation.report": write_report,
}


def install(setattr=setattr) -> None:
    """Put the stand-ins in the library's place; `monkeypatch.setattr` takes them away again."""
    for module, function in STAND_INS.items():
        setattr(importlib.import_module(module), function.__name__, function)


if __name__ == "__main__":
    from flows.command import run_command
    from flows.full_run import main
    from tasks.config import register

    install()
    register()
    run_command(main)
