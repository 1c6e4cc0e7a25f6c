"""The sweep over recipes: what it asks full_run for, and how it reads what that prints."""

from dataclasses import replace

import pytest

from benchmarks.ablation import ABLATION, overrides_of, recipe_of
from benchmarks.recipes import HEADLINE
from tasks.config import compose_config


@pytest.mark.parametrize("label", ["best", "fast", *ABLATION])
def test_a_row_is_the_same_recipe_in_every_benchmark(label):
    recipe = compose_config(["checkpoint=tiny", *overrides_of(label)]).recipe
    assert replace(recipe, name=label) == recipe_of(label) and recipe.name in (label, f"{label} (changed)")


@pytest.mark.parametrize("recipe", ["best", "nearest (changed)"])
def test_headlines(recipe):
    found = HEADLINE.match(f"tiny_video, recipe {recipe}, 4 bits, group size 64")
    assert found.groupdict() == {"recipe": recipe.split()[0], "bits": "4", "group_size": "64"}
