"""Four numbers in 0..1 say how close one answer is to another: exact match, Levenshtein, difflib, word Jaccard.

    text_scores("three red circles", "three red squares").levenshtein

The only normalisation is `strip()`: case (Jaccard aside), punctuation and inner spaces count, as published.
"""

from dataclasses import dataclass
from difflib import SequenceMatcher

from rapidfuzz.distance import Levenshtein


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """Similarities of two texts, each in 0..1, 1 = equal."""

    exact: float
    levenshtein: float
    difflib: float
    jaccard: float


def text_scores(reference: str, answer: str) -> TextScores:
    """Scores of `answer` against `reference`, the four of the published INT4 evaluation of Lance.

    exact: 1.0 where the stripped texts are equal, else 0.0.
    levenshtein: 1 - character edit distance / length of the longer text.
    difflib: `SequenceMatcher(None, reference, answer).ratio()`, Python's defaults (its heuristic for frequent
        characters sets in at 200 characters, and the ratio depends on the order of the two texts).
    jaccard: shared / all distinct words in lower case, split at whitespace.
    Two empty texts score 1.0 everywhere.
    """
    a, b = reference.strip(), answer.strip()
    words_a, words_b = set(a.lower().split()), set(b.lower().split())
    return TextScores(
        exact=float(a == b),
        levenshtein=Levenshtein.normalized_similarity(a, b),
        difflib=SequenceMatcher(None, a, b).ratio(),
        jaccard=len(words_a & words_b) / len(words_a | words_b) if words_a | words_b else 1.0,
    )
