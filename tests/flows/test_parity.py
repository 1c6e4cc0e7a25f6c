"""`python -m flows.parity`: a line a case, and an exit code that tells."""

import json
import math
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from lance_quant.model.parity import WEIGHTS
from tests.golden_cases import FOLDER

CASE, ANSWER = "t2i_kv_nocfg", "x2t_image_kv"


@pytest.fixture
def golden(tmp_path):
    """Fills a folder: name of a case -> (shipped f32 case, what to change of its settings and tensors)."""

    def make(cases, **manifest_keys):
        manifest = json.loads((FOLDER / "manifest.json").read_text()) | manifest_keys
        shipped = manifest["f32"]["cases"]
        manifest["f32"]["cases"] = {}
        del manifest["bf16"]
        for name, (source, change) in cases.items():
            case = shipped[source] | {"file": f"{name}.safetensors"}
            tensors = load_file(FOLDER / shipped[source]["file"])
            change(case, tensors)
            manifest["f32"]["cases"][name] = case
            save_file(tensors, tmp_path / f"{name}.safetensors")
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        shutil.copy(FOLDER / WEIGHTS, tmp_path)
        return tmp_path

    return make


def as_shipped(case, tensors):
    pass


def parity(folder):
    command = [sys.executable, "-m", "flows.parity", f"golden={folder}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def put(key, entry, value):
    """A change of one entry of a tensor."""

    def change(case, tensors):
        tensors[key][entry] = value

    return change


def without(key):
    def change(case, tensors):
        (tensors if key in tensors else case).pop(key)

    return change


def cut(key):
    def change(case, tensors):
        tensors[key] = tensors[key][..., :-1].contiguous()

    return change


def still(case, tensors):
    """No split is drawn: nothing of ours looks for that beforehand."""
    case["attn_modes"] = ["causal"] * len(case["attn_modes"])


def test_a_case_that_agrees(golden):
    done = parity(golden({CASE: (CASE, as_shipped)}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok") and CASE in done.stdout and len(done.stdout.splitlines()) == 1


def test_a_case_that_differs(golden):
    def change(case, tensors):
        tensors["out.v_cond"][1] *= 1.001

    done = parity(golden({CASE: (CASE, change)}))
    assert done.returncode == 1
    assert done.stdout.startswith("DIFFERS") and "conditional velocity" in done.stdout


NOT_FINITE = {
    "a_logit": (ANSWER, put("out.logits", (3, 7), math.nan), "logits"),
    "the_last_velocity": (CASE, put("out.v_cond", (-1, 0, 0), math.nan), "conditional velocity"),
    "the_final_latent": (CASE, put("out.final_latent.0", (0, 1, 2, 3), math.nan), "final latent"),
    "an_infinite_velocity": (CASE, put("out.v_cond", (-1, 0, 0), math.inf), "conditional velocity"),
    "what_nothing_compares": (CASE, put("out.t_emb_step0", 0, math.nan), "out.t_emb_step0"),
}


def test_a_reference_that_is_not_finite(golden):
    done = parity(golden({name: (source, change) for name, (source, change, _) in NOT_FINITE.items()}))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == len(NOT_FINITE)
    for line, (name, (_, _, where)) in zip(lines, NOT_FINITE.items(), strict=True):
        assert line.startswith("DIFFERS") and name in line and f"nan in {where} " in line


def test_a_model_that_is_not_finite(golden):
    folder = golden({CASE: (CASE, as_shipped), ANSWER: (ANSWER, as_shipped)})
    weights = load_file(folder / WEIGHTS)
    weights["llm2vae.bias"][0] = math.nan
    weights["language_model.lm_head.weight"][5, 5] = math.nan
    save_file(weights, folder / WEIGHTS)
    done = parity(folder)
    assert done.returncode == 1
    drawn, answered = done.stdout.splitlines()
    assert drawn.startswith("DIFFERS") and " nan in " in drawn
    assert answered.startswith("DIFFERS") and " nan in logits" in answered


MALFORMED = {
    "no_velocity": (without("out.v_cond"), "no_velocity.safetensors", "tensor 'out.v_cond' is missing"),
    "no_steps": (without("steps"), "no_steps", "manifest.json gives it no 'steps'"),
    "no_file": (without("file"), "no_file", "'file'"),
    "a_shape": (cut("out.v_cond"), "a_shape", "'out.v_cond' has shape [3, 24, 47], not [3, 24, 48]"),
    "an_id": (put("in.text_ids", 4, 10**6), "an_id", "'in.text_ids' holds 1000000: its entries are from 0 to 511"),
    "an_index": (put("in.vae_token_indexes", 0, -1), "an_index", "'in.vae_token_indexes' holds -1"),
    "no_kind": (without("out.x_t"), "no_kind", "of no known kind"),
    "a_grid": (put("in.rope_grid_thw", (0, 0, 1), 4), "a_grid", "'in.rope_grid_thw' counts 12 vision tokens, but"),
    "unforeseen": (still, "unforeseen", "StopIteration"),
}


def test_malformed_cases_are_told_and_the_next_ones_run(golden):
    cases = {name: (CASE, change) for name, (change, _, _) in MALFORMED.items()}
    folder = golden(cases | {"not_there": (CASE, as_shipped), "torn": (CASE, as_shipped), "sound": (CASE, as_shipped)})
    (folder / "not_there.safetensors").unlink()
    torn = folder / "torn.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    done = parity(folder)
    assert done.returncode == 1 and not done.stderr
    *failed, sound = done.stdout.splitlines()
    assert sound.startswith("ok") and len(failed) == len(MALFORMED) + 2
    assert all(line.startswith("FAILED  f32") for line in failed)
    for line, (named, words) in zip(failed, [row[1:] for row in MALFORMED.values()], strict=False):
        assert named in line and words in line
    assert "not_there.safetensors is missing" in failed[-2]
    assert "torn.safetensors" in failed[-1] and "not a readable safetensors file" in failed[-1]


def test_a_manifest_that_asks_for_more(golden):
    done = parity(golden({CASE: (CASE, as_shipped)}, tolerances={"f32": 1e-9, "bf16": "some words"}))
    assert done.returncode == 1 and done.stdout.startswith("DIFFERS") and "(at most 1e-09)" in done.stdout


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("{}", "no cases under f32 or bf16"),
        ('{"f32": {"cases": {}}, "bf16": {}}', "no cases under f32 or bf16"),
        ('{"fp8": {"cases": {"a": {"file": "a.safetensors"}}}}', "no cases under f32 or bf16"),
        ('{"f32": {"cases": []}}', "'f32' must be an object"),
        ("[]", "is not a JSON object"),
        ("{", "not readable JSON"),
    ],
)
def test_a_manifest_without_cases(tmp_path, manifest, words):
    (tmp_path / "manifest.json").write_text(manifest)
    refused(parity(tmp_path), words)


def test_a_folder_that_is_not_there(tmp_path):
    refused(parity(tmp_path / "none"), "manifest.json is missing")


def refused(done, words):
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and words in done.stderr and len(done.stderr.splitlines()) == 1
