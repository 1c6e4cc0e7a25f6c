"""Where a layer can take a scale for nothing: `FOLDS`, a table. A new fold is a row.

Dividing what a producer puts out by s, channel by channel, and multiplying the columns of everything that reads it by s
leaves the float layer as it was. The input sites and linears are those of `checkpoint.layout`.
"""

from dataclasses import dataclass

import torch

from lance_quant.checkpoint.layout import PATHS, Target, layer_targets, norm_name
from lance_quant.model.config import LanceConfig


@dataclass(frozen=True)
class Fold:
    """producer: an RMSNorm's name, or the leaf of a linear whose rows (and bias) are divided. site: what the
    consumers read.

    shared: one scale for both paths at once. exact: why the float layer does not change.
    """

    name: str
    kind: str
    producer: str
    site: str
    shared: bool
    exact: str


FOLDS = {
    fold.name: fold
    for fold in (
        Fold("input_norm", "norm", "input_layernorm", "qkv", False, "the norm's weight multiplies each channel last"),
        Fold("post_attention_norm", "norm", "post_attention_layernorm", "gate_up", False, "as input_norm"),
        Fold("up_down", "linear", "up_proj", "down", False, "silu(gate) * up is an elementwise product, linear in up"),
        Fold(
            "v_o",
            "linear",
            "v_proj",
            "o",
            True,
            "attention averages values per channel; it mixes both paths' values and serves several query heads from "
            "one kv head, so all of them share the scale",
        ),
    )
}


@dataclass(frozen=True)
class Heads:
    """How the v_proj rows of `kv` heads spread over the o_proj columns of `query` heads, `width` channels each."""

    kv: int
    query: int
    width: int


@dataclass(frozen=True)
class ResolvedFold:
    """A fold in one layer: names without `.weight`. path: "und", "gen", or "both" where the scale is shared."""

    fold: Fold
    path: str
    producers: tuple[str, ...]
    consumers: tuple[Target, ...]
    heads: Heads | None

    @property
    def name(self) -> str:
        return f"{self.path}.{self.fold.name}"

    def widen(self, scale: torch.Tensor) -> torch.Tensor:
        """Per producer channel -> per consumer column."""
        if self.heads is None:
            return scale
        repeats = self.heads.query // self.heads.kv
        return scale.view(self.heads.kv, 1, self.heads.width).expand(-1, repeats, -1).reshape(-1)

    def narrow(self, columns: torch.Tensor) -> torch.Tensor:
        """Per consumer column -> per producer channel, the mean over the query heads that share it."""
        if self.heads is None:
            return columns
        return columns.view(self.heads.kv, -1, self.heads.width).mean(1).reshape(-1)


def leaf(target: Target) -> str:
    """ "q_proj" and the like, the same for both paths."""
    return target.name.rsplit(".", 1)[-1].removesuffix("_moe_gen")


def resolve(config: LanceConfig, layer: int, names: list[str]) -> list[ResolvedFold]:
    """The folds of `names` in one layer, one for each path or one for both, in the order of `names`."""
    targets = layer_targets(config, layer)
    heads = Heads(config.num_key_value_heads, config.num_attention_heads, config.head_dim)
    resolved = []
    for fold in (FOLDS[name] for name in names):
        for path, paths in [("both", PATHS)] if fold.shared else [(path, (path,)) for path in PATHS]:
            producers = (
                [norm_name(layer, member, fold.producer) for member in paths]
                if fold.kind == "norm"
                else [t.name for t in targets if t.path in paths and leaf(t) == fold.producer]
            )
            consumers = tuple(t for t in targets if t.path in paths and t.site == fold.site)
            resolved.append(ResolvedFold(fold, path, tuple(producers), consumers, heads if fold.site == "o" else None))
    return resolved


def apply(fold: ResolvedFold, tensors: dict[str, torch.Tensor], scale: torch.Tensor) -> None:
    """Fold `scale` (float32, one value per producer channel) into `tensors`, keyed as the source file is."""
    for name in fold.producers:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = weight / (scale if weight.dim() == 1 else scale[:, None])
        if f"{name}.bias" in tensors:
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"] / scale
    columns = fold.widen(scale)
    for target in fold.consumers:
        tensors[f"{target.name}.weight"] = tensors[f"{target.name}.weight"] * columns
