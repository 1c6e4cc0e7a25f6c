"""Which setting makes which stage new: the stages as plain functions over stand-ins, no server."""

import shutil

import pytest

from tests.flows.stand_ins import install, write_checkpoint

ALL = {"load", "capture", "search", "pack", "baseline", "evaluate", "report"}
AFTER_SEARCH = {"pack", "evaluate", "report"}

NEW = {
    "group_size=32": {"search"} | AFTER_SEARCH,
    "bits=3": {"search"} | AFTER_SEARCH,
    "recipe=minmax": {"search"} | AFTER_SEARCH,
    "recipe=published": {"search"} | AFTER_SEARCH,
    "recipe.alphas=11": {"search"} | AFTER_SEARCH,
    "calibration.samples=7": {"capture", "search"} | AFTER_SEARCH,
    "calibration.min_tokens=7": {"report"},
    "calibration.weights.t2i=3": {"capture", "search"} | AFTER_SEARCH,
    "calibration.memory_gb=7.5": set(),
    "calibration=bundled": {"capture", "search"} | AFTER_SEARCH,
    "evaluation.steps=7": {"baseline", "evaluate", "report"},
    "checkpoint.image_edge=64": {"capture", "search", "baseline"} | AFTER_SEARCH,
    "seed=1": ALL - {"load"},
    "runner.devices=[cuda:7]": set(),
    "runner.workers=3": set(),
    "allow_uncovered=true": {"report"},
}


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Overrides -> stage -> key."""
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    install(monkeypatch.setattr)
    checkpoint = write_checkpoint(tmp_path)

    def of(*overrides: str) -> dict[str, str]:
        from tasks.config import compose_config

        given = [f"checkpoint.path={checkpoint}", f"artifacts={tmp_path / 'artifacts'}", "runner.devices=[cpu]"]
        names = [override.split("=")[0] for override in overrides]
        given = [override for override in given if override.split("=")[0] not in names]
        return run_stages(compose_config([*given, *overrides]))

    of.checkpoint = checkpoint
    return of


def run_stages(cfg) -> dict[str, str]:
    from tasks.capture import capture
    from tasks.evaluate import baseline, evaluate
    from tasks.load import load
    from tasks.pack import pack
    from tasks.report import Measured, report
    from tasks.search import search
    from tasks.stage import Devices

    def artifact(returned):
        return returned.data if hasattr(returned, "data") else returned

    devices = Devices(["cpu"])
    loaded = artifact(load.fn(cfg))
    captured = artifact(capture.fn(cfg, loaded, devices))
    searched = [artifact(search.fn(cfg, layer, loaded, captured, devices)) for layer in range(2)]
    packed = artifact(pack.fn(cfg, loaded, searched))
    reference = artifact(baseline.fn(cfg, loaded, devices))
    scored = artifact(evaluate.fn(cfg, loaded, packed, reference, devices))
    measured = Measured(
        loaded=loaded, captured=captured, searched=searched, packed=packed, reference=reference, scored=scored
    )
    written = artifact(report.fn(cfg, measured))
    assert searched[0].key != searched[1].key
    return {made.stage: made.key for made in (loaded, captured, searched[0], packed, reference, scored, written)}


@pytest.mark.parametrize("override", NEW)
def test_a_setting_makes_new_what_reads_it(keys, override):
    before, after = keys(), keys(override)
    assert {stage for stage in ALL if before[stage] != after[stage]} == NEW[override]


def test_minmax_is_not_tied_to_a_capture(keys):
    before, after = keys("recipe=minmax"), keys("recipe=minmax", "calibration.samples=7")
    assert before["search"] == after["search"] and before["pack"] == after["pack"]


def test_a_moved_checkpoint_is_the_same_checkpoint(keys, tmp_path):
    before = keys()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for part in (
        keys.checkpoint,
        keys.checkpoint.parent / "Qwen2.5-VL-ViT",
        keys.checkpoint.parent / "Wan2.2_VAE.safetensors",
    ):
        shutil.move(part, moved / part.name)
    assert keys(f"checkpoint.path={moved / keys.checkpoint.name}") == before


def test_the_users_own_texts_are_known_by_their_content(keys, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a.txt").write_text("a red circle")
    before, after = (
        keys("calibration=text", f"calibration.path={one}"),
        keys("calibration=text", f"calibration.path={other}"),
    )
    assert before["capture"] == after["capture"]
    (other / "a.txt").write_text("a blue circle")
    assert keys("calibration=text", f"calibration.path={other}")["capture"] != before["capture"]


def test_what_another_task_weighs_changes_nothing(keys):
    """The stand-in is an image model: its tasks are not those of clips."""
    assert keys("calibration.weights.t2v=3")["capture"] == keys()["capture"]


def test_a_renamed_recipe_searches_nothing_anew(keys):
    before, after = keys(), keys("recipe.name=mine")
    assert before["search"] == after["search"]
    assert before["pack"] != after["pack"]  # the packed metadata names the recipe
