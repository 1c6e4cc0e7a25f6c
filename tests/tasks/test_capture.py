"""What the run says of a capture before it goes on."""

import logging

import pytest

from lance_quant.errors import LanceQuantError
from tasks.capture import require_coverage
from tasks.config import compose_config
from tasks.store import Artifact


def captured(tmp_path, **sequences):
    summary = {"tokens": {"t2i": {"und": 1000, "gen": 1000}}, "sequences": sequences}
    return Artifact(stage="capture", key="k", path=tmp_path, summary=summary)


def test_tasks_without_a_whole_sequence_are_named_where_others_have_one(tmp_path, caplog):
    cfg = compose_config(["checkpoint=tiny", "calibration.sequence_tokens=700"])
    with caplog.at_level(logging.WARNING, "lance_quant"):
        require_coverage(cfg, captured(tmp_path, x2t_image=1, t2i=0, image_edit=0))
        require_coverage(cfg, captured(tmp_path, x2t_image=1, t2i=1))
        require_coverage(cfg, captured(tmp_path, x2t_image=0, t2i=0))
    wanted = "no whole sequence of t2i, image_edit fits calibration.sequence_tokens=700"
    assert [record.message for record in caplog.records] == [wanted]


@pytest.mark.parametrize(
    ("choices", "gen", "mend"),
    [
        ([], 255, "raise calibration.samples or go on with allow_uncovered=true"),
        (["calibration=text"], 0, "calibrate on what does (calibration=bundled) or go on with allow_uncovered=true"),
        (["calibration.tasks=[x2t_image]"], 0, "add one that does (t2i) or go on with allow_uncovered=true"),
    ],
)
def test_the_advice_of_uncovered_linears(tmp_path, choices, gen, mend):
    cfg = compose_config(["checkpoint=tiny", *choices])
    seen = Artifact(stage="capture", key="k", path=tmp_path, summary={"tokens": {"it": {"und": 1000, "gen": gen}}})
    with pytest.raises(LanceQuantError) as raised:
        require_coverage(cfg, seen)
    assert str(raised.value).endswith(mend)
