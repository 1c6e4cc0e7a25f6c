"""The flow over stand-ins, against a running server: what is done, what shows as Cached, what a fault leaves."""

import json
import os
from pathlib import Path

import httpx
import pytest

from lance_quant.errors import LanceQuantError
from tasks.store import MANIFEST
from tests.flows.stand_ins import LAYERS, SCORE

SEARCHES = [f"search-{layer}" for layer in range(LAYERS)]
EVERYTHING = {"capture", "pack", "baseline", "evaluate", "report", *SEARCHES}

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(cfg):
    from flows.pipeline import run

    return run(cfg)


def states() -> dict[str, str]:
    """Task run name (without Prefect's random ending) -> state name, of the newest flow run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        (newest,) = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [newest.id]}))
    return {
        run.name if run.name.startswith("search") else run.name.rsplit("-", 1)[0]: run.state and run.state.name
        for run in runs
    }


def settled(expected: dict[str, str]) -> bool:
    """Task states reach the server's database a moment after the run."""
    import time

    for _ in range(50):
        if states() == expected:
            return True
        time.sleep(0.2)
    return False


def test_first_run_does_all_and_the_second_nothing(stages, config):
    outcome = run(config())
    assert stages.took() == dict.fromkeys(EVERYTHING, 1)
    assert outcome.metrics["kl"] == SCORE
    assert {file.name for file in outcome.model.iterdir()} == {
        "awq_state_dict.safetensors",
        "awq_meta.json",
        "README.md",
    }

    assert run(config()) == outcome
    assert stages.took() == {}
    assert settled(dict.fromkeys(EVERYTHING | {"load"}, "Cached")), states()


def test_group_size_reuses_capture_and_baseline(stages, config):
    run(config())
    stages.took()
    run(config("group_size=32"))
    assert set(stages.took()) == {*SEARCHES, "pack", "evaluate", "report"}


def test_deleted_artifact_is_rebuilt_and_nothing_else(stages, config):
    import shutil

    run(config())
    stages.took()
    shutil.rmtree(stages.artifacts / "pack")
    run(config())
    assert stages.took() == {"pack": 1}


def test_changed_checkpoint_file_changes_everything(stages, config):
    run(config())
    stages.took()
    model = stages.checkpoint / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\x01")
    run(config())
    assert set(stages.took()) == EVERYTHING


def test_one_broken_layer_leaves_the_others(stages, config, monkeypatch):
    monkeypatch.setenv("BROKEN", "search-2")
    with pytest.raises(LanceQuantError, match=r"search failed in layer 2 of 4 \(RuntimeError: device lost\)"):
        run(config("recipe=fast"))
    took = stages.took()
    assert took["search-2"] == 2  # tried again once
    assert "pack" not in took

    monkeypatch.delenv("BROKEN")
    run(config("recipe=fast"))
    assert set(stages.took()) == {"search-2", "pack", "evaluate", "report"}


def test_a_sequential_recipe_keeps_the_layers_before_the_broken_one(stages, config, monkeypatch):
    monkeypatch.setenv("BROKEN", "search-2")
    with pytest.raises(LanceQuantError, match=r"in layer 2 of 4 \(RuntimeError: device lost\): those before are kept"):
        run(config("recipe=best"))
    took = set(stages.took())
    assert took >= {"search-0", "search-1", "search-2"} and "search-3" not in took

    monkeypatch.delenv("BROKEN")
    run(config("recipe=best"))
    assert set(stages.took()) == {"search-2", "search-3", "pack", "evaluate", "report"}


def test_uncovered_linears_stop_the_run_unless_allowed(stages, config, monkeypatch):
    monkeypatch.setenv("GEN_TOKENS", "255")
    with pytest.raises(LanceQuantError, match=rf"^{7 * LAYERS} linears saw fewer than .*allow_uncovered=true$"):
        run(config())
    assert "search-0" not in stages.took()
    outcome = run(config("allow_uncovered=true"))
    assert stages.took()["search-0"] == 1

    named = json.loads((outcome.html.parent / MANIFEST).read_text())["summary"]["uncovered"]
    assert len(named) == 7 * LAYERS
    assert named[0] == "language_model.model.layers.0.self_attn.q_proj_moe_gen"


def test_asking_for_fewer_tokens_captures_nothing_anew(stages, config, monkeypatch):
    monkeypatch.setenv("GEN_TOKENS", "255")
    with pytest.raises(LanceQuantError, match="fewer than calibration.min_tokens=256"):
        run(config())
    stages.took()
    run(config("calibration.min_tokens=255"))
    assert set(stages.took()) == EVERYTHING - {"capture"}


@pytest.mark.parametrize("stage", ["capture", "baseline", "pack", "evaluate", "report"])
def test_the_error_is_that_of_the_stage_that_failed(stages, config, monkeypatch, stage):
    monkeypatch.setenv("BROKEN", stage)
    with pytest.raises(RuntimeError, match="^device lost$"):
        run(config())


def test_a_stored_fault_is_no_pickle(stages, config, monkeypatch):
    storage = Path(os.environ["PREFECT_HOME"]) / "storage"
    before = set(storage.glob("*"))
    monkeypatch.setenv("BROKEN", "baseline")
    with pytest.raises(RuntimeError, match="^device lost$"):
        run(config())
    stored = [json.loads(file.read_text()) for file in storage.glob("*") if file not in before]
    assert stored == [{"__exc_type__": "builtins.RuntimeError", "message": "device lost"}]


@pytest.mark.parametrize("recipe, tries", [("fast", LAYERS), ("best", 1)])
def test_bad_input_is_neither_tried_again_nor_traced(recipe, tries, stages, config, monkeypatch, caplog):
    def refuse(job, out, device):
        stages.calls.open("a").write("search\n")
        raise LanceQuantError("capture artifact lacks layer 0: run capture again")

    monkeypatch.setattr("lance_quant.awq.search.search_layer", refuse)
    with pytest.raises(LanceQuantError, match="capture artifact lacks layer 0"):
        run(config(f"recipe={recipe}"))
    assert stages.took()["search"] == tries
    assert "run capture again" in caplog.text
    assert not any(record.exc_info for record in caplog.records)


def test_workers_share_the_layers(stages, config):
    run(config("recipe=fast", "runner.devices=[cpu]", "runner.workers=3"))
    assert stages.took() == dict.fromkeys(EVERYTHING, 1)


def lose_server(monkeypatch, when: str) -> None:
    """Prefect finds no server `before` or `after` the flow's work."""
    from flows import pipeline

    flow = pipeline.full_run

    def lost(*arguments):
        if when == "after":
            flow(*arguments)
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr(flow, "with_options", lambda **_: lost)


def test_a_server_lost_behind_the_report_loses_nothing(stages, config, monkeypatch):
    whole = run(config())
    stages.took()
    lose_server(monkeypatch, "after")
    assert run(config()) == whole
    assert stages.took() == {}


def test_a_server_lost_before_the_report_is_one_sentence(stages, config, monkeypatch):
    run(config())  # a finished run of the same process does not stand for this one
    lose_server(monkeypatch, "before")
    with pytest.raises(LanceQuantError, match="^the Prefect server at http.* was lost .* to go on$"):
        run(config())
