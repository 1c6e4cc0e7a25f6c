"""`Request`: what a user asks of Lance, before pixels and tokens."""

from dataclasses import dataclass

from PIL import Image

# task -> what its prompt holds besides text
UNDERSTANDING = ("x2t_image", "x2t_video")
GENERATION = ("t2i", "t2v", "i2v", "image_edit", "video_edit")
TASKS = UNDERSTANDING + GENERATION


# the system text of a question where none is given (Lance spec sec. 18)
INSTRUCTIONS = {
    "x2t_image": "Look at the image carefully and answer the question.",
    "x2t_video": "Watch the video carefully and answer the question.",
}

# what the prompt of a task is about besides text: a field of `Request`
GIVEN = {
    "x2t_image": "image",
    "image_edit": "image",
    "i2v": "image",
    "x2t_video": "video",
    "video_edit": "video",
}
CLIP_TASKS = ("x2t_video", "t2v", "i2v", "video_edit")  # worked at the sizes of clips, the others at those of pictures


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to do.

    prompt: the question, the prompt or the edit instruction; instruction: the system text of a question, the task's
    own where empty. image: the picture that x2t_image asks about, image_edit changes and i2v starts from. video: the
    frames that x2t_video and video_edit look at, sampled already (`pixels.sample_frames`). height, width: pixels that
    t2i and t2v draw (the other tasks take them from what is given); frames: of the clip to draw (t2v, i2v).
    answer, target: the reference answer, and the picture (one frame) or clip that should come out, where known.
    """

    task: str
    name: str
    prompt: str
    instruction: str = ""
    answer: str = ""
    image: Image.Image | None = None
    video: tuple[Image.Image, ...] = ()
    target: tuple[Image.Image, ...] = ()
    height: int = 0
    width: int = 0
    frames: int = 1
