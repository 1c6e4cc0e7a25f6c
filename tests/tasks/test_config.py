"""The settings tree: what ships composes, and its keys are a public surface."""

from dataclasses import asdict
from pathlib import Path

import pytest

import lance_quant
from lance_quant.errors import LanceQuantError
from tasks.config import CONF, RunConfig, compose_config, package_path, read_fields


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["checkpoint", "calibration", "recipe", "evaluation", "runner"])
def test_every_choice_composes_and_is_called_by_its_name(group):
    assert choices(group)
    for choice in choices(group):
        cfg = compose_config([f"{group}={choice}"])
        assert isinstance(cfg, RunConfig)
        assert getattr(cfg, group).name == choice


def test_keys_of_the_tree():
    assert set(asdict(compose_config([]))) == set(
        "checkpoint calibration recipe evaluation runner group_size bits seed allow_uncovered artifacts".split()
    )


def test_a_yaml_file_spells_out_every_field():
    """So that a reader of conf/ sees all there is to set; places excepted."""
    import yaml

    for group in ("calibration", "recipe", "evaluation", "runner"):
        for choice in choices(group):
            cfg = compose_config([f"{group}={choice}"])
            given = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
            assert set(given) == set(asdict(getattr(cfg, group))), f"{group}/{choice}"


def test_the_shipped_checkpoint_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = Path(compose_config([]).checkpoint.path)
    assert path == Path(lance_quant.__file__).parent / "tiny" / "weights" / "Lance_tiny"
    assert package_path("lance_quant/errors.py") == str(Path(lance_quant.__file__).parent / "errors.py")


def test_seed_reaches_the_parts():
    cfg = compose_config(["seed=5"])
    assert (cfg.seed, cfg.calibration.seed, cfg.evaluation.seed) == (5, 5, 5)


def test_read_fields_leaves_the_name_out():
    cfg = compose_config([])
    assert "name" not in read_fields(cfg.calibration)
    assert read_fields(cfg.calibration, "seed")["samples"] == cfg.calibration.samples


def test_a_config_that_is_null_is_refused():
    with pytest.raises(LanceQuantError, match=r"recipe=null"):
        RunConfig(**{**vars(compose_config([])), "recipe": None})


def test_a_changed_recipe_is_not_called_by_its_old_name():
    assert compose_config(["recipe=published"]).recipe.name == "published"
    assert compose_config(["recipe=minmax", "recipe.name=published"]).recipe.name == "published (changed)"
    changed = compose_config(["recipe=awq", "recipe.alphas=11"])
    assert changed.recipe.name == "awq (changed)"
    assert RunConfig(**vars(changed)).recipe.name == "awq (changed)"
