"""The model card: its header parses, its facts are the artifacts', its snippet reads a weight."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lance_quant.evaluation.card import write_card


def card(job) -> tuple[dict, str]:
    path = job.packed / "README.md"
    write_card(job, path)
    _, front, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter(make_job):
    front, _ = card(make_job())
    assert front["license"] == "apache-2.0" and front["pipeline_tag"] == "any-to-any"
    assert "base_model" not in front  # a small Lance is not ByteDance's
    assert {"image-text-to-text", "text-to-image", "4-bit"} <= set(front["tags"])
    assert front["quantization"]["bits"] == 4 and front["quantization"]["group_size"] == 64
    assert front["quantization"]["recipe"] == "awq" and front["quantization"]["tasks_calibrated"] == [
        "x2t_image",
        "t2i",
    ]


@pytest.mark.parametrize("name", ["image", "video"])
def test_real_checkpoints_name_their_base(make_job, name):
    job = make_job()
    source = job.checkpoint | {"layout": name, "parameters": 6_185_205_808}
    front, body = card(replace(job, name=name, checkpoint=source))
    assert front["base_model"] == "bytedance-research/Lance" and "license" not in front
    assert "The base model's licence applies" in body
    assert ("Vision tower, VAE and tokenizer are not in here" in body) == (name == "image")


def test_body_says_what_was_measured(make_job):
    job = make_job()
    _, body = card(job)
    for wanted in (
        "8 questions about pictures, 4 pictures from text",
        "| `t2i` | 4 | 100 % | 75.0 % | 0.0340 |",
        "drawn scenes of coloured shapes",
        "| Picture PSNR | 31.7 dB |",
        "1.83 MB",
        "9.60 MB",
        "Calibrated on questions about pictures, pictures from text: drawn scenes of coloured shapes.",
        "bf16 8 of 8 right, int4 6 of 8",
    ):
        assert wanted in body, wanted
    assert "manifest" not in body
    assert "No calibration data was used." in card(make_job(searched=False))[1]


def test_snippet_reads_a_weight(make_job, monkeypatch):
    job = make_job()
    _, body = card(job)
    names: dict = {}
    monkeypatch.chdir(job.packed)
    exec(re.search(r"```python\n(.*?)```", body, flags=re.S).group(1), names)
    assert os.getcwd() == str(job.packed)
    name = next(iter(json.loads((job.packed / "awq_meta.json").read_text())["per_weight"])).removesuffix(".weight")
    tensors = load_file(job.packed / "awq_state_dict.safetensors")
    o, i = 3, 71  # odd channel: high nibble; second group
    code = int(tensors[f"{name}.qweight"][o, i // 2]) >> 4
    want = (code - int(tensors[f"{name}.zeros"][o, 1])) * tensors[f"{name}.scales"][o, 1].float()
    assert names["weight"].shape == (128, 128) and names["weight"].dtype == torch.bfloat16
    assert names["weight"][o, i] == want.bfloat16()
