"""Pieces of the user's own text: every file counts, long ones are cut as they are, short ones are joined."""

from dataclasses import replace

import pytest

from lance_quant.calibration.config import CalibrationConfig
from lance_quant.calibration.samples import most_samples, text_pieces
from lance_quant.errors import LanceQuantError
from lance_quant.model.prompts import encode
from lance_quant.tiny.tokenizer import train_tokenizer

LENGTH = 24
SENTENCE = "a red circle and a blue square, "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def pieces_of(tokenizer, folder, **changes):
    values = {"source": "text", "path": str(folder), "samples": 1000, "text_tokens": LENGTH} | changes
    return text_pieces(tokenizer, CalibrationConfig(**values))


def test_a_long_file_is_cut_and_its_rest_left_out(tokenizer, tmp_path):
    ids = encode(tokenizer, SENTENCE * 10)
    (tmp_path / "a.txt").write_text(SENTENCE * 10)
    assert len(ids) % LENGTH
    cut = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    assert pieces_of(tokenizer, tmp_path) == cut
    drawn = pieces_of(tokenizer, tmp_path, samples=2, seed=1)
    assert len(drawn) == 2 and all(piece in cut for piece in drawn)
    assert drawn == pieces_of(tokenizer, tmp_path, samples=2, seed=1)


def test_short_files_are_joined(tokenizer, tmp_path):
    for index in range(9):
        (tmp_path / f"{index}.txt").write_text(SENTENCE)
    (tmp_path / "empty.md").write_text("")
    between = encode(tokenizer, "\n\n")
    ids = encode(tokenizer, SENTENCE)
    for _ in range(8):
        ids = ids + between + encode(tokenizer, SENTENCE)
    count = len(ids) // LENGTH
    assert count > 2
    assert pieces_of(tokenizer, tmp_path) == [ids[LENGTH * n : LENGTH * (n + 1)] for n in range(count)]
    alone = pieces_of(tokenizer, tmp_path)
    (tmp_path / "0.txt").write_text(SENTENCE * 10)  # long files come first
    both = pieces_of(tokenizer, tmp_path)
    assert both[0] == encode(tokenizer, SENTENCE * 10)[:LENGTH] and both[-1] in alone


def test_too_little_text_is_refused(tokenizer, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a red circle")
    count = 2 * len(encode(tokenizer, "a red circle")) + len(encode(tokenizer, "\n\n"))
    with pytest.raises(LanceQuantError, match=f"holds {count} tokens of text, which do not make a piece of {LENGTH}"):
        pieces_of(tokenizer, tmp_path)
    for file in tmp_path.iterdir():
        file.write_text("")
    with pytest.raises(LanceQuantError, match="holds 0 tokens of text"):
        pieces_of(tokenizer, tmp_path)


def test_progress_expects_what_the_bundled_set_holds():
    cfg = CalibrationConfig(source="bundled", samples=16)
    assert most_samples(cfg, ["t2i", "t2v"]) == 16 + 8
    assert most_samples(replace(cfg, source="scenes"), ["t2i", "t2v"]) == 32
