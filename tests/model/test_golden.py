"""The native model against upstream's own outputs (tests/golden/manifest.json): every case, every step."""

import pytest
import torch

from lance_quant.errors import LanceQuantError
from lance_quant.model.parity import Golden, run_case
from lance_quant.model.positions import generation_positions
from tests.golden_cases import FOLDER, GOLDEN

GENERATION = [
    name for name, case in GOLDEN.manifest["f32"]["cases"].items() if "timestep_shift" in case
]  # fmt: skip


@pytest.mark.parametrize(("mode", "name"), GOLDEN.cases())
def test_case(mode, name):
    verdict = run_case(GOLDEN, mode, name)
    assert verdict.passed, verdict


def test_there_are_cases_of_every_kind():
    names = {name for _, name in GOLDEN.cases()}
    assert {"x2t_image_kv", "x2t_image_nocache", "t2i_kv_cfg4", "t2i_kv_nocfg", "t2i_nocache_cfg4"} < names
    assert {"t2v_kv_cfg4", "image_edit_kv_cfg4", "vae", "preproc", "posembed_2048"} < names
    assert {name for mode, name in GOLDEN.cases() if mode == "bf16"} == {"x2t_image_kv", "t2i_kv_cfg4"}


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("t2i_kv_cfg4", "language_model.model.layers.1.mlp_moe_gen.up_proj.weight"),
        ("t2i_nocache_cfg4", "language_model.model.layers.0.self_attn.k_norm_moe_gen.weight"),
        ("x2t_image_kv", "vit_model.blocks.0.attn.proj.weight"),
    ],
)
def test_a_changed_weight_fails(name, weight):
    parameter = GOLDEN.lance("f32").get_parameter(weight)
    kept = parameter.clone()
    try:
        parameter.mul_(1.001)
        assert not run_case(GOLDEN, "f32", name).passed
    finally:
        parameter.copy_(kept)


@pytest.mark.parametrize("name", GENERATION)
def test_positions(name):
    case, tensors = GOLDEN.case("f32", name)
    sample = GOLDEN.sample(case, tensors)
    conditional, unconditional, _ = generation_positions(
        sample.ids, sample.grids, sample.modality, GOLDEN.config().video_token_id
    )
    if "KVcache" not in case["path"]:
        assert torch.equal(conditional, tensors["out.pos_ids.0"])
        assert torch.equal(unconditional, tensors["out.pos_ids.1"])
        return
    expected = [tensors[key] for key in sorted(tensors) if key.startswith("out.pos_ids")]
    mine = [conditional[:, start:end] for start, end, _ in sample.spans()]
    start, end = next((a, b) for a, b, mode in sample.spans() if mode == "noise")
    dropped = int((sample.modality == 0).sum())
    mine.append(unconditional[:, start - dropped : end - dropped])
    for positions in expected:
        assert any(torch.equal(positions, candidate) for candidate in mine)


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text((FOLDER / "manifest.json").read_text())
    with pytest.raises(LanceQuantError, match="t2i_kv_cfg4.safetensors is missing"):
        run_case(Golden(tmp_path), "f32", "t2i_kv_cfg4")
