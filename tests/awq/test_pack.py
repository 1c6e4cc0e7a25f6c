import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lance_quant.awq.pack as pack_module
from lance_quant.awq.pack import PackJob, pack
from lance_quant.awq.search import LayerJob, search_layer
from lance_quant.calibration.activations import SiteActivations
from lance_quant.checkpoint.layout import POSITION_TABLE, expected_shapes, targets
from lance_quant.checkpoint.native import PARTS, packed_specs, unpack_nibbles
from lance_quant.checkpoint.reader import PIECE_BYTES
from lance_quant.errors import LanceQuantError
from lance_quant.model.parity import WEIGHTS
from tests.golden_cases import FOLDER, GOLDEN
from tests.published import MINMAX, PUBLISHED, PUBLISHED_SIZES
from tests.random_layers import checkpoint_of, random_checkpoint, small_config


def packed(tmp_path, config=None, **changes):
    """A random checkpoint searched with minmax and packed: (job, folder, summary)."""
    checkpoint = random_checkpoint(tmp_path / "model", config or small_config(layers=2))
    bits = changes.get("bits", 4)
    layers = []
    for layer in range(checkpoint.config.num_hidden_layers):
        layers.append(tmp_path / f"layer{layer}")
        layers[-1].mkdir()
        job = LayerJob(checkpoint=checkpoint, layer=layer, capture=None, recipe=MINMAX, group_size=32, bits=bits)
        search_layer(job, layers[-1], "cpu")
    job = PackJob(checkpoint=checkpoint, layers=layers, recipe=MINMAX, group_size=32, bits=4, tasks_calibrated=["t2i"])
    job = replace(job, **changes)
    out = tmp_path / "packed"
    out.mkdir()
    return job, out, pack(job, out)


def test_round_trip(tmp_path):
    calls = []
    job, out, summary = packed(tmp_path)
    assert sorted(path.name for path in out.iterdir()) == ["awq_meta.json", "awq_state_dict.safetensors"]
    source = load_file(job.checkpoint.model_file)
    made = load_file(out / "awq_state_dict.safetensors")
    names = {target.name for target in targets(job.checkpoint.config)}
    kept = {key for key in source if key.removesuffix(".weight") not in names}
    assert set(made) == kept | {f"{name}.{part}" for name in names for part in PARTS}
    assert any(key.endswith("q_proj.bias") for key in kept)
    for key in kept:
        assert torch.equal(made[key], source[key].to(torch.bfloat16)), key
    for name in names:
        codes = unpack_nibbles(made[f"{name}.qweight"]).view(made[f"{name}.scales"].shape + (32,)).float()
        weight = (codes - made[f"{name}.zeros"][..., None]) * made[f"{name}.scales"][..., None].float()
        step = made[f"{name}.scales"][..., None].float()
        assert ((weight - source[f"{name}.weight"].view_as(weight)).abs() <= 1.1 * step).all(), name
    assert summary.tensors == len(made) and summary.plain_linears == 28 and summary.awq_linears == 0
    assert summary.tensor_bytes == sum(tensor.nbytes for tensor in made.values())
    assert summary.bytes == (out / "awq_state_dict.safetensors").stat().st_size
    again = tmp_path / "again"
    again.mkdir()
    pack(job, again, progress=lambda *step: calls.append(step))
    assert calls[0][:2] == (0, len(made)) and len(calls) == len(made)
    for file in ("awq_meta.json", "awq_state_dict.safetensors"):
        assert (again / file).read_bytes() == (out / file).read_bytes()


def test_meta_of_the_published_recipe_is_the_golden_one(tmp_path, monkeypatch):
    """Through search_layer and pack: only `recipe` is new in the meta file, the tensors are the golden bytes."""
    statistics = load_file(FOLDER / "published_awq_stats.safetensors")
    checkpoint = checkpoint_of(FOLDER / WEIGHTS, GOLDEN.config())

    def sites_of(folder, layer):
        sites = {}
        for target in targets(checkpoint.config):
            mean = statistics.get(f"{target.name}.mean_abs")
            if target.layer == layer and mean is not None:
                none = torch.empty(0, target.in_features, dtype=torch.bfloat16)
                per_task = {"fixture": mean}
                sites[target.path, target.site] = SiteActivations(
                    tasks=["fixture"],
                    tokens={"fixture": 100},
                    mean_abs=per_task,
                    mean_sq=per_task,
                    max_abs=per_task,
                    rows=none,
                    row_tasks=[],
                    row_samples=[],
                    row_timesteps=torch.empty(0),
                )
        return sites

    monkeypatch.setattr("lance_quant.awq.search.read_layer", sites_of)
    layers = [tmp_path / "0", tmp_path / "1"]
    for layer, folder in enumerate(layers):
        folder.mkdir()
        job = LayerJob(checkpoint=checkpoint, layer=layer, capture=tmp_path, recipe=PUBLISHED, group_size=32, bits=4)
        search_layer(job, folder, "cpu")
    out = tmp_path / "out"
    out.mkdir()
    pack(
        PackJob(
            checkpoint=checkpoint, layers=layers, recipe=PUBLISHED, group_size=32, bits=4, tasks_calibrated=["fixture"]
        ),
        out,
    )
    golden_meta = json.loads((FOLDER / "published_awq_g32_meta.json").read_text())
    meta = json.loads((out / "awq_meta.json").read_text())
    assert meta.pop("recipe") == asdict(PUBLISHED)
    assert meta == golden_meta and list(meta) == list(golden_meta)
    made = load_file(out / "awq_state_dict.safetensors")
    for key, tensor in load_file(FOLDER / "published_awq_g32.safetensors").items():
        assert made[key].dtype == tensor.dtype and torch.equal(made[key], tensor), key


def test_three_bits_lie_in_nibbles(tmp_path):
    _, out, _ = packed(tmp_path, small_config(), bits=3)
    meta = json.loads((out / "awq_meta.json").read_text())
    made = load_file(out / "awq_state_dict.safetensors")
    assert meta["n_bit"] == 3 and {row["n_bit"] for row in meta["per_weight"].values()} == {3}
    for key, tensor in made.items():
        if key.endswith("qweight"):
            assert unpack_nibbles(tensor).max() == 7
        if key.endswith("zeros"):
            assert tensor.max() <= 7


def test_refusals(tmp_path):
    job, _, _ = packed(tmp_path)
    with pytest.raises(LanceQuantError, match="bits=5 does not fit"):
        pack(replace(job, bits=5), tmp_path)
    with pytest.raises(LanceQuantError, match="no search artifact holds .*layers.1.self_attn.q_proj: search layer 1"):
        pack(replace(job, layers=job.layers[:1]), tmp_path)
    with pytest.raises(LanceQuantError, match="was searched at bits=4, pack was asked for 3"):
        pack(replace(job, bits=3), tmp_path)
    file = job.layers[1] / "layer.safetensors"
    tensors = load_file(file)
    del tensors["language_model.model.layers.1.mlp.up_proj.zeros"]
    save_file(tensors, file)
    with pytest.raises(LanceQuantError, match="no layer.safetensors holds .*up_proj.zeros"):
        pack(job, tmp_path)


VIDEO_VIT_PARAMETERS = 668_684_288


@pytest.mark.parametrize(
    ("group_size", "image", "video"),
    [
        (32, 4_567_040_096, 6_407_725_152),
        (64, 4_306_927_712, 6_147_612_768),
        (128, 4_176_871_520, 6_017_556_576),
    ],
)
def test_sizes_of_the_real_models(group_size, image, video):
    """Tensor bytes of both published models, from shapes alone."""
    config = PUBLISHED_SIZES
    groups = {target.name: group_size for target in targets(config)}
    assert len(groups) == 504
    shapes = expected_shapes(config)
    for table, vit, size in ((4096, 0, image), (126976, VIDEO_VIT_PARAMETERS, video)):
        source = [*shapes.items(), (POSITION_TABLE, (table, 2048)), ("vit_model.all", (vit,))]
        assert sum(spec.bytes for spec in packed_specs(source, groups)) == size


def test_large_tensors_come_in_pieces(tmp_path, monkeypatch):
    """A vocabulary far larger than a layer: packing may not hold the model, nor its largest tensor."""
    config = replace(small_config(), vocab_size=400_000)  # two tensors of 102 MB in float32
    checkpoint = random_checkpoint(tmp_path / "model", config)
    folder = tmp_path / "layer"
    folder.mkdir()
    search_layer(
        LayerJob(checkpoint=checkpoint, layer=0, capture=None, recipe=MINMAX, group_size=32, bits=4), folder, "cpu"
    )
    job = PackJob(checkpoint=checkpoint, layers=[folder], recipe=MINMAX, group_size=32, bits=4, tasks_calibrated=[])
    held = []

    class Watch(pack_module.TensorWriter):
        def write(self, name, tensor):
            held.append(tensor.nbytes)
            super().write(name, tensor)

    monkeypatch.setattr(pack_module, "TensorWriter", Watch)
    pack(job, tmp_path)
    assert max(held) <= PIECE_BYTES // 2
    made = load_file(tmp_path / "awq_state_dict.safetensors")
    key = "language_model.lm_head.weight"
    assert torch.equal(made[key], load_file(checkpoint.model_file)[key].to(torch.bfloat16))
