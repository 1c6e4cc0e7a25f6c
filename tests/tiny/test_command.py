"""`python -m lance_quant.tiny` refuses what it does not know, in one sentence."""

import pytest

from lance_quant.errors import LanceQuantError
from lance_quant.tiny.__main__ import main, parse
from lance_quant.tiny.recipes import LanceRecipe


def test_settings_are_split_and_typed():
    common, own = parse(["stage=lance", "out=x", "minutes=2", "batch=32", "compile=false"], LanceRecipe)
    assert common == {"stage": "lance", "out": "x", "minutes": 2.0}
    assert own == {"batch": 32, "compile": False}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["stage=lance", "out=x", "bach=3"], "bach"),
        (["stage=lance", "out=x", "batch=three"], "batch"),
        (["stage=lance", "out=x", "batch=0"], "batch"),
        (["stage=paint", "out=x"], "paint"),
        (["stage=vae"], "out"),
        (["stage=measure", "out=x", "tasks=t2v,t3v"], "t3v is unknown"),
    ],
)
def test_bad_words(words, complaint):
    with pytest.raises(LanceQuantError, match=complaint):
        main(words)
