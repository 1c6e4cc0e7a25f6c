"""Lance's own example files as requests: `read_examples("Lance/config/examples/x2t_image_example.json")`.

Their form (Lance spec sec. 18): a key is a number, with or without the suffix of a picture or clip.

    t2i, t2v                         {"000000.png": "prompt"}
    i2v, image_edit, video_edit      {"0001": {"interleave_array": ["prompt", "PATH"],
                                               "element_dtype_array": ["text", "image"],
                                               "istarget_in_interleave": [0, 0]}}
    x2t_image, x2t_video             the same with ["PATH", ["instruction", "question", "answer"]]
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lance_quant.errors import LanceQuantError
from lance_quant.media import read_clip, read_image
from lance_quant.model.request import GIVEN, TASKS, UNDERSTANDING, Request

KEY = re.compile(r"(\d+)(\.(mp4|jpg|png|jpeg))?")
FIELDS = ("interleave_array", "element_dtype_array", "istarget_in_interleave")
CAPTION = {  # upstream draws one of four sentences of this kind where a picture or clip comes with its text alone
    "x2t_image": "Describe the image in detail.",
    "x2t_video": "Describe the video in detail.",
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One entry of an example file, its picture or clip found but not read.

    name: the key's number in six digits, which upstream names its results by. A question's results are too: upstream
    names them by picture, where two questions about one picture collide.
    """

    task: str
    name: str
    prompt: str
    instruction: str = ""
    answer: str = ""
    media: Path | None = None

    def request(self, *, height: int = 0, width: int = 0, frames: int = 1) -> Request:
        """Read the picture or clip. height, width, frames: of what t2i, t2v and i2v draw."""
        given = {}
        if self.media is not None:
            is_clip = GIVEN[self.task] == "video"
            given = {"video": tuple(read_clip(self.media))} if is_clip else {"image": read_image(self.media)}
        return Request(
            task=self.task,
            name=self.name,
            prompt=self.prompt,
            instruction=self.instruction,
            answer=self.answer,
            height=height,
            width=width,
            frames=frames,
            **given,
        )


def read_examples(
    path: Path | str, task: str | None = None, *, height: int = 0, width: int = 0, frames: int = 1
) -> list[Request]:
    """Every request of an example file with its pictures and clips in memory; `list_examples` puts that off.

    task: where the file's name does not begin with it. height, width, frames: of what t2i, t2v and i2v draw.
    """
    return [example.request(height=height, width=width, frames=frames) for example in list_examples(path, task)]


def list_examples(path: Path | str, task: str | None = None) -> list[Example]:
    """The entries of an example file, in order. Media paths are relative to the clone that the file lies in.

    Pretty-printed or on one line (bug B4). Raises LanceQuantError naming file and key where something is wrong or a
    picture or clip is not there.
    """
    path = Path(path).expanduser()
    task = task or _task_of(path)
    if task not in TASKS:
        raise LanceQuantError(f"task '{task}' is unknown: take one of {', '.join(TASKS)}")
    examples = [_example(_Entry(path, key, task), value) for key, value in _read(path).items()]
    names = [example.name for example in examples]
    for name in names:
        if names.count(name) > 1:
            raise LanceQuantError(f"{path} has two keys of the number {int(name)}: number its entries apart")
    return examples


@dataclass(frozen=True)
class _Entry:
    """Where an entry stands, for what is said of it."""

    path: Path
    key: str
    task: str

    def wrong(self, what: str) -> LanceQuantError:
        return LanceQuantError(f"{self.path}, entry '{self.key}': {what}")


def _task_of(path: Path) -> str:
    found = [task for task in TASKS if path.name.startswith(task)]
    if not found:
        raise LanceQuantError(
            f"the name of {path} does not say its task: give task=..., one of {', '.join(TASKS)}, or name the file "
            "like t2i_example.json"
        )
    return found[0]


def _read(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except OSError:
        raise LanceQuantError(f"the example file {path} is missing: give the path of a JSON file") from None
    except ValueError as error:
        raise LanceQuantError(f"{path} is not JSON ({error}): mend it, or take Lance's own example file") from None
    if not isinstance(values, dict) or not values:
        raise LanceQuantError(f'{path} holds no examples: it should be an object such as {{"000000.png": "a prompt"}}')
    return values


def _unique(path: Path, pairs: list[tuple[str, object]]) -> dict:
    """JSON lets a later key replace an equal one without a word."""
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise LanceQuantError(f"{path} has the key '{twice}' twice: number its entries apart")
    return out


def _example(entry: _Entry, value: object) -> Example:
    match = KEY.fullmatch(entry.key)
    if match is None:
        raise entry.wrong("the key must be a number, such as 0001 or 000001.png")
    name = f"{int(match[1]):06d}"
    if entry.task not in GIVEN:
        if not isinstance(value, str):
            raise entry.wrong(f"task {entry.task} takes a prompt in quotes here")
        return Example(task=entry.task, name=name, prompt=value)
    text, media = _text_and_media(entry, value)
    if entry.task not in UNDERSTANDING:
        if not isinstance(text, str):
            raise entry.wrong(f"the text of task {entry.task} must be a prompt in quotes")
        return Example(task=entry.task, name=name, prompt=text, media=media)
    if isinstance(text, str):
        return Example(task=entry.task, name=name, prompt="", instruction=CAPTION[entry.task], answer=text, media=media)
    if not isinstance(text, list) or len(text) != 3 or not all(isinstance(part, str) for part in text):
        raise entry.wrong("the text of a question must be [instruction, question, answer]")
    instruction, question, answer = text
    return Example(task=entry.task, name=name, prompt=question, instruction=instruction, answer=answer, media=media)


def _text_and_media(entry: _Entry, value: object) -> tuple[object, Path]:
    """The one text and the one picture or clip of an entry, in either order; what is marked as drawn is not read."""
    if not isinstance(value, dict) or any(not isinstance(value.get(field), list) for field in FIELDS):
        raise entry.wrong(f"task {entry.task} takes an object with the lists {', '.join(FIELDS)}")
    elements, kinds, targets = (value[field] for field in FIELDS)
    if not len(elements) == len(kinds) == len(targets):
        raise entry.wrong(f"{', '.join(FIELDS)} must have the same length")
    rows = list(zip(elements, kinds, targets, strict=True))
    texts = [element for element, kind, _ in rows if kind == "text"]
    media = [(element, kind) for element, kind, target in rows if kind != "text" and not target]
    wanted = GIVEN[entry.task]
    if len(texts) != 1 or [kind for _, kind in media] != [wanted]:
        article = "an" if wanted == "image" else "a"
        raise entry.wrong(f"task {entry.task} takes one text and {article} {wanted}")
    return texts[0], _find(entry, media[0][0])


def _find(entry: _Entry, name: object) -> Path:
    if not isinstance(name, str):
        raise entry.wrong(f"the path of its {GIVEN[entry.task]} must be a text")
    places = list(dict.fromkeys(_places(entry.path)))
    for place in places:
        if (place / name).is_file():  # an absolute name stands for itself
            return place / name
    looked = ", ".join(str(place) for place in places)
    raise entry.wrong(f"{name} is not there; looked in {looked}: keep the file in its clone of Lance, or mend the path")


def _places(path: Path) -> Iterator[Path]:
    """Folders that a media path may be relative to: the clone (above config/), the file's own, the working one."""
    path = path.resolve()
    yield from (folder.parent for folder in path.parents if folder.name == "config")
    yield path.parent
    yield Path.cwd()
