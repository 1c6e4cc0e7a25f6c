"""The runtime's table on a CPU: the forms asked for alone, or one sentence and exit code 1."""

import json

import pytest
import torch

pytest.importorskip("triton")  # the rows read the kernels' sizes

from benchmarks import runtime  # noqa: E402
from tests.benchmarks.sentences import sentence_of  # noqa: E402


def test_forms_alone(tmp_path):
    """bf16 is not measured where it is not asked for."""
    words = [f"out={tmp_path}", "size=tiny", "device=cpu", "rows=decode,batch", "forms=int4,reference"]
    with pytest.raises(SystemExit) as ended:
        runtime.main(words)
    assert ended.value.code == 0
    rows = [json.loads(line) for line in (tmp_path / "runtime.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == ["make bf16", "make int4", "fuse", "decode", "batch"]
    cells = [line.split(" | ")[1:-1] for line in (tmp_path / "runtime.md").read_text().splitlines()[2:]]
    assert [[bool(cell) for cell in row] for row in cells] == [[False, True, True], [False, True, False]]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("size=foo", "size=foo is unknown: take one of real,layer,tiny"),
        ("variant=foo", "variant=foo is unknown: take one of image,video"),
        ("rows=foo", "rows=foo is unknown: take all or some of check,"),
        ("forms=foo", "forms=foo is unknown: take some of bf16,"),
        ("device=foo", "device=foo is unknown: take auto, cpu"),
        ("device=cuda", "device=cuda, but this machine has 0 CUDA devices"),
        ("group_size=foo", "group_size=foo is not of type int"),
        ("group_size=0", "group_size=0 does not divide the 64 inputs of language_model.model.layers.0."),
        (f"out={__file__}", "is a file: give a folder"),
    ],
)
def test_bad_input_is_told_in_one_sentence(tmp_path, monkeypatch, word, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert said in sentence_of(runtime.main, [f"out={tmp_path}", "size=tiny", "device=cpu", word])
