from pathlib import Path

import pytest
import yaml

from lance_quant.awq.config import FOLD_NAMES, RecipeConfig
from lance_quant.awq.topology import FOLDS
from lance_quant.errors import LanceQuantError

RECIPES = Path(__file__).parents[2] / "conf" / "recipe"


@pytest.mark.parametrize("name", ["minmax", "published", "awq", "fast", "best"])
def test_each_recipe_that_ships_says_every_field(name):
    fields = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert RecipeConfig(**fields).name == name
    assert set(fields) == set(RecipeConfig.__dataclass_fields__)


def test_fold_names_are_the_table():
    assert tuple(FOLDS) == FOLD_NAMES


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"scoring": "noise"}, "no 'noise'; choose from none, synthetic, captured"),
        ({"folds": ["q_k"]}, "folds has no 'q_k'"),
        ({"alphas": 1}, "alphas=1 must lie between 2"),
        ({"alphas": 10**6}, "alphas=1000000 must lie between 2"),
        ({"folds": ["v_o", "v_o"]}, "folds=.'v_o', 'v_o'. names one twice"),
        ({"evidence": ["rows", "rows"]}, "names one twice"),
        ({"scoring": "none", "folds": [], "sequential": True}, "sequential=true looks at kept sequences"),
        ({"descent": 3}, "descent=3 follows compensation"),
        ({"rounding": ["gptq", "nearest"]}, "nearest comes first or not at all"),
        ({"scoring": "none"}, "folds need a scoring"),
        ({"families": []}, "families is empty"),
    ],
)
def test_refusals(field, said):
    with pytest.raises(LanceQuantError, match=said):
        RecipeConfig(**field)
