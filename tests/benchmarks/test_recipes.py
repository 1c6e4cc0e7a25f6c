"""The sweep over recipes: what it asks full_run for, and how it reads what that prints."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from benchmarks.ablation import ABLATION, overrides_of, recipe_of
from benchmarks.recipes import HEADLINE, error_of, errors_of
from tasks.config import compose_config


@pytest.mark.parametrize("label", ["best", "fast", *ABLATION])
def test_a_row_is_the_same_recipe_in_every_benchmark(label):
    recipe = compose_config(["checkpoint=tiny", *overrides_of(label)]).recipe
    assert replace(recipe, name=label) == recipe_of(label) and recipe.name in (label, f"{label} (changed)")


@pytest.mark.parametrize("recipe", ["best", "nearest (changed)"])
def test_headlines(recipe):
    found = HEADLINE.match(f"tiny_video, recipe {recipe}, 4 bits, group size 64")
    assert found.groupdict() == {"recipe": recipe.split()[0], "bits": "4", "group_size": "64"}


def test_the_error_of_a_mean():
    """Of equal weights the usual one; samples without weight do not count."""
    values = pd.Series([1.0, 2.0, 4.0, 7.0])
    assert error_of(values, pd.Series([1.0] * 4)) == pytest.approx(values.sem())
    weighted = error_of(pd.Series([1.0, 3.0, 9.0]), pd.Series([1.0, 1.0, 0.0]))
    assert weighted == pytest.approx(math.sqrt((0.25 + 0.25) * 3 / 2))


def test_errors_of_what_was_compared(tmp_path):
    assert errors_of(tmp_path) == {}
    pd.DataFrame({"name": ["a", "b"], "kl": [0.0, 0.2], "tokens": [3, 1]}).to_parquet(tmp_path / "forced.parquet")
    steps = pd.DataFrame({"name": ["a", "a", "b"], "relative_l2": [0.1, 0.3, 0.4]})
    steps.to_parquet(tmp_path / "velocity.parquet")
    found = errors_of(tmp_path)
    assert found["velocity_relative_l2_error"] == pytest.approx(pd.Series([0.2, 0.4]).sem())
    assert found["kl_error"] == pytest.approx(math.sqrt((0.75**2 * 0.05**2 + 0.25**2 * 0.15**2) * 2))
