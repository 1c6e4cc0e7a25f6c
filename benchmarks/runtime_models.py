"""Random Lances of the real size made on the device in bf16, and their int4 twins, for runtime.py.

`Models` holds one set of weights in three forms: `bf16`, `int4` (rounded to nearest), `reference` (the same codes,
dequantized at every call). No file is read; tokenizer and configs are written to a folder.
"""

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from make_full_size import FOLDERS, LLM_CONFIG, SCALES, VISION, Draw, write_json, write_tokenizer
from torch import nn

from lance_quant.awq.grid import Grid, quantize
from lance_quant.awq.limits import check_group_size
from lance_quant.checkpoint.fill import set_parameter
from lance_quant.checkpoint.layout import Target, layer_targets
from lance_quant.checkpoint.native import META_FILE, PLAIN, STATE_FILE, pack_nibbles, packed_specs
from lance_quant.checkpoint.writer import TensorWriter
from lance_quant.model.config import LanceConfig
from lance_quant.model.embedders import TimeEmbedder
from lance_quant.model.lance import Lance
from lance_quant.model.vae import WanVAE, build_vae, upstream_key, vae_dtype
from lance_quant.model.vision import build_vision_tower
from lance_quant.runtime.int4_linear import Int4Linear

SIZES = {"real": ("real", None), "layer": ("real", 1), "tiny": ("tiny", None)}
GROUPS = {"tiny": 32}  # of a narrow model, whatever is asked for
NO_STOP = -1  # an id that is never chosen: answers are as long as asked for


@dataclass
class Models:
    """Raises LanceQuantError for a group size that does not divide the inputs of every linear."""

    size: str
    variant: str
    device: str
    group_size: int
    folder: Path
    seed: int = 0

    def __post_init__(self) -> None:
        self.scale = SCALES[SIZES[self.size][0]]
        self.group_size = min(self.group_size, GROUPS.get(self.size, self.group_size))
        layers = SIZES[self.size][1] or self.scale.decoder["num_hidden_layers"]
        self.sizes = self.scale.decoder | {"num_hidden_layers": layers}
        self.draw = Draw(self.device, self.seed, layers)
        self.config = self._config()
        check_group_size(self.targets, self.group_size)
        self.bf16 = self.int4 = self.reference = None

    def _config(self) -> LanceConfig:
        folder = self.folder / FOLDERS[self.variant]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "llm_config.json", LLM_CONFIG | self.sizes)
        if not (folder / "tokenizer.json").is_file():
            write_tokenizer(folder)
        self.tokenizer_folder = folder
        return replace(LanceConfig.from_folder(folder), eos_token_id=NO_STOP)

    def empty(self, eyes: bool) -> Lance:
        """On the meta device; eyes: with the vision tower, where transformers is installed."""
        hidden, channels = self.config.hidden_size, self.config.latent_channels
        with torch.device("meta"):
            lance = Lance(self.config, None, torch.bfloat16)
            lance.time_embedder = TimeEmbedder(hidden)
            lance.vae2llm, lance.llm2vae = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
            if eyes and importlib.util.find_spec("transformers"):
                lance.vit_model = build_vision_tower(VISION | self.scale.vision, torch.bfloat16)
        return lance.eval().requires_grad_(False)

    def make_bf16(self) -> None:
        lance = self.empty(eyes=True)
        for name, parameter in list(lance.named_parameters()):
            set_parameter(lance, name, self._drawn(name, tuple(parameter.shape)))
        to_device(lance, self.device)
        self.bf16 = lance

    def _drawn(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([piece.to(torch.bfloat16) for piece in self.draw.pieces(name, shape)])

    @property
    def targets(self) -> list[Target]:
        return [row for layer in range(self.config.num_hidden_layers) for row in layer_targets(self.config, layer)]

    def make_int4(self) -> None:
        """Two models over one set of codes; whatever is not quantized is the bf16 model's."""
        self.int4, self.reference = self.empty(eyes=False), self.empty(eyes=False)
        names = {target.name for target in self.targets}
        for name, parameter in self.bf16.named_parameters():
            if name.rpartition(".")[0] not in names and not name.startswith("vit_model."):
                for lance in (self.int4, self.reference):
                    set_parameter(lance, name, parameter.data)
        for lance in (self.int4, self.reference):
            if hasattr(self.bf16, "vit_model"):
                lance.vit_model = self.bf16.vit_model
        grid = Grid(bits=4, group_size=self.group_size)
        for target in self.targets:
            source = self.bf16.get_submodule(target.name)
            rounded = quantize(source.weight.float(), grid)
            for lance in (self.int4, self.reference):
                linear = Int4Linear(tuple(source.weight.shape), self.group_size, target.bias, device="meta")
                linear.bias = source.bias.data if target.bias else None
                if lance is self.int4:
                    codes = pack_nibbles(rounded.codes)
                linear.qweight, linear.scales, linear.zeros = codes, rounded.scales, rounded.zeros
                if lance is self.reference:
                    linear.backend = "reference"
                parent, _, leaf = target.name.rpartition(".")
                setattr(lance.get_submodule(parent), leaf, linear)

    def write_packed(self, out: Path) -> Path:
        """The int4 model as a packed folder; only before its linears are fused."""
        out.mkdir(parents=True, exist_ok=True)
        shapes = [(name, tuple(parameter.shape)) for name, parameter in self.empty(eyes=False).named_parameters()]
        linears = {target.name: target for target in self.targets}
        with TensorWriter(out / STATE_FILE, packed_specs(shapes, dict.fromkeys(linears, self.group_size))) as writer:
            for spec in writer.specs:
                owner, _, leaf = spec.name.rpartition(".")
                writer.write(spec.name, getattr(self.int4.get_submodule(owner), leaf).data.cpu())
        rows = {
            f"{name}.weight": {
                "shape": [target.out_features, target.in_features],
                "n_bit": 4,
                "group_size": self.group_size,
                "scheme": PLAIN,
            }
            for name, target in linears.items()
        }
        meta = {"n_bit": 4, "group_size": self.group_size, "scheme": PLAIN, "per_weight": rows}
        (out / META_FILE).write_text(json.dumps(meta))
        return out

    def make_vae(self) -> WanVAE:
        """Raises ImportError where diffusers is not installed."""
        with torch.device("meta"):
            vae = build_vae(*self.scale.vae)
        dtype = vae_dtype(self.device)
        state = {
            name: torch.cat(list(self.draw.pieces(upstream_key(name), tuple(value.shape)))).to(dtype)
            for name, value in vae.state_dict().items()
        }
        vae.load_state_dict(state, strict=True, assign=True)
        return WanVAE(vae)


def to_device(lance: Lance, device) -> None:
    """Computed buffers, of the vision tower's rotary, to the weights."""
    for module in lance.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer is not None and not buffer.is_meta:
                setattr(module, name, buffer.to(device))


def held_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    seen = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_meta:
                seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def decode_bytes(lance: Lance, cached: int) -> int:
    """What one decoding step must read: the understanding expert, the head, keys and values of the context."""
    config = lance.config
    experts = [getattr(layer, "und", layer) for layer in lance.language_model.model.layers]
    read = held_bytes(*experts, lance.language_model.lm_head)
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return read + cached * kept
