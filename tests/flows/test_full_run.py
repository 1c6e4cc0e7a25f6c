"""`python -m flows.full_run` on the checkpoint that ships, whole: no stand-ins, no server."""

import json
import math
import re
from pathlib import Path

from tests.flows.conftest import full_run

STAGES = {"load", "capture", "search", "pack", "baseline", "evaluate", "report"}


def place(out: str, what: str) -> Path:
    return Path(re.search(rf"^{what} +(.*)$", out, re.MULTILINE).group(1))


def manifests(artifacts: Path) -> dict[str, list[dict]]:
    found = {}
    for file in sorted(artifacts.glob("*/*/manifest.json")):
        found.setdefault(file.parts[-3], []).append(json.loads(file.read_text()))
    return found


def test_every_stage_leaves_an_artifact(shipped_run):
    found = manifests(shipped_run.artifacts)
    assert set(found) == STAGES
    load = found["load"][0]["summary"]
    assert len(found["search"]) == load["layers"] >= 4
    assert load["targets"] == {"und": 7 * load["layers"], "gen": 7 * load["layers"]}
    assert min(found["capture"][0]["summary"]["tokens"]["t2i"].values()) > 256
    assert found["report"][0]["summary"]["uncovered"] == []
    assert "Traceback" not in shipped_run.err


def test_four_bits_come_close(shipped_run):
    metrics = manifests(shipped_run.artifacts)["evaluate"][0]["summary"]["metrics"]
    assert 0 <= metrics["kl"] < 1
    assert 0 <= metrics["x2t_exact"] <= 1
    assert 0 < metrics["velocity_relative_l2"] < 0.5
    assert math.isfinite(metrics["psnr"]) and metrics["psnr"] > 10
    assert metrics["bytes_packed"] < metrics["bytes_source"] / 2


def test_the_last_lines_lead_to_the_report_and_the_model(shipped_run):
    html = place(shipped_run.out, "report").read_text()
    assert re.search(r"(src|href)=\"https?:[^\"]*\.(js|css|png)", html) is None  # self-contained
    model = place(shipped_run.out, "model")
    assert {"awq_state_dict.safetensors", "awq_meta.json", "README.md"} <= {file.name for file in model.iterdir()}
    assert json.loads((model / "awq_meta.json").read_text())["group_size"] == 64


def test_again_everything_is_cached(shipped_run, own_home):
    again = full_run(*shipped_run.overrides, PREFECT_HOME=own_home)
    assert again.returncode == 0, again.stderr
    assert again.stdout == shipped_run.out
    finished = [line for line in again.stderr.splitlines() if "Task run" in line and "Finished" in line]
    assert len(finished) >= len(STAGES)
    assert all("Cached(" in line for line in finished), again.stderr
