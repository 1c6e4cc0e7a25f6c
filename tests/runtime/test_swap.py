import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lance_quant
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.pack import PackJob, pack
from lance_quant.awq.search import LayerJob, search_layer
from lance_quant.checkpoint.fill import fill
from lance_quant.checkpoint.layout import POSITION_TABLE, targets
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.errors import LanceQuantError
from lance_quant.model.lance import Lance
from lance_quant.runtime import swap
from lance_quant.runtime.accelerate import accelerate
from lance_quant.runtime.int4_linear import Int4Linear
from lance_quant.runtime.packed import PackedFolder
from lance_quant.runtime.selection import Int4Config
from lance_quant.runtime.swap import load_packed, prepare, swap_linears
from tests.random_checkpoint import VISION
from tests.random_layers import random_checkpoint, small_config

CONFIG = small_config()
MINMAX = RecipeConfig(name="minmax", scoring="none", folds=[])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model file, packed folder) of one random layer, with a position table that readers ignore."""
    root = tmp_path_factory.mktemp("packed")
    checkpoint = random_checkpoint(root / "model", CONFIG)
    tensors = load_file(checkpoint.model_file) | {POSITION_TABLE: torch.zeros(16, 64)}
    save_file(tensors, checkpoint.model_file)
    layer, out = root / "layer", root / "packed"
    layer.mkdir(), out.mkdir()
    search_layer(
        LayerJob(checkpoint=checkpoint, layer=0, capture=None, recipe=MINMAX, group_size=16, bits=4), layer, "cpu"
    )
    job = PackJob(checkpoint=checkpoint, layers=[layer], recipe=MINMAX, group_size=16, bits=4, tasks_calibrated=[])
    pack(job, out)
    return checkpoint.model_file, out


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "packed")


def empty_lance() -> Lance:
    with torch.device("meta"):
        lance = Lance(CONFIG, VISION)
    lance.vit_model = None  # another file holds it
    return lance


def edit(folder, change):
    tensors = load_file(folder / "awq_state_dict.safetensors")
    change(tensors)
    save_file(tensors, folder / "awq_state_dict.safetensors")


def test_a_meta_model_is_filled_whole(made):
    lance = empty_lance()
    load_packed(lance, made[1])
    packed = load_file(made[1] / "awq_state_dict.safetensors")
    state = lance.state_dict()
    assert set(state) == set(packed) - {POSITION_TABLE}
    for key, tensor in state.items():
        assert tensor.dtype == packed[key].dtype and torch.equal(tensor, packed[key]), key
    assert sum(isinstance(module, Int4Linear) for module in lance.modules()) == len(targets(CONFIG)) == 14


def test_a_filled_model_becomes_the_same(made):
    lance = empty_lance()
    fill(lance, made[0], "cpu", torch.bfloat16)
    load_packed(lance, made[1])
    fresh = empty_lance()
    load_packed(fresh, made[1])
    for (key, one), (other_key, other) in zip(lance.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(one, other)


def test_swapped_linears_compute_what_was_packed(made):
    lance = empty_lance()
    fill(lance, made[0], "cpu", torch.float32)
    name = "language_model.model.layers.0.mlp_moe_gen.gate_proj"
    x = torch.randn(4, 64)
    exact = lance.get_submodule(name)(x)
    assert lance_quant.swap_linears(lance, str(made[1])) is lance
    close = lance.get_submodule(name)(x)
    assert 0 < (close - exact).norm() / exact.norm() < 0.15


def test_elsewhere_leaves_a_prefix_alone(folder):
    def drop_adapters(tensors):
        del tensors["vae2llm.weight"], tensors["vae2llm.bias"]

    edit(folder, drop_adapters)
    with pytest.raises(LanceQuantError, match="lacks tensor 'vae2llm.weight'"):
        load_packed(empty_lance(), folder)
    lance = empty_lance()
    load_packed(lance, folder, elsewhere=("vae2llm.",))
    assert lance.vae2llm.weight.is_meta and not lance.llm2vae.weight.is_meta


Q = "language_model.model.layers.0.self_attn.q_proj"
NORM = "language_model.model.layers.0.input_layernorm_moe_gen.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{Q}.scales"), f"lacks '{Q}.scales', which awq_meta.json announces"),
        (lambda t: t.update({f"{Q}.zeros": t[f"{Q}.zeros"][:, 1:].clone()}), rf"'{Q}.zeros' is U8 \[64, 3\], but"),
        (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}), f"'{Q}.scales' is F32"),
        (lambda t: t.pop(f"{Q}.bias"), f"'{Q}.bias' is missing"),
        (lambda t: t.update({"llm2vae.weight": torch.zeros(1, 1)}), r"'llm2vae.weight' is \[1, 1\]"),
        (lambda t: t.update({NORM: t[NORM].int()}), f"'{NORM}' is I32, but in the native layout it is BF16"),
        (lambda t: t.update({f"{Q}.bias": t[f"{Q}.bias"].float()}), f"'{Q}.bias' is F32"),
        (lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64).bfloat16()}), f"'{Q}.weight' beside its codes"),
        (lambda t: t.update({"connector.weight": torch.zeros(1)}), "unknown tensor 'connector.weight'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, said):
    edit(folder, change)
    with pytest.raises(LanceQuantError, match=said):
        load_packed(empty_lance(), folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("per_weight"), "per_weight is not as the native layout has it"),
        (lambda m: m["per_weight"][f"{Q}.weight"].update(group_size=48), f"{Q} has n_bit 4 and group_size 48"),
        (lambda m: m["per_weight"][f"{Q}.weight"].update(n_bit=5), f"{Q} has n_bit 5"),
        (lambda m: m["per_weight"][f"{Q}.weight"].update(n_bit="4"), f"{Q} has n_bit '4' and group_size 16"),
        (lambda m: m["per_weight"][f"{Q}.weight"].update(n_bit=True), f"{Q} has n_bit True"),
        (lambda m: m["per_weight"][f"{Q}.weight"].update(group_size=0), f"{Q} has n_bit 4 and group_size 0"),
        (lambda m: m["per_weight"][f"{Q}.weight"].update(group_size=16.0), f"{Q} has n_bit 4 and group_size 16.0"),
        (lambda m: m["per_weight"][f"{Q}.weight"].update(shape=[64, "64"]), rf"{Q} .* over shape \[64, '64'\]"),
        (lambda m: m["per_weight"][f"{Q}.weight"].update(shape=64), f"per_weight of '{Q}.weight' is not as the native"),
        (lambda m: m["per_weight"][f"{Q}.weight"].pop("group_size"), rf"'{Q}.weight' is not .*KeyError\('group_size"),
        (lambda m: m.update(per_weight=[]), "per_weight is not as the native layout has it"),
        (lambda m: m["per_weight"][f"{Q}.weight"].update(shape=[64, 32]), rf"'{Q}.qweight' is U8 \[64, 32\]"),
        (lambda m: m["per_weight"].update({"odd.weight": m["per_weight"][f"{Q}.weight"]}), "lacks 'odd.qweight'"),
    ],
)
def test_a_meta_file_that_does_not_fit_is_named(folder, change, said):
    meta = json.loads((folder / "awq_meta.json").read_text())
    change(meta)
    (folder / "awq_meta.json").write_text(json.dumps(meta))
    with pytest.raises(LanceQuantError, match=said):
        load_packed(empty_lance(), folder)


def test_a_folder_of_another_model_is_refused(made):
    other = empty_lance()
    other.language_model.model.layers[0].self_attn.k_proj = torch.nn.Linear(64, 8)
    with pytest.raises(LanceQuantError, match=r"k_proj' is \[32, 64\], but the model's linear is \[8, 64\]"):
        load_packed(other, made[1])
    del other.language_model.model.layers[0].self_attn.k_proj
    with pytest.raises(LanceQuantError, match="quantizes '.*k_proj', which the model lacks"):
        load_packed(other, made[1])
    twice = empty_lance()
    load_packed(twice, made[1])
    with pytest.raises(LanceQuantError, match="is a Int4Linear, not a linear: swap it only once"):
        load_packed(twice, made[1])


def test_an_accelerated_model_is_too_late(made):
    lance = empty_lance()
    fill(lance, made[0], "cpu", torch.bfloat16)
    accelerate(lance, "on")
    for swapped in (swap_linears, load_packed):
        with pytest.raises(LanceQuantError, match="accelerated already, .*: swap them before accelerate"):
            swapped(lance, made[1])


@pytest.mark.parametrize(
    ("device", "said"),
    [("gpu", "device=gpu is unknown: take auto, cpu"), ("cuda", "device=cuda, but this machine has 0 CUDA devices")],
)
def test_a_device_that_is_not_there(made, monkeypatch, device, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    lance = empty_lance()
    with pytest.raises(LanceQuantError, match=said):
        swap_linears(lance, made[1], device=device)
    assert isinstance(lance.get_submodule(Q), nn.Linear)  # nothing has changed
    swap_linears(lance, made[1], device=torch.device("cpu"))
    assert isinstance(lance.get_submodule(Q), Int4Linear)


def test_files_that_are_missing_or_broken(folder, tmp_path):
    with pytest.raises(LanceQuantError, match="awq_meta.json is missing"):
        PackedFolder(tmp_path)
    with pytest.raises(LanceQuantError, match="awq_meta.json is missing: give a folder"):
        swap_linears(empty_lance(), folder / "awq_state_dict.safetensors")
    data = (folder / "awq_state_dict.safetensors").read_bytes()
    (folder / "awq_state_dict.safetensors").write_bytes(data[:-100])
    with pytest.raises(LanceQuantError, match="awq_state_dict.safetensors is truncated"):
        PackedFolder(folder)
    (folder / "awq_meta.json").write_text("{")
    with pytest.raises(LanceQuantError, match="not JSON"):
        PackedFolder(folder)


def upstream(tensors: dict[str, torch.Tensor], weights: dict[str, dict]) -> nn.Module:
    """A module tree with a packed file's names and nothing else, random and filled."""
    root = nn.Module()

    def place(path: str, child: nn.Module) -> None:
        *parents, leaf = path.split(".")
        owner = root
        for name in parents:
            if not hasattr(owner, name):
                owner.add_module(name, nn.Module())
            owner = getattr(owner, name)
        owner.add_module(leaf, child)

    for key, row in weights.items():
        place(key.removesuffix(".weight"), nn.Linear(row["shape"][1], row["shape"][0], bias=False).bfloat16())
    for key, tensor in tensors.items():
        if key.endswith("norm.weight") or key.endswith("norm_moe_gen.weight"):
            norm = nn.Module()
            norm.weight = nn.Parameter(torch.rand_like(tensor))
            place(key.removesuffix(".weight"), norm)
    return root


@pytest.mark.parametrize("group", [32])
def test_published_folders_load(tmp_path, group):
    golden = Path(__file__).parents[1] / "golden"
    shutil.copy(golden / f"published_awq_g{group}.safetensors", tmp_path / "awq_state_dict.safetensors")
    shutil.copy(golden / f"published_awq_g{group}_meta.json", tmp_path / "awq_meta.json")
    tensors = load_file(tmp_path / "awq_state_dict.safetensors")
    model = upstream(tensors, json.loads((tmp_path / "awq_meta.json").read_text())["per_weight"])
    swap_linears(model, tmp_path)
    state = model.state_dict()
    assert set(state) == set(tensors) and all(torch.equal(state[key], tensors[key]) for key in tensors)


def test_norms_come_with_the_linears(made):
    """The folder's norms carry the folded scales; what it lacks stays, on its device and in its dtype."""
    lance = empty_lance()
    fill(lance, made[0], "cpu", torch.float32)
    lance.extra = nn.Linear(2, 2)
    kept, norm = lance.extra.weight, lance.language_model.model.norm.weight
    before = norm.clone()
    with torch.no_grad():
        norm.zero_()
    swap_linears(lance, made[1])
    assert lance.extra.weight is kept and lance.language_model.model.norm.weight is norm
    assert norm.dtype == torch.float32 and torch.equal(norm, before.bfloat16().float())


def test_a_module_that_lacks_what_the_folder_holds(made):
    lance = empty_lance()
    fill(lance, made[0], "cpu", torch.bfloat16)
    del lance.llm2vae
    with pytest.raises(LanceQuantError, match="holds 'llm2vae.bias', which the model lacks"):
        swap_linears(lance, made[1])
    assert isinstance(lance.get_submodule(Q), nn.Linear)  # nothing has changed


def without_linear(tensors, weights):
    del weights[f"{Q}.weight"]
    for part in ("qweight", "scales", "zeros", "bias"):
        del tensors[f"{Q}.{part}"]


def without_a_layer(tensors, weights):
    for held in (tensors, weights):
        for key in [key for key in held if ".layers.0." in key]:
            del held[key]


@pytest.mark.parametrize("on", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, w: t.pop(NORM), f"lacks '{NORM}', which the model's layers have"),
        (lambda t, w: t.pop(f"{Q[:-6]}q_norm.weight"), f"lacks '{Q[:-6]}q_norm.weight'"),
        (without_linear, f"lacks '{Q}.weight'"),
        (without_a_layer, "lacks 'language_model.model.layers.0.self_attn.q_proj.weight'"),
        (lambda t, w: t.update({NORM: t[NORM].int()}), f"'{NORM}' is I32"),
        (lambda t, w: t.update({NORM: t[NORM][1:].clone()}), rf"'{NORM}' is \[63\], but the model's is \[64\]"),
        (lambda t, w: w.pop(f"{Q}.weight"), f"holds '{Q}.qweight', which the model lacks"),
    ],
)
def test_layers_are_the_folders_alone(made, folder, on, change, said):
    """Their scales are folded between norms and linears, so that a part of another origin computes nonsense."""
    meta = json.loads((folder / "awq_meta.json").read_text())
    edit(folder, lambda tensors: change(tensors, meta["per_weight"]))
    (folder / "awq_meta.json").write_text(json.dumps(meta))
    lance = empty_lance()
    if on == "cpu":
        fill(lance, made[0], "cpu", torch.bfloat16)
    before = {name: (id(tensor), tensor._version) for name, tensor in lance.named_parameters()}
    with pytest.raises(LanceQuantError, match=said):
        swap_linears(lance, folder)
    assert before == {name: (id(tensor), tensor._version) for name, tensor in lance.named_parameters()}


def test_a_linear_that_the_folder_keeps_in_bf16(folder):
    """Whole layers, one linear of them not quantized: nothing is missing."""
    weight = torch.randn(64, 64).bfloat16()
    meta = json.loads((folder / "awq_meta.json").read_text())
    bias = load_file(folder / "awq_state_dict.safetensors")[f"{Q}.bias"]
    edit(folder, lambda tensors: without_linear(tensors, meta["per_weight"]))
    edit(folder, lambda tensors: tensors.update({f"{Q}.weight": weight, f"{Q}.bias": bias}))
    (folder / "awq_meta.json").write_text(json.dumps(meta))
    lance = swap_linears(empty_lance(), folder)
    assert torch.equal(lance.get_submodule(Q).weight, weight)


class WithTable(nn.Module):
    """What upstream keeps its position table in."""

    def __init__(self, rows: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(rows, 64), requires_grad=False)


@pytest.mark.parametrize("rows", [16, 48])
def test_the_position_table(made, rows):
    """A model on the meta device takes the folder's, which of an image model are the rows that it reads."""
    lance = empty_lance()
    with torch.device("meta"):
        lance.latent_pos_embed = WithTable(rows)
    swap_linears(lance, made[1])
    assert torch.equal(lance.latent_pos_embed.pos_embed, torch.zeros(16, 64).bfloat16())
    assert not any(tensor.is_meta for tensor in (*lance.parameters(), *lance.buffers()))
    lance = empty_lance()
    fill(lance, made[0], "cpu", torch.bfloat16)
    lance.latent_pos_embed = WithTable(rows)
    swap_linears(lance, made[1])
    assert torch.equal(lance.latent_pos_embed.pos_embed, torch.ones(rows, 64))  # a filled model has made its own


def test_a_position_table_of_another_width(made):
    lance = empty_lance()
    with torch.device("meta"):
        lance.latent_pos_embed = WithTable(16)
        lance.latent_pos_embed.pos_embed = nn.Parameter(torch.ones(16, 32))
    with pytest.raises(LanceQuantError, match=r"pos_embed' is \[16, 64\], but the model's is \[16, 32\]"):
        swap_linears(lance, made[1])


def test_a_buffer_is_filled_too(made):
    """Where a tree keeps one of the folder's tensors in a buffer."""
    for device in ("cpu", "meta"):
        lance = empty_lance()
        wanted = load_file(made[1] / "awq_state_dict.safetensors")["llm2vae.bias"]
        del lance.llm2vae.bias
        lance.llm2vae.register_buffer("bias", torch.zeros(48, device=device))
        swap_linears(lance, made[1])
        assert torch.equal(lance.llm2vae.bias, wanted.to(lance.llm2vae.bias.dtype))
        assert "bias" in dict(lance.llm2vae.named_buffers())


def test_all_of_a_module_goes_to_the_device(made, monkeypatch):
    """What the folder lacks too; but what is on the meta device has nothing to move."""
    lance = empty_lance()
    fill(lance, made[0], "cpu", torch.bfloat16)
    lance.extra, lance.later = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    lance.register_buffer("frequencies", torch.ones(3))
    moved = []
    monkeypatch.setattr(swap, "move", lambda module, device: moved.append((module, device)))
    swap_linears(lance, made[1])
    assert not moved
    fresh = empty_lance()
    swap_linears(fresh, made[1], device="cpu")
    assert moved == [(fresh, "cpu")]
    monkeypatch.undo()
    assert not lance.frequencies.is_meta
    swap.move(lance, "cpu")
    assert lance.later.weight.is_meta and not lance.extra.weight.is_meta
    swap.move(lance, "meta")
    assert all(tensor.is_meta for tensor in (*lance.parameters(), *lance.buffers()))


def test_float_weights_are_gone_before_anything_is_read(made, monkeypatch):
    lance = empty_lance()
    fill(lance, made[0], "cpu", torch.bfloat16)
    weights = [weakref.ref(lance.get_submodule(target.name).weight) for target in targets(CONFIG)]
    read_all, alive = TensorReader.read_all, []

    def read(self, outs):
        alive.extend(weight() is not None for weight in weights)
        read_all(self, outs)

    monkeypatch.setattr(TensorReader, "read_all", read)
    swap_linears(lance, made[1])
    assert len(alive) == 14 and not any(alive)


DOCUMENT = Path(__file__).parents[2] / "docs" / "int4.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_that_are_shown(made, example):
    """As they stand in docs/int4.md, but for the device and the folder's place."""

    def build_upstream_model() -> Lance:
        """As upstream builds it: filled where no other device is the default one, frequencies beside the weights."""
        here = torch.get_default_device()
        lance = empty_lance()
        lance.latent_pos_embed = WithTable(48)
        if here.type != "meta":
            fill(lance, made[0], here, torch.float32, elsewhere=(POSITION_TABLE,))
        lance.register_buffer("frequencies", torch.ones(3), persistent=False)
        return lance

    told: list[str] = []
    space = {"build_upstream_model": build_upstream_model, "print": lambda *words: told.append(" ".join(words))}
    exec(example.replace('"Lance_3B_INT4"', "FOLDER").replace('"cuda"', '"cpu"'), space | {"FOLDER": made[1]}, space)
    packed, state = load_file(made[1] / "awq_state_dict.safetensors"), space["model"].state_dict()
    assert sum(isinstance(module, Int4Linear) for module in space["model"].modules()) == 14
    for key in set(packed) - {POSITION_TABLE}:
        assert torch.equal(state[key], packed[key]), key
    left = [
        name for name, held in (*space["model"].named_parameters(), *space["model"].named_buffers()) if held.is_meta
    ]
    assert left == (["frequencies"] if '"meta"' in example else [])
    assert not left or told == left


def test_settings_reach_the_linears(made):
    lance = empty_lance()
    load_packed(lance, made[1])
    linears = {name: module for name, module in lance.named_modules() if isinstance(module, Int4Linear)}
    size = max(4 * linear.qweight.numel() for linear in linears.values())
    prepare(lance, Int4Config(backend="blocks", resident_gb=2.5 * size / 1e9))
    assert all(linear.backend == "blocks" for linear in linears.values())
    kept = [name for name, linear in linears.items() if linear.dense is not None]
    assert len(kept) >= 2 and all("_moe_gen" in name for name in kept)
    for wrong in ({"backend": "fastest"}, {"resident_gb": -1}, {"resident_gb": "4"}):
        with pytest.raises(LanceQuantError, match=next(iter(wrong))):
            Int4Config(**wrong)
