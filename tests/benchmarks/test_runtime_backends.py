"""Every backend of a CPU gives the same answers and velocities, and so do accelerated models."""

import json

import pytest
import torch

from benchmarks import runtime_backends
from lance_quant.model.lance import load_lance
from lance_quant.runtime.accelerate import accelerate
from tests.benchmarks.sentences import sentence_of


def lines_of(out, code) -> dict[str, dict]:
    """What was told of each, once the script has ended so."""
    with pytest.raises(SystemExit) as ended:
        runtime_backends.main([f"out={out}", "device=cpu", "samples=1"])
    assert ended.value.code == code
    return {line["backend"]: line for line in map(json.loads, (out / "backends.jsonl").read_text().splitlines())}


def test_all_of_a_cpu(tmp_path):
    lines = lines_of(tmp_path, 0)
    assert list(lines)[:5] == ["bf16", "accelerated bf16", "reference", "reference, float32", "accelerated auto"]
    assert {"auto", "blocks"} <= set(lines)
    for key in ("logits", "velocities"):
        assert lines["accelerated bf16"][f"{key} from bf16"] < runtime_backends.LIMIT
        assert lines["accelerated auto"][f"{key} from reference, float32"] < runtime_backends.LIMIT


def test_an_accelerated_model_that_is_far_off(tmp_path, monkeypatch):
    def models(checkpoint, folder, device):
        yield "bf16", load_lance(checkpoint, device)
        lance = accelerate(load_lance(checkpoint, device), "on")
        lance.language_model.model.norm.weight.mul_(1.1)
        yield "accelerated bf16", lance

    monkeypatch.setattr(runtime_backends, "models", models)
    far = lines_of(tmp_path, f"1 distances above {runtime_backends.LIMIT}")["accelerated bf16"]
    assert far["velocities from bf16"] < runtime_backends.LIMIT < far["logits from bf16"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("samples=0", "samples=0 must be at least 1"),
        ("device=foo", "device=foo is unknown: take auto, cpu"),
        ("device=cuda", "device=cuda, but this machine has 0 CUDA devices"),
        ("group_size=48", "group_size=48 does not divide"),
        (f"out={__file__}", "is a file: give a folder"),
    ],
)
def test_bad_input_is_told_in_one_sentence(tmp_path, monkeypatch, word, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert said in sentence_of(runtime_backends.main, [f"out={tmp_path}", "device=cpu", word])
