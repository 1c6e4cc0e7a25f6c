"""`Request`: what a user asks of Lance, before pixels and tokens."""

from dataclasses import dataclass

from PIL import Image

# task -> what its prompt holds besides text
UNDERSTANDING = ("x2t_image", "x2t_video")
GENERATION = ("t2i", "t2v", "i2v", "image_edit", "video_edit")
TASKS = UNDERSTANDING + GENERATION


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to do.

    prompt: the question or the prompt; instruction: the system text of a question (Lance spec sec. 18);
    image: picture to look at; height, width: pixels of the picture to draw; answer: the reference, where one is known.
    """

    task: str
    name: str
    prompt: str
    instruction: str = "Look at the image carefully and answer the question."
    answer: str = ""
    image: Image.Image | None = None
    height: int = 0
    width: int = 0
