"""What counts as right: a row of `RULES` a task, on the things that the reader finds in the first and the last frame.

A thing is (kind, colour, size, cell) as numbers of the world's tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lance_quant.tiny.pools import Painted
from lance_quant.tiny.reader import Reading
from lance_quant.tiny.world import GRID

Thing = tuple[int, int, int, int]


class Shown(NamedTuple):
    """What the first and the last frame show, sorted, and the background (of the first)."""

    first: list[Thing]
    last: list[Thing]
    background: int


def wanted(scenes: Painted, indices: list[int]) -> list[Shown]:
    """What scenes show in truth."""
    columns = [getattr(scenes, name)[indices].tolist() for name in ("kind", "colour", "size", "cell", "goal")]
    grounds = scenes.background[indices].tolist()
    out = []
    for ground, *rows in zip(grounds, *columns, strict=True):
        things = [row for row in zip(*rows, strict=True) if row[0] >= 0]
        first, last = (sorted((k, c, s, place[which]) for k, c, s, *place in things) for which in (0, 1))
        out.append(Shown(first, last, ground))
    return out


def seen(first: Reading, last: Reading, index: int) -> Shown:
    """What was read; an unreadable thing has kind -2."""
    return Shown(first.things(index), last.things(index), int(first.background[index]))


def _each(rule: Callable[[list[Thing]], list]) -> Callable[[Shown, Shown], bool]:
    return lambda made, true: rule(made.first) == rule(true.first) and rule(made.last) == rule(true.last)


def _named(things: list[Thing]) -> list[tuple[int, int]]:
    return sorted(thing[:2] for thing in things)


def _placed(things: list[Thing]) -> list[tuple[int, int, int]]:
    return sorted((kind, colour, cell) for kind, colour, _, cell in things)


def motion(shown: Shown) -> list[tuple[int, int, int, int]]:
    """(kind, colour, columns, rows) of what has changed its place between the two frames; what cannot be followed,
    since it is gone or has an equal that moves too, is moved by more than the grid."""
    before, after = _placed(shown.first), _placed(shown.last)
    gone, came = ([thing for thing in one if thing not in other] for one, other in ((before, after), (after, before)))
    moves = []
    for kind, colour, cell in gone:
        goals = [goal for *name, goal in came if name == [kind, colour]]
        if len(goals) == 1:
            moves.append((kind, colour, goals[0] % GRID - cell % GRID, goals[0] // GRID - cell // GRID))
        else:
            moves.append((kind, colour, GRID, GRID))
    return sorted(moves)


def _drawn_clip(made: Shown, true: Shown) -> bool:
    """The things asked for in both frames, and the motion asked for; where things stand is free."""
    return _each(_named)(made, true) and motion(made) == motion(true)


def clip_fault(made: Shown, true: Shown) -> str:
    """What is wrong first with a clip drawn from text; empty where it is right.

    `first frame`: other things than asked for. `no room`: the thing that should move stands where its way ends at the
    rim or at another thing. `last frame`: other things than asked for. `motion`: all there, moved otherwise.
    """
    if _drawn_clip(made, true):
        return ""
    if _named(made.first) != _named(true.first):
        return "first frame"
    taken = [cell for *_, cell in made.first]
    for kind, colour, columns, rows in motion(true):
        cell = next(place for *name, _, place in made.first if name == [kind, colour])
        column, row = cell % GRID + columns, cell // GRID + rows
        if not (0 <= column < GRID and 0 <= row < GRID) or row * GRID + column in taken:
            return "no room"
    return "motion" if _named(made.last) == _named(true.last) else "last frame"


def _same(made: Shown, true: Shown) -> bool:
    return made == true


# task -> (what was read, what should be) -> right
RULES: dict[str, Callable[[Shown, Shown], bool]] = {
    "t2i": _each(_named),  # kinds and colours
    "t2v": _drawn_clip,
    "i2v": _each(_placed),  # kinds, colours and cells at the start and at the end
    "image_edit": _same,  # kinds, colours, sizes, cells and background
    "video_edit": _same,
}
