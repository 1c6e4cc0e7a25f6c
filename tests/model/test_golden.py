"""The native model against upstream's own outputs (tests/golden/manifest.json): every case, every step."""

import pytest
import torch

from lance_quant.model.positions import generation_positions
from lance_quant.model.sampler import FlowConfig, run_flow, start_flow
from lance_quant.model.understanding import answer, forced_logits
from tests.golden_cases import MANIFEST, golden_case, golden_lance, golden_sample, relative_l2

CASES = [
    (mode, name) for mode in ("f32", "bf16") for name, case in MANIFEST[mode]["cases"].items() if "attn_modes" in case
]
UNDERSTANDING = [case for case in CASES if case[1].startswith("x2t")]
GENERATION = [case for case in CASES if case not in UNDERSTANDING]

# manifest: 2e-4 relative is generous in f32; bf16 differs by about 1 % from any other order of summation
TOLERANCE = {"f32": 2e-5, "bf16": 1.5e-2}


@pytest.mark.parametrize(("mode", "name"), UNDERSTANDING)
def test_understanding(mode, name):
    case, tensors = golden_case(mode, name)
    lance, sample = golden_lance(mode), golden_sample(case, tensors)
    expected = tensors["out.tokens"].tolist()
    assert relative_l2(lance.look(sample.vit_patches, sample.vit_grids), tensors["out.vit"]) < TOLERANCE[mode]
    result = answer(lance, sample, len(expected), keep_logits=True, cached="KVcache" in case["path"])
    assert result.tokens == expected
    assert relative_l2(result.logits, tensors["out.logits"]) < TOLERANCE[mode]
    assert relative_l2(forced_logits(lance, sample, expected), tensors["out.logits"]) < TOLERANCE[mode]


@pytest.mark.parametrize(("mode", "name"), GENERATION)
def test_generation(mode, name):
    case, tensors = golden_case(mode, name)
    lance, sample = golden_lance(mode), golden_sample(case, tensors)
    cfg = FlowConfig(
        steps=case["steps"],
        timestep_shift=case["timestep_shift"],
        guidance=case["cfg_text_scale"],
        cached="KVcache" in case["path"],
        bf16_norms=mode == "bf16",
    )
    seen = {"t": [], "x": [], "conditional": [], "unconditional": []}

    def keep(step, t, state, velocities):
        seen["t"].append(t)
        seen["x"].append(state.clone())
        seen["conditional"].append(velocities.conditional)
        if velocities.unconditional is not None:
            seen["unconditional"].append(velocities.unconditional)

    state = tensors["out.x_t"][0].to(lance.dtype)
    final = run_flow(start_flow(lance, sample, state, cfg), state, cfg, keep)
    assert torch.equal(torch.stack(seen["t"]), tensors["out.timesteps"])
    assert relative_l2(torch.stack(seen["x"]), tensors["out.x_t"]) < TOLERANCE[mode]
    assert relative_l2(torch.stack(seen["conditional"]), tensors["out.v_cond"]) < TOLERANCE[mode]
    guided = int(tensors["out.cfg_on"].sum()) if cfg.guidance > 1 else 0
    assert len(seen["unconditional"]) == guided
    if guided:
        assert relative_l2(torch.stack(seen["unconditional"]), tensors["out.v_uncond"]) < TOLERANCE[mode]
    finals = [tensors[key] for key in sorted(tensors) if key.startswith("out.final_latent")]
    assert relative_l2(final, torch.cat([latent.flatten(0, 2) for latent in finals])) < TOLERANCE[mode]


@pytest.mark.parametrize("name", [name for mode, name in GENERATION if mode == "f32"])
def test_positions(name):
    case, tensors = golden_case("f32", name)
    sample = golden_sample(case, tensors)
    conditional, unconditional, _ = generation_positions(
        sample.ids, sample.grids, sample.modality, golden_lance("f32").config.video_token_id
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
