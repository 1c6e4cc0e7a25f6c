"""The four text scores against values worked out by hand."""

import pytest

from lance_quant.evaluation.text import TextScores, text_scores


def test_equal_texts_score_one_and_strip_is_the_only_normalisation():
    assert text_scores(" a red circle\n", "a red circle") == TextScores(exact=1, levenshtein=1, difflib=1, jaccard=1)
    assert text_scores("A red circle", "a red circle").exact == 0
    assert text_scores("a  b", "a b").exact == 0


def test_both_empty_is_one_and_one_empty_is_zero():
    assert text_scores("", "  ") == TextScores(exact=1, levenshtein=1, difflib=1, jaccard=1)
    assert text_scores("", "x") == TextScores(exact=0, levenshtein=0, difflib=0, jaccard=0)


def test_values_by_hand():
    scores = text_scores("kitten", "sitting")
    assert scores.levenshtein == pytest.approx(1 - 3 / 7)
    assert scores.difflib == pytest.approx(2 * 4 / 13)  # "itt" and "n"
    assert scores.jaccard == 0
    assert text_scores("two red squares", "two blue squares here").jaccard == pytest.approx(2 / 5)


def test_repeated_words_count_once():
    assert text_scores("Red red blue", "red BLUE").jaccard == 1
