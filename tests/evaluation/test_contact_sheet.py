"""The contact sheet over a small run's artifacts: a row a task, small enough to commit."""

import json

import pytest
from PIL import Image

from benchmarks.contact_sheet import MOST, main
from lance_quant.errors import LanceQuantError
from tests.evaluation.test_report import ALL_TASKS


@pytest.fixture
def report(make_job, tmp_path):
    """make_job's artifacts where a store would keep them."""

    def of(**tasks):
        job = make_job(layers=1, **tasks)
        folder = tmp_path / "store" / "report" / "key"
        folder.mkdir(parents=True)
        for stage, source in (("baseline", job.baseline), ("evaluate", job.metrics)):
            place = folder.parents[1] / stage
            place.mkdir()
            source.rename(place / "key")
        upstream = {"baseline": "key", "evaluate": "key"}
        config = {"bits": 4, "group_size": 64, "recipe": {"name": "awq"}, "checkpoint": {"name": "tiny"}}
        (folder / "manifest.json").write_text(json.dumps({"upstream": upstream, "config": config}))
        return folder

    return of


def test_a_row_a_task(report, tmp_path, capsys):
    one = report(t2i=2)
    main([f"report={one}", f"out={tmp_path / 'one.png'}", "samples=2"])
    assert "one.png" in capsys.readouterr().out
    with Image.open(tmp_path / "one.png") as sheet:
        width, height = sheet.size
    assert width < 1200 and 100 < height < 300


def test_all_tasks_stay_small(report, tmp_path):
    every = report(**ALL_TASKS)
    main([f"report={every / 'report.html'}", f"out={tmp_path / 'all.png'}"])
    assert (tmp_path / "all.png").stat().st_size < MOST
    with Image.open(tmp_path / "all.png") as sheet:
        assert sheet.height > 7 * 150


@pytest.mark.parametrize("words", [["report=nowhere"], ["reports=x"]])
def test_bad_words_are_one_sentence(words):
    with pytest.raises(LanceQuantError, match="report="):
        main(words)
