"""Recipes ingredient by ingredient: rows that benchmarks take beside the recipes that ship.

quality_lm.py, layer_error.py and recipe_cost.py take them as --recipes, recipes.py as recipe=.
"""

import sys
from dataclasses import replace
from pathlib import Path

import yaml

from lance_quant.awq.config import RecipeConfig

RECIPES = Path(__file__).resolve().parents[1] / "conf" / "recipe"
FOUR_FOLDS = ["input_norm", "post_attention_norm", "up_down", "v_o"]

ALIKE = {"gradients": False}  # all outputs of a linear
LEARNED = {"rounding": ["nearest", "learned", "residual"]}
LONGER = {"learned_steps": 200, "learned_rate": 0.005, "range_rate": 0.0015}
GENTLY = {"rounding": ["gptq", "residual", "learned"], "learned_rate": 0.003, "range_rate": 0.0003}

# label -> (recipe it starts from, what is changed): each row of a part adds to the one before it
ABLATION = {
    "nearest": ("fast", {"folds": [], "clip": "none", "rounding": ["nearest"]}),
    "two_folds": ("fast", {"folds": FOUR_FOLDS[:2], "clip": "none", "rounding": ["nearest"]}),
    "four_folds": ("fast", {"clip": "none", "rounding": ["nearest"]}),
    "four_folds_linear_clip": ("fast", {"clip": "linear", "rounding": ["nearest"]}),
    "four_folds_group_clip": ("fast", {"rounding": ["nearest"]}),
    "gptq_alone": ("fast", {"folds": [], "clip": "none", "rounding": ["gptq"]}),
    "gptq_two_folds": ("fast", {"folds": FOUR_FOLDS[:2], "clip": "none", "rounding": ["gptq"]}),
    "gptq_four_folds": ("fast", {"clip": "none", "rounding": ["gptq"]}),
    "gptq_linear_clip": ("fast", {"clip": "linear", "rounding": ["gptq"]}),
    "gptq_group_clip": ("fast", {"rounding": ["gptq"]}),
    "gptq_rows": ("fast", {"rounding": ["gptq"], "evidence": ["rows"]}),
    "gptq_sequences": ("fast", {"rounding": ["gptq"], "evidence": ["sequences"]}),
    "gptq_sequential": ("fast", {"rounding": ["gptq"], "sequential": True}),
    "fast_damping_0.01": ("fast", {"damping": 0.01}),
    "fast_damping_0.1": ("fast", {"damping": 0.1}),
    "fast_21_alphas": ("fast", {"alphas": 21}),
    "fast_descent": ("fast", {"descent": 3}),
    "fast_residual_o_down": ("fast", {"residual_sites": ["o", "down"]}),
    "fast_gradients": ("fast", {"gradients": True}),
    "best_residual_down": ("best", ALIKE | {"residual_sites": ["down"]}),
    "best_residual_o_down": ("best", ALIKE | {"residual_sites": ["o", "down"]}),
    "best_no_gradients": ("best", ALIKE),
    "best_gradient_share_0": ("best", {"gradient_share": 0.0}),
    "best_gradient_damping_0.1": ("best", {"gradient_damping": 0.1}),
    "best_gradient_damping_1": ("best", {"gradient_damping": 1.0}),
    "best_no_descent": ("best", {"descent": 0}),
    "best_no_folds": ("best", {"folds": []}),
    "best_no_clip": ("best", {"clip": "none"}),
    "best_o_down": ("best", {"residual_sites": ["o", "down"]}),
    "best_o_down_not_sequential": ("best", {"residual_sites": ["o", "down"], "sequential": False}),
    "fast_all_rows": ("fast", {"heldout": 0.0}),
    "best_all_rows": ("best", {"heldout": 0.0}),
    "learned_100": ("fast", {"rounding": ["nearest", "learned"]}),
    "learned_residual": ("fast", LEARNED),
    "learned_residual_200": ("fast", LEARNED | LONGER),
    "learned_residual_200_large": ("fast", LEARNED | LONGER | {"learned_tokens": 8192}),
    "learned_residual_sequential": ("best", ALIKE | LEARNED),
    "learned_residual_200_sequential": ("best", ALIKE | LEARNED | LONGER),
    "best_learned_gently": ("best", ALIKE | GENTLY),
}
# one grid of scales for all rows, `best`'s
ABLATION |= {label: (base, {"alphas": 21} | changes) for label, (base, changes) in ABLATION.items() if base == "fast"}


def recipe_of(label: str) -> RecipeConfig:
    """A recipe that ships or a row of `ABLATION`."""
    base, changes = base_of(label)
    fields = yaml.safe_load((RECIPES / f"{base}.yaml").read_text())
    return replace(RecipeConfig(**fields), name=label, **changes)


def base_of(label: str) -> tuple[str, dict[str, object]]:
    """The recipe that a row starts from, and what it changes. Ends the script where there is none."""
    base, changes = ABLATION.get(label, (label, {}))
    if not (RECIPES / f"{base}.yaml").is_file():
        known = ", ".join([path.stem for path in sorted(RECIPES.glob("*.yaml"))] + list(ABLATION))
        sys.exit(f"error: --recipes has no '{label}'; choose from {known}")
    return base, changes


def overrides_of(label: str) -> list[str]:
    """The same as words for full_run."""
    base, changes = base_of(label)
    if not changes:
        return [f"recipe={base}"]
    written = {name: f"[{','.join(value)}]" if isinstance(value, list) else value for name, value in changes.items()}
    return [f"recipe={base}", f"recipe.name={label}", *(f"recipe.{name}={value}" for name, value in written.items())]
