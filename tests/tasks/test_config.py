"""The settings tree: what ships composes, and its keys are a public surface."""

import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest

import lance_quant
from flows.generate import GenerateConfig
from flows.parity import ParityConfig
from flows.train_tiny import TrainConfig
from lance_quant.calibration.config import calibrated_tasks
from lance_quant.errors import LanceQuantError
from lance_quant.model.request import TASKS
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


@pytest.mark.parametrize("schema", [RunConfig, GenerateConfig, TrainConfig, ParityConfig])
def test_every_key_is_documented(schema):
    text = (CONF.parent / "docs" / "configuration.md").read_text()
    named = {key for words in re.findall(r"`([^`]+)`", text) for word in words.split() for key in word.split(".")}
    assert set(keys(schema)) <= named, f"docs/configuration.md lacks {sorted(set(keys(schema)) - named)}"


def keys(schema: type) -> Iterator[str]:
    """Names of all fields of a dataclass tree but those that say which choice of a group it is."""
    for field in fields(schema):
        if field.name != "name":
            yield field.name
        if is_dataclass(field.type):
            yield from keys(field.type)


def test_the_shipped_checkpoint_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = Path(compose_config([]).checkpoint.path)
    assert path == Path(lance_quant.__file__).parent / "tiny" / "weights" / "Lance_tiny"
    assert package_path("lance_quant/errors.py") == str(Path(lance_quant.__file__).parent / "errors.py")


@pytest.mark.parametrize(
    "checkpoint, suits", [("tiny", "scenes"), ("image", "bundled"), ("video", "bundled"), ("text", "text")]
)
def test_calibration_suits_the_checkpoint_unless_it_is_named(checkpoint, suits):
    assert compose_config([f"checkpoint={checkpoint}"]).calibration.name == suits
    for order in (
        ["calibration=published", f"checkpoint={checkpoint}"],
        [f"checkpoint={checkpoint}", "calibration=published"],
    ):
        assert compose_config(order).calibration.name == "published"


def test_every_checkpoint_has_a_calibration_that_suits_it():
    assert set(choices("checkpoint")) <= set(choices("calibration/of"))


def test_what_the_published_quantizer_saw():
    published = compose_config(["calibration=published"]).calibration
    assert (published.balance, published.tasks, published.sampler_steps) == ("tokens", ["x2t_image", "t2i"], 2)
    assert published.unconditional == 1.0


def test_tasks_follow_the_layout():
    cfg = compose_config(["calibration=bundled"]).calibration
    assert set(calibrated_tasks(cfg, "image")) == {"t2i", "image_edit", "x2t_image"}
    assert set(calibrated_tasks(cfg, "video")) == set(TASKS)
    cfg = compose_config(["calibration=bundled", "calibration.tasks=[t2i,t2v]"]).calibration
    assert calibrated_tasks(cfg, "video") == ["t2i", "t2v"]
    with pytest.raises(LanceQuantError, match="'t2v', which a checkpoint of the image layout does not serve"):
        calibrated_tasks(cfg, "image")
    with pytest.raises(LanceQuantError, match="take calibration=text"):
        calibrated_tasks(cfg, "text")
    assert calibrated_tasks(compose_config(["calibration=text"]).calibration, "text") == ["text"]


@pytest.mark.parametrize(
    "setting, words",
    {
        "source=web": "source='web' is unknown",
        "balance=pictures": "balance='pictures' is unknown",
        "tasks=paint": "must be auto or a list",
        "tasks=[t2i,t2i]": "name each task once",
        "weights.t2i=0": "weights.t2i=0.0 must be positive",
        "unconditional=2": "between 0 and 1",
        "memory_gb=-1": "memory_gb=-1.0 must be at least 0",
        "text_tokens=1": "text_tokens=1 must be at least 2",
    }.items(),
)
def test_calibration_settings_out_of_range(setting, words):
    with pytest.raises(LanceQuantError, match=words):
        compose_config([f"calibration.{setting}"])


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            "calibration.sequences=0",
            "recipe best runs kept sequences and calibration.sequences=0 keeps none: set it to 2",
        ),
        ("calibration.sequence_tokens=0 recipe=fast", "recipe fast runs .* calibration.sequence_tokens=0 keeps none"),
        ("calibration.gradient_tokens=0", "recipe best weighs .*calibration.gradient_tokens=0 keeps none"),
        (
            "checkpoint=text calibration.tasks=[t2i]",
            r"calibration.tasks=\['t2i'\] .*no task but text: leave it at auto",
        ),
        ("calibration=text calibration.tasks=[text,t2i]", r"calibration.tasks=\['text', 't2i'\] with .*source=text"),
    ],
)
def test_calibration_that_does_not_suit(settings, words):
    with pytest.raises(LanceQuantError, match=words):
        compose_config(settings.split())


@pytest.mark.parametrize(
    "settings",
    ["recipe=awq calibration.sequences=0 calibration.gradient_tokens=0", "calibration=text calibration.tasks=[text]"],
)
def test_calibration_that_suits(settings):
    compose_config(settings.split())


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
