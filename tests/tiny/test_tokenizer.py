"""The tokenizer is Qwen2.5's in form, loads as such, and its ids are pinned: shipped weights depend on them."""

import random

import pytest
from transformers import AutoTokenizer

from lance_quant.model.prompts import SYSTEM, encode, render
from lance_quant.model.request import INSTRUCTIONS
from lance_quant.tiny import language, tokenizer, world


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train_tokenizer()


def test_special_strings_come_last(trained):
    ids = [trained.token_to_id(text) for text in tokenizer.SPECIAL]
    assert ids == list(range(tokenizer.LENGTH - len(ids), tokenizer.LENGTH))
    assert trained.get_vocab_size() == tokenizer.LENGTH < tokenizer.VOCABULARY


def test_ids_are_pinned(trained):
    assert trained.encode("a small red circle left of a large blue star").tokens == [
        "a", "Ġsmall", "Ġred", "Ġcircle", "Ġleft", "Ġof", "Ġa", "Ġlarge", "Ġblue", "Ġstar",
    ]  # fmt: skip
    assert tokenizer.train_tokenizer().to_str() == trained.to_str()


def test_transformers_loads_it_with_the_same_ids(trained, tmp_path):
    tokenizer.save_tokenizer(trained, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == tokenizer.LENGTH and type(loaded).__name__.startswith("Qwen2")
    rng = random.Random(0)
    scene = world.sample_scene(rng)
    texts = [render(task, language.caption(scene, rng), INSTRUCTIONS["x2t_image"]) for task in (*SYSTEM, "x2t_image")]
    for text in (*texts, "Grüße, 12 ’quotes’\n\n  and more"):
        assert loaded.encode(text) == encode(trained, text)
        assert trained.decode(encode(trained, text), skip_special_tokens=False) == text
