"""The deployment, against a real `prefect server`: a run triggered there finds the artifacts of the command."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.flows.conftest import ROOT

SECONDS = 90


@pytest.fixture
def client(prefect_server):
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def served(shipped_run, prefect_url, client, tmp_path):
    """The deployment, while `python -m flows.schedule` serves it."""
    log = tmp_path / "schedule.log"
    options = ["--cron", "0 3 * * *", "--name", "nightly", *shipped_run.overrides]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.schedule", *options],
            cwd=ROOT,
            env=os.environ | {"PREFECT_API_URL": prefect_url},
            stdout=output,
            stderr=subprocess.STDOUT,
            # tests started in the background inherit an ignored SIGINT, and this process would too
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    yield wait(lambda: named(client, "scheduled-run/nightly"), log)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)


def named(client, name):
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def wait(look, log):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.3)
    pytest.fail(log.read_text())


def test_a_triggered_run_works_from_the_same_artifacts(served, client, shipped_run, tmp_path):
    from prefect.client.schemas.filters import FlowRunFilter

    run = client.create_flow_run_from_deployment(served.id)

    def ended():
        state = client.read_flow_run(run.id).state
        return state if state.is_final() else None

    state = wait(ended, tmp_path / "schedule.log")
    assert state.is_completed(), state
    (child,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [run.id]}))

    def states():  # they reach the server as events, after the run's own end
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [child.id]}))
        found = {task.state.name if task.state else "" for task in tasks}
        return found if found and not found & {"", "Pending", "Running"} else None

    assert wait(states, tmp_path / "schedule.log") == {"Cached"}


def test_the_run_form_is_typed(served):
    schema = served.parameter_openapi_schema
    assert schema["definitions"]["RunConfig"]["properties"]["group_size"]["type"] == "integer"
    assert schema["definitions"]["CheckpointConfig"]["properties"]["path"]["type"] == "string"
    assert served.schedules[0].schedule.cron == "0 3 * * *"
    assert served.parameters["cfg"]["group_size"] == 64
