"""`python -m flows.parity`: a line a case, and an exit code that tells."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests.golden_cases import FOLDER

CASE = "t2i_kv_nocfg"


@pytest.fixture
def one_case(tmp_path):
    """A folder with a single case: any subset of a manifest is one."""
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    manifest["f32"]["cases"] = {CASE: manifest["f32"]["cases"][CASE]}
    del manifest["bf16"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name in (f"{CASE}.safetensors", "tiny_lance_video.safetensors"):
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


def parity(folder):
    command = [sys.executable, "-m", "flows.parity", f"golden={folder}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_case_that_agrees(one_case):
    done = parity(one_case)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok") and CASE in done.stdout and len(done.stdout.splitlines()) == 1


def test_a_case_that_differs(one_case):
    tensors = load_file(one_case / f"{CASE}.safetensors")
    tensors["out.v_cond"][1] *= 1.001
    save_file(tensors, one_case / f"{CASE}.safetensors")
    done = parity(one_case)
    assert done.returncode == 1
    assert done.stdout.startswith("DIFFERS") and "conditional velocity" in done.stdout


def test_a_folder_that_is_not_there(tmp_path):
    done = parity(tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
