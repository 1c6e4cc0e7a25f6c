"""Words for scenes: captions, questions with their one right answer, motions, edit instructions; all are table rows.

    said = SAYINGS["image_edit"](scene, rng)

A question is a row of QUESTIONS or CLIP_QUESTIONS: a function from a scene to (question, answer), or None where the
scene has no such question. Training never speaks of a held-out combination, not even to deny it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lance_quant.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    EDITS,
    GLYPHS,
    GRID,
    KINDS,
    POSITIONS,
    SHAPES,
    Scene,
    Thing,
    held_out,
)

NUMBERS = ("zero", "one", "two", "three")


class Said(NamedTuple):
    """What is said of a scene: the row of its table, the prompt, the answer where one is asked for, and the scene that
    should come out."""

    row: str
    prompt: str
    answer: str
    target: Scene


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


def clip_caption(scene: Scene, rng: random.Random) -> str:
    """A prompt that the clip fulfils: the caption of its first frame, and what moves where."""
    still, mover = caption(scene, rng), scene.mover
    if mover is None:
        return still
    if len(scene.things) > 1:
        return f"{still}, {motion(mover)}"
    what, on, ground = still.partition(" on a ")
    return f"{what} moves {mover.direction}{on}{ground}"


def motion(mover: Thing) -> str:
    return f"the {short(mover)} moves {mover.direction}"


def clip_motion(scene: Scene) -> str:
    """What i2v is told: what moves where from the first frame on."""
    mover = scene.mover
    return f"The {motion(mover)[4:]}." if mover else "Nothing moves."


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


def _moves(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "What moves?", short(scene.mover) if scene.mover else "nothing"


def _way(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """Of the thing that moves, mostly."""
    lone = [scene.things[at] for at in scene.lone()]
    if not lone:
        return None
    thing = scene.mover if scene.mover and rng.random() < 0.75 else rng.choice(lone)
    return f"Where does the {short(thing)} move?", thing.direction or "nowhere"


def _moving_colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    return scene.mover and ("What color is the moving object?", scene.mover.colour)


def _describe_clip(scene: Scene, rng: random.Random) -> tuple[str, str]:
    moves = motion(scene.mover) if scene.mover else "nothing moves"
    return "Describe the video.", f"{describe(scene)}, {moves}"


Question = Callable[[Scene, random.Random], tuple[str, str] | None]

# name -> (how often, the question)
QUESTIONS: dict[str, tuple[float, Question]] = {
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
CLIP_QUESTIONS: dict[str, tuple[float, Question]] = {
    "moves": (4, _moves),
    "way": (4, _way),
    "moving_color": (2, _moving_colour),
    "color": (2, _colour),
    "kind": (2, _kind),
    "glyph": (1, _glyph),
    "count": (1, _count),
    "exists": (1, _exists),
    "background": (1, _background),
    "describe_clip": (3, _describe_clip),
}


def ask(scene: Scene, rng: random.Random, row: str | None = None, table: dict | None = None) -> Said:
    """A question about the scene, of that row, or of a row drawn by weight."""
    table = table or QUESTIONS
    while True:
        name = row or rng.choices(tuple(table), [weight for weight, _ in table.values()])[0]
        asked = table[name][1](scene, rng)
        if asked:
            return Said(name, *asked, scene)
        if row:
            return ask(scene, rng, None, table)


# ---------------------------------------------------------------- edits (names of world.EDITS)

EDIT_WORDS: dict[str, Callable[[Thing, Thing | None], str]] = {
    "recolour": lambda old, new: f"Make the {short(old)} {new.colour}.",
    "resize": lambda old, new: f"Make the {short(old)} {new.size}.",
    "remove": lambda old, new: f"Remove the {short(old)}.",
    "move": lambda old, new: f"Move the {short(old)} to the {POSITIONS[new.cell]}.",
}


CLIP_EDITS = ("recolour", "resize", "remove")


def edit(scene: Scene, rng: random.Random, names: Sequence[str] = tuple(EDIT_WORDS)) -> Said | None:
    """An instruction and the scene that follows it, never an empty one; None where all things are alike."""
    lone = scene.lone()
    if not lone:
        return None
    name = rng.choice([each for each in names if each != "remove" or len(scene.things) > 1])
    at = rng.choice(lone)
    edited = EDITS[name](scene, at, rng)
    old = scene.things[at]
    new = next((thing for thing in edited.things if thing not in scene.things), None)
    return Said(name, EDIT_WORDS[name](old, new), "", edited)


# ---------------------------------------------------------------- what each task says of a scene

SAYINGS: dict[str, Callable[[Scene, random.Random], Said | None]] = {
    "x2t_image": ask,
    "t2i": lambda scene, rng: Said("caption", caption(scene, rng), "", scene),
    "image_edit": edit,
    "x2t_video": lambda scene, rng: ask(scene, rng, table=CLIP_QUESTIONS),
    "t2v": lambda scene, rng: Said("moving" if scene.mover else "still", clip_caption(scene, rng), "", scene),
    "i2v": lambda scene, rng: Said("moving" if scene.mover else "still", clip_motion(scene), "", scene),
    "video_edit": lambda scene, rng: edit(scene, rng, CLIP_EDITS),
}


def corpus(rng: random.Random, scenes: list[Scene]) -> list[str]:
    """Sentences for the tokenizer, whose ids must outlive what is added to the tables above."""
    sentences = [f"on a {name} background" for name in BACKGROUNDS]
    for scene in scenes:
        sentences += [caption(scene, rng), *(word for row in QUESTIONS for word in ask(scene, rng, row)[1:3])]
        thing = scene.things[0]
        sentences += [words(thing, thing) for words in EDIT_WORDS.values()]
    return sentences
