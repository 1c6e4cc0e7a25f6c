"""Every mistake a user can make in a command: one sentence, exit code 2, no traceback."""

import subprocess
import sys

import pytest

from tests.flows.conftest import NO_SERVER, ROOT

MISTAKES = {
    "grup_size=64": "Key 'grup_size' not in 'RunConfig'",
    "+x=1": "Key 'x' not in 'RunConfig'",
    "+checkpoint.foo=1": "Key 'foo' not in 'CheckpointConfig'",
    "checkpoint.foo=1": "Key 'foo' not in 'CheckpointConfig'",
    "group_size=abc": "group_size=abc; Value 'abc' of type 'str' could not be converted to Integer",
    "bits=null": "'bits' is not Optional",
    "checkpoint=imag": "Could not find 'checkpoint/imag'; Available options in 'checkpoint': image; tiny; video",
    "checkpoint=null": "checkpoint=null names no choice",
    "group_size=64,128": "add --multirun",
    "foo": "Error parsing override 'foo'",
    "~recipe": "Missing mandatory value: recipe",
    "group_size=0": "group_size=0 must be at least 1",
    "group_size=96": "group_size=96 does not divide the 128 inputs of language_model.model.layers.0.self_attn.q_proj",
    "bits=9": "bits=9 does not fit",
    "seed=-1": "seed=-1 must",
    "runner.devices=3": "runner.devices=3 must be auto or a list",
    "runner.workers=-1": "runner.workers=-1 must",
    "artifacts=''": "artifacts must name a folder",
    "calibration.tasks=[paint]": "paint",
    "recipe.scoring=magic": "scoring has no 'magic'",
    "checkpoint.image_edge=100": "checkpoint.image_edge=100 must be a positive multiple of 16",
    "checkpoint.path=/nowhere": "is not at /nowhere: get it from https://huggingface.co/bytedance-research/Lance "
    "and give its folder as checkpoint.path=...",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_one_sentence(bench, override, monkeypatch, capsys):
    from flows.command import run_command
    from flows.full_run import main
    from tasks.config import register

    group = override.split("=")[0].lstrip("+~")
    others = [given for given in bench.overrides if given.split("=")[0] != group]
    monkeypatch.setenv("PREFECT_API_URL", NO_SERVER)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(bench.folder)
    monkeypatch.setattr(sys, "argv", ["flows.full_run", *others, override])
    register()
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert MISTAKES[override] in err


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
    assert "recipe: awq, minmax, published" in done.stdout


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
