"""`RecipeConfig`: a recipe is data. `conf/recipe/*.yaml` holds the recipes that ship."""

from dataclasses import dataclass, field

from lance_quant.errors import LanceQuantError

SCORINGS = ("none", "synthetic", "captured")
FAMILIES = ("activation_over_weight", "activation")
FOLD_NAMES = ("input_norm", "post_attention_norm", "up_down", "v_o")


@dataclass(kw_only=True)
class RecipeConfig:
    """How a layer is scaled and rounded.

    scoring: what a scale is judged by: "none" (no scales), "synthetic" (Gaussian rows at the captured mean |x|, as
    the published quantizer does), "captured" (the captured rows, each task counting equally).
    folds: rows of `topology.FOLDS`, in the order in which they are searched.
    families: formulas of a scale (see `search.scale_of`); alphas: points of alpha on 0..1, both ends included.
    source_bf16: round the source to bf16 before anything else.
    zero_in_range: stretch each group's range to include 0; bf16_scale_codes: compute codes against the stored scale.
    group_fallback: a linear that the group size does not divide takes the first of 128, 64, 32, 16, width that does.
    """

    name: str = "awq"
    scoring: str = "captured"
    folds: list[str] = field(default_factory=lambda: ["input_norm", "post_attention_norm"])
    families: list[str] = field(default_factory=lambda: ["activation_over_weight", "activation"])
    alphas: int = 21
    source_bf16: bool = False
    zero_in_range: bool = True
    bf16_scale_codes: bool = True
    group_fallback: bool = False

    def __post_init__(self) -> None:
        one_of(f"recipe {self.name}: scoring", [self.scoring], SCORINGS)
        one_of(f"recipe {self.name}: folds", self.folds, FOLD_NAMES)
        one_of(f"recipe {self.name}: families", self.families, FAMILIES)
        if self.alphas < 2:
            raise LanceQuantError(f"recipe {self.name}: alphas={self.alphas} must be at least 2, the ends of 0..1")
        if self.scoring == "none" and self.folds:
            raise LanceQuantError(f"recipe {self.name}: folds need a scoring, 'synthetic' or 'captured', not 'none'")
        if self.scoring != "none" and not self.families:
            raise LanceQuantError(f"recipe {self.name}: families is empty; name at least one of {', '.join(FAMILIES)}")

    @property
    def needs_capture(self) -> bool:
        return self.scoring != "none"


def one_of(what: str, values: list[str], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise LanceQuantError(f"{what} has no '{value}'; choose from {', '.join(known)}")
