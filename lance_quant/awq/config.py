"""`RecipeConfig`: a recipe is data. `conf/recipe/*.yaml` holds the recipes that ship."""

from dataclasses import dataclass, field

from lance_quant.checkpoint.layout import SITES
from lance_quant.errors import LanceQuantError

SCORINGS = ("none", "synthetic", "captured")
FAMILIES = ("activation_over_weight", "activation")
FOLD_NAMES = ("input_norm", "post_attention_norm", "up_down", "v_o")
CLIP_NAMES = ("none", "linear", "group")
ROUNDING_NAMES = ("nearest", "gptq", "residual", "learned")
EVIDENCE = ("rows", "sequences")
MOST_ALPHAS = 1001


@dataclass(kw_only=True)
class RecipeConfig:
    """How a layer is scaled and rounded.

    scoring: what a scale is judged by: "none" (no scales), "synthetic" (Gaussian rows at the captured mean |x|, as
    the published quantizer does), "captured" (the captured rows, tasks as in calibration.weights).
    folds: rows of `topology.FOLDS`, in the order in which they are searched.
    families: formulas of a scale (see `search.scale_of`); alphas: points of alpha on 0..1, both ends included.
    source_bf16: round the source to bf16 before anything else.
    zero_in_range: stretch each group's range to include 0; bf16_scale_codes: compute codes against the stored scale.
    group_fallback: a linear that the group size does not divide takes the first of 128, 64, 32, 16, width that does.

    evidence: what the inputs of a site are: "rows" that the capture drew, and those of its whole "sequences".
    heldout: share of them, whole calibration samples (`moments.split_rows`), that alpha, clip and compensation are
    judged by and not fitted to; 0: all. The residual holds out sequences of its own.
    clip: "none", one pair of shares for a "linear", or for each "group" of each row (`clip.CLIPS`); clip_steps: shares
    tried of each end, from 1 down to clip_least.
    rounding: in this order, each starting from the one before: "nearest", "gptq" (errors made up for by later columns;
    damping: share of the mean second moment; descent: passes over what came out, see `descend.py`), "residual" (the
    linears of residual_sites, in the order of a layer, make up for what the rounding before them left missing; qkv in
    sequential recipes alone; down_proj is compensated there), "learned" (on the kept sequences: learned_steps steps of
    about learned_tokens tokens; learned_rate, range_rate: first step of offsets, in codes, and of the ends of ranges,
    in shares).
    gradients: what an error of a linear's outputs counts follows from what it does to velocities and logits, and rows
    of a linear make up for each other (`outputs.py`), where it is rounded for good; gradient_damping: share of the mean
    squared gradient that all outputs count besides; gradient_share: of what latents count where the
    residual and the layer's loss look at tokens, how much is spread as their squared gradients are.
    sequential: the states that enter a layer's kept sequences are those that the layers before, rounded, make of them;
    what should come out stays the float model's. Layers then follow one another instead of fanning out.
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
    evidence: list[str] = field(default_factory=lambda: ["rows"])
    heldout: float = 0.0
    clip: str = "none"
    clip_steps: int = 8
    clip_least: float = 0.65
    rounding: list[str] = field(default_factory=lambda: ["nearest"])
    damping: float = 0.01
    descent: int = 0
    residual_sites: list[str] = field(default_factory=lambda: ["down"])
    learned_steps: int = 100
    learned_tokens: int = 2048
    learned_rate: float = 0.01
    range_rate: float = 0.01
    gradients: bool = False
    gradient_damping: float = 0.3
    gradient_share: float = 0.8
    sequential: bool = False

    def __post_init__(self) -> None:
        known = {"scoring": SCORINGS, "folds": FOLD_NAMES, "families": FAMILIES, "evidence": EVIDENCE}
        known |= {"clip": CLIP_NAMES, "rounding": ROUNDING_NAMES, "residual_sites": SITES}
        for name, choices in known.items():
            value = getattr(self, name)
            values = [value] if isinstance(value, str) else list(value)
            one_of(f"recipe {self.name}: {name}", values, choices)
            if len(set(values)) < len(values):
                raise LanceQuantError(f"recipe {self.name}: {name}={values} names one twice")
        if not 2 <= self.alphas <= MOST_ALPHAS:
            raise LanceQuantError(f"recipe {self.name}: alphas={self.alphas} must lie between 2 and {MOST_ALPHAS}")
        if self.scoring == "none" and self.folds:
            raise LanceQuantError(f"recipe {self.name}: folds need a scoring, 'synthetic' or 'captured', not 'none'")
        if self.scoring != "none" and not self.families:
            raise LanceQuantError(f"recipe {self.name}: families is empty; name at least one of {', '.join(FAMILIES)}")
        self._check_rounding()

    def _check_rounding(self) -> None:
        if (
            not self.rounding
            or self.rounding[0] not in ("nearest", "gptq")
            or "nearest" in self.rounding[1:]
            or len(set(self.rounding)) < len(self.rounding)
        ):
            raise LanceQuantError(
                f"recipe {self.name}: rounding={list(self.rounding)} must start from nearest or gptq, each named once, "
                "and nearest comes first or not at all"
            )
        if not self.evidence:
            raise LanceQuantError(f"recipe {self.name}: evidence is empty; name at least one of {', '.join(EVIDENCE)}")
        if self.sequential and not self.needs_capture:
            raise LanceQuantError(
                f"recipe {self.name}: sequential=true looks at kept sequences: set scoring=captured (folds=[] for none)"
            )
        if "residual" in self.rounding and not self.residual_sites:
            raise LanceQuantError(f"recipe {self.name}: residual_sites is empty; name some of {', '.join(SITES)}")
        if self.descent and "gptq" not in self.rounding and "residual" not in self.rounding:
            raise LanceQuantError(
                f"recipe {self.name}: descent={self.descent} follows compensation: add gptq to rounding"
            )
        if self.scoring != "captured" and (self.clip != "none" or list(self.rounding) != ["nearest"]):
            raise LanceQuantError(
                f"recipe {self.name}: clip={self.clip} and rounding={list(self.rounding)} look at captured rows: set "
                "scoring=captured (folds=[] for none)"
            )
        if self.gradients and not {"gptq", "residual"} & set(self.rounding):
            raise LanceQuantError(
                f"recipe {self.name}: gradients=true acts in compensation: add gptq or residual to rounding"
            )
        if not self.zero_in_range and self.clip != "none":
            raise LanceQuantError(f"recipe {self.name}: clip={self.clip} keeps 0 in range: set zero_in_range=true")
        between = {"heldout": (0, 0.5), "clip_least": (0.1, 1), "damping": (1e-6, 1e3)}
        between |= {"gradient_damping": (1e-3, 1e3), "gradient_share": (0, 1)}
        between |= {"learned_rate": (0, 0.5), "range_rate": (0, 0.5), "clip_steps": (2, 64)}
        between |= {"learned_steps": (1, 1e5), "learned_tokens": (1, 1e7), "descent": (0, 100)}
        for name, (low, high) in between.items():
            if not low <= getattr(self, name) <= high:
                raise LanceQuantError(
                    f"recipe {self.name}: {name}={getattr(self, name)} must lie between {low:g} and {high:g}"
                )

    @property
    def needs_capture(self) -> bool:
        return self.scoring != "none"

    @property
    def needs_sequences(self) -> bool:
        return (
            self.sequential
            or self.gradients
            or "sequences" in self.evidence
            or bool({"residual", "learned"} & set(self.rounding))
        )


def one_of(what: str, values: list[str], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise LanceQuantError(f"{what} has no '{value}'; choose from {', '.join(known)}")
