"""Every mistake a user can make in a command: one sentence, exit code 2, no traceback."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tasks.config import compose_config, register
from tests.flows.conftest import NO_SERVER, ROOT, full_run

MISTAKES = {
    "grup_size=64": "Key 'grup_size' not in 'RunConfig'",
    "+x=1": "Key 'x' not in 'RunConfig'",
    "+checkpoint.foo=1": "Key 'foo' not in 'CheckpointConfig'",
    "checkpoint.foo=1": "Key 'foo' not in 'CheckpointConfig'",
    "group_size=abc": "group_size=abc; Value 'abc' of type 'str' could not be converted to Integer",
    "bits=null": "'bits' is not Optional",
    "checkpoint=imag": "Could not find 'checkpoint/imag'; Available options in 'checkpoint': image; text; tiny",
    "checkpoint=null": "checkpoint=null names no choice",
    "group_size=64,128": "add --multirun",
    "foo": "Error parsing override 'foo'",
    "~recipe": "Missing mandatory value: recipe",
    "group_size=0": "group_size=0 must be at least 1",
    "group_size=96": "group_size=96 does not divide the 128 inputs of language_model.model.layers.0.self_attn.q_proj",
    "bits=9": "bits=9 does not fit",
    "seed=-1": "seed=-1 must",
    "runner.devices=3": "runner.devices=3 must be auto or a list",
    "runner.devices=[cpu0]": "runner.devices=cpu0 is unknown: take auto, cpu, cuda or cuda:1",
    "runner.devices=[cuda:99]": "runner.devices=cuda:99, but this machine has",
    "runner.workers=-1": "runner.workers=-1 must",
    "artifacts=''": "artifacts must name a folder",
    "calibration.tasks=[paint]": "paint",
    "recipe.scoring=magic": "scoring has no 'magic'",
    "checkpoint.image_edge=100": "checkpoint.image_edge=100 must be a positive multiple of 16",
    "checkpoint.image_edge=1040": "checkpoint.image_edge=1040 is beyond the position table of",
    "checkpoint=video": "model.safetensors holds no vision tower, so it is an image model: choose checkpoint=image",
    "checkpoint.path=/nowhere": "is not at /nowhere: get it from https://huggingface.co/bytedance-research/Lance "
    "and give its folder as checkpoint.path=...",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_one_sentence(bench, override, monkeypatch, capsys):
    assert MISTAKES[override] in refusal(bench, monkeypatch, capsys, override)


def refusal(bench, monkeypatch, capsys, *overrides: str) -> str:
    """The one sentence with which the command ends."""
    from flows.command import run_command
    from flows.full_run import main

    groups = [override.split("=")[0].lstrip("+~") for override in overrides]
    others = [given for given in bench.overrides if given.split("=")[0] not in groups]
    monkeypatch.setenv("PREFECT_API_URL", NO_SERVER)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(bench.folder)
    monkeypatch.setattr(sys, "argv", ["flows.full_run", *others, *overrides])
    register()
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_group_size_that_a_searched_fold_cannot_take(bench, monkeypatch, capsys):
    """Recipe published falls back for the other linears only."""
    assert "group_size=48 does not divide the 128 inputs" in refusal(
        bench, monkeypatch, capsys, "recipe=published", "group_size=48"
    )


def test_a_video_model_called_image(bench, monkeypatch, capsys):
    save_file({"vit_model.weight": np.zeros(1, np.float32)}, bench.checkpoint / "model.safetensors")
    assert "holds a vision tower, so it is a video model: choose checkpoint=video" in refusal(
        bench, monkeypatch, capsys, "checkpoint=image"
    )


def wrong_size(root):
    file = root / "Lance_tiny" / "llm_config.json"
    file.write_text(file.read_text().replace('"intermediate_size": 256', '"intermediate_size": 512'))


def truncated_tower(root):
    file = root / "Qwen2.5-VL-ViT" / "vit.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def truncated_vae(root):
    file = root / "Wan2.2_VAE.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated_vae, r"/Wan2\.2_VAE\.safetensors is truncated"),
        (wrong_size, r"/model\.safetensors: '.*' is \[.*256.*\], the config asks for \[.*512.*\]"),
        (truncated_tower, r"/vit\.safetensors is truncated"),
    ],
)
def test_a_checkpoint_that_load_refuses(bench, prefect_url, damage, words):
    shipped = Path(compose_config([]).checkpoint.path).parent
    shutil.copytree(shipped, bench.folder / "weights")
    damage(bench.folder / "weights")
    done = full_run(
        f"checkpoint.path={bench.folder / 'weights' / 'Lance_tiny'}",
        f"artifacts={bench.artifacts}",
        PREFECT_API_URL=prefect_url,
    )
    assert done.returncode == 2, done.stderr
    assert re.match(f"error: .*{words}", done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr and "Unfinished" not in done.stderr


def test_bad_input_to_a_later_stage(bench, prefect_url):
    done = bench.run(PREFECT_API_URL=prefect_url, REFUSED="baseline")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "error: the picture is not a picture: fetch it again"
    assert "Traceback" not in done.stderr and "Unfinished" not in done.stderr


def test_real_checkpoint_that_is_not_there(bench):
    """As a user meets it, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.full_run", "checkpoint=image", f"artifacts={bench.artifacts}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: checkpoint 'image' is not at downloads/Lance_3B: get it from")
    assert done.stderr.count("\n") == 1


def test_help_needs_no_server():
    done = subprocess.run(
        [sys.executable, "-m", "flows.full_run", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0
    assert "recipe: awq, best, fast, minmax, published" in done.stdout


def test_schedule_without_a_server_says_what_to_do():
    done = subprocess.run([sys.executable, "-m", "flows.schedule"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: a schedule needs a Prefect server: run `prefect server start` and set "
        "PREFECT_API_URL=http://127.0.0.1:4200/api\n"
    )


def test_a_server_that_does_not_answer(bench):
    done = bench.run(PREFECT_API_URL=NO_SERVER)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: no Prefect server answers at PREFECT_API_URL={NO_SERVER}: start it with `prefect server start`, "
        "or unset the variable\n"
    )
