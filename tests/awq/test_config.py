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
        ({"alphas": 1}, "at least 2"),
        ({"scoring": "none"}, "folds need a scoring"),
        ({"families": []}, "families is empty"),
    ],
)
def test_refusals(field, said):
    with pytest.raises(LanceQuantError, match=said):
        RecipeConfig(**field)
