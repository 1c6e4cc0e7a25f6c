"""Words for scenes: t2i captions, questions with their one right answer, edit instructions. Everything is a table
row.

A question is a row of QUESTIONS: a function from a scene to (question, answer), or None where the scene has no such
question. Training never speaks of a held-out combination, not even to deny it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from lance_quant.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    GLYPHS,
    GRID,
    KINDS,
    POSITIONS,
    SHAPES,
    Scene,
    Thing,
    held_out,
)

INSTRUCTION = "Look at the image carefully and answer the question."
NUMBERS = ("zero", "one", "two", "three")


class Asked(NamedTuple):
    row: str
    question: str
    answer: str


def noun(kind: str) -> str:
    return kind if kind in SHAPES else f"{family(kind)} {kind}"


def plural(kind: str) -> str:
    if kind in GLYPHS:
        return f"{family(kind)}s {kind}"
    return kind + ("es" if kind.endswith("s") else "s")


def family(kind: str) -> str:
    return "shape" if kind in SHAPES else "digit" if kind.isdigit() else "letter"


def a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def short(thing: Thing) -> str:
    """`red circle`."""
    return f"{thing.colour} {noun(thing.kind)}"


def full(thing: Thing) -> str:
    """`a small red circle at the top left`."""
    return f"{a(f'{thing.size} {short(thing)}')} at the {POSITIONS[thing.cell]}"


def describe(scene: Scene) -> str:
    """Everything there is, in reading order."""
    return ", ".join([*map(full, scene.things), f"{scene.background} background"])


# ---------------------------------------------------------------- captions (t2i prompts)

RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda one, two: one.cell % GRID < two.cell % GRID,
    "right of": lambda one, two: one.cell % GRID > two.cell % GRID,
    "above": lambda one, two: one.cell // GRID < two.cell // GRID,
    "below": lambda one, two: one.cell // GRID > two.cell // GRID,
}


def relations(one: Thing, two: Thing) -> list[str]:
    return [words for words, holds in RELATIONS.items() if holds(one, two)]


def caption(scene: Scene, rng: random.Random) -> str:
    """A prompt that the scene fulfils: every thing with kind and colour, the rest by chance."""
    things = list(scene.things)
    rng.shuffle(things)
    words = [a(f"{t.size} {short(t)}" if rng.random() < 0.4 else short(t)) for t in things]
    first = things[0]
    if len(things) > 1 and len({(t.kind, t.colour) for t in things}) == 1:
        text = f"{NUMBERS[len(things)]} {first.colour} {plural(first.kind)}"
    elif len(things) == 1:
        text = words[0] + (f" at the {POSITIONS[first.cell]}" if rng.random() < 0.5 else "")
    elif len(things) == 2 and rng.random() < 0.5:
        text = f"{words[0]} {rng.choice(relations(*things))} {words[1]}"
    else:
        text = " and ".join([", ".join(words[:-1]), words[-1]])
    return text + (f" on a {scene.background} background" if rng.random() < 0.3 else "")


# ---------------------------------------------------------------- questions


def _unique(scene: Scene, key: Callable[[Thing], str], rng: random.Random) -> Thing | None:
    keys = [key(thing) for thing in scene.things]
    lone = [thing for thing in scene.things if keys.count(key(thing)) == 1]
    return rng.choice(lone) if lone else None


def _pair(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A (colour, kind) that may be absent; never a held-out one unless the scene shows it."""
    shown = [(t.colour, t.kind) for t in scene.things]
    colour, kind = rng.choice(shown)
    if rng.random() < 0.5:
        return colour, kind
    while True:
        other = rng.choice(
            (
                (rng.choice(tuple(COLOURS)), kind),
                (colour, rng.choice(KINDS)),
                (rng.choice(tuple(COLOURS)), rng.choice(tuple(SHAPES))),
            )
        )
        if other not in shown and not held_out(*other):
            return other


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = _unique(scene, lambda t: t.kind, rng)
    return thing and (f"What color is the {noun(thing.kind)}?", thing.colour)


def _kind(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = _unique(scene, lambda t: t.colour, rng)
    return thing and (f"What is the {thing.colour} object?", noun(thing.kind))


def _at(scene: Scene, rng: random.Random) -> tuple[str, str]:
    cell = rng.choice(scene.things).cell if rng.random() < 0.7 else rng.randrange(GRID * GRID)
    there = [short(t) for t in scene.things if t.cell == cell]
    return f"What is at the {POSITIONS[cell]}?", there[0] if there else "nothing"


def _where(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = _unique(scene, short, rng)
    return thing and (f"Where is the {short(thing)}?", POSITIONS[thing.cell])


def _size(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = _unique(scene, short, rng)
    return thing and (f"What size is the {short(thing)}?", thing.size)


def _glyph(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    glyphs = [t for t in scene.things if t.is_glyph]
    lone = [t for t in glyphs if [family(g.kind) for g in glyphs].count(family(t.kind)) == 1]
    thing = rng.choice(lone) if lone else None
    return thing and (f"What {family(thing.kind)} is shown?", thing.kind)


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "How many objects are there?", str(len(scene.things))


def _count_kind(scene: Scene, rng: random.Random) -> tuple[str, str]:
    kind = _pair(scene, rng)[1]
    return f"How many {plural(kind)} are there?", str(sum(t.kind == kind for t in scene.things))


def _count_colour(scene: Scene, rng: random.Random) -> tuple[str, str]:
    colour = _pair(scene, rng)[0]
    return f"How many {colour} objects are there?", str(sum(t.colour == colour for t in scene.things))


def _exists(scene: Scene, rng: random.Random) -> tuple[str, str]:
    colour, kind = _pair(scene, rng)
    shown = any((t.colour, t.kind) == (colour, kind) for t in scene.things)
    return f"Is there {a(f'{colour} {noun(kind)}')}?", "yes" if shown else "no"


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if len(scene.things) < 2:
        return None
    one, two = rng.sample(scene.things, 2)
    words = [short(t) for t in scene.things]
    if words.count(short(one)) > 1 or words.count(short(two)) > 1:
        return None
    asked = rng.choice(tuple(RELATIONS))
    return f"Is the {short(one)} {asked} the {short(two)}?", "yes" if RELATIONS[asked](one, two) else "no"


def _background(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "What color is the background?", scene.background


def _describe(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "Describe the image.", describe(scene)


# name -> (how often, the question)
QUESTIONS: dict[str, tuple[float, Callable[[Scene, random.Random], tuple[str, str] | None]]] = {
    "color": (3, _colour),
    "kind": (3, _kind),
    "at": (3, _at),
    "where": (2, _where),
    "size": (2, _size),
    "glyph": (2, _glyph),
    "count": (1, _count),
    "count_kind": (1, _count_kind),
    "count_color": (1, _count_colour),
    "exists": (2, _exists),
    "relation": (2, _relation),
    "background": (1, _background),
    "describe": (3, _describe),
}
_ROWS = tuple(QUESTIONS)
_WEIGHTS = tuple(weight for weight, _ in QUESTIONS.values())


def ask(scene: Scene, rng: random.Random, row: str | None = None) -> Asked:
    """A question about the scene, of that row, or of a row drawn by weight."""
    while True:
        name = row or rng.choices(_ROWS, _WEIGHTS)[0]
        asked = QUESTIONS[name][1](scene, rng)
        if asked:
            return Asked(name, *asked)
        if row:
            return ask(scene, rng)


# ---------------------------------------------------------------- edits (names of world.EDITS)

EDIT_WORDS: dict[str, Callable[[Thing, Thing | None], str]] = {
    "recolour": lambda old, new: f"Make the {short(old)} {new.colour}.",
    "resize": lambda old, new: f"Make the {short(old)} {new.size}.",
    "remove": lambda old, new: f"Remove the {short(old)}.",
    "move": lambda old, new: f"Move the {short(old)} to the {POSITIONS[new.cell]}.",
}


def corpus(rng: random.Random, scenes: list[Scene]) -> list[str]:
    """Sentences of every table, for the tokenizer."""
    sentences = [f"on a {name} background" for name in BACKGROUNDS]
    for scene in scenes:
        sentences += [caption(scene, rng), *(word for row in _ROWS for word in ask(scene, rng, row)[1:])]
        thing = scene.things[0]
        sentences += [words(thing, thing) for words in EDIT_WORDS.values()]
    return sentences
