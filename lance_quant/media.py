"""Pictures by Pillow, clips by PyAV: `read_image`, `read_clip`, `write_image`, `write_clip`.

PyAV is imported when the first clip is touched.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from lance_quant.errors import LanceQuantError
from lance_quant.model.pixels import open_image, sample_frames

OUTPUT_FPS = 12  # Lance spec sec. 6
CODECS = (  # the first that this PyAV carries; one thread, so that the file does not depend on the machine's cores
    ("libx264", {"crf": "18", "threads": "1"}),
    ("mpeg4", {"qscale": "3", "threads": "1"}),
)
UPRIGHT = {  # rotation of a frame in degrees, counter-clockwise
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


def read_image(path: Path | str) -> Image.Image:
    """A picture file as RGB, the first frame of an animated one.

    As it is stored: an EXIF orientation is not applied, because upstream does not either (Lance spec sec. 6). Raises
    LanceQuantError where the file is missing or is no picture.
    """
    path = _existing(path, "picture")
    try:
        with Image.open(path) as image:
            return open_image(image)
    except UnidentifiedImageError:
        raise LanceQuantError(f"{path} is not a picture that Pillow reads: give a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        raise LanceQuantError(f"{path} is not a whole picture ({_words(error)}): fetch it again") from None


def read_clip(path: Path | str) -> list[Image.Image]:
    """The frames of a clip or an animated GIF that `sample_frames` names, RGB and upright (Lance spec sec. 6).

    Decodes once and keeps those frames alone; a second time where the file announces another number of frames than it
    holds. Raises LanceQuantError where the file is missing, is no clip or is too short.
    """
    path = _existing(path, "clip")
    total, fps = _announced(path)
    if total < 1:
        total = _decode(path, frozenset())[1]
    indices = _sampled(path, total, fps)
    kept, decoded = _decode(path, frozenset(indices))
    if decoded != total:
        indices = _sampled(path, decoded, fps)
        kept, _ = _decode(path, frozenset(indices))
    return [kept[index] for index in indices]


def write_image(path: Path | str, pixels: np.ndarray | torch.Tensor) -> None:
    """Write uint8 [H, W, 3] in the format that the suffix names."""
    Image.fromarray(np.asarray(pixels)).save(path)


def write_clip(path: Path | str, frames: np.ndarray | torch.Tensor, fps: int = OUTPUT_FPS) -> None:
    """Write uint8 [T, H, W, 3] as an MP4: H.264 where this PyAV has an encoder for it, else MPEG-4; 4:2:0.

    An odd side grows by one pixel, the last one again: 4:2:0 has no half pixels.
    """
    av = _av()
    frames = np.asarray(frames)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    codec, options = next((row for row in CODECS if row[0] in av.codecs_available), CODECS[-1])
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps, options=dict(options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _av():
    try:
        import av
    except ImportError:
        raise LanceQuantError("clips are read and written by PyAV, which is not installed: pip install av") from None
    return av


def _existing(path: Path | str, kind: str) -> Path:
    path = Path(path).expanduser()
    if path.is_dir():
        raise LanceQuantError(f"{path} is a folder: give a {kind} file")
    if not path.is_file():
        raise LanceQuantError(f"the {kind} {path} is missing: give the path of a file that is there")
    return path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    """(container, its first video stream)."""
    av = _av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise LanceQuantError(f"{path} holds no moving pictures: give a clip, such as an MP4 file")
            yield container, container.streams.video[0]
    except (av.FFmpegError, UnicodeDecodeError) as error:
        reason = _words(error)
        raise LanceQuantError(f"{path} is not a clip that FFmpeg reads ({reason}): give an MP4 or GIF file") from None


def _announced(path: Path) -> tuple[int, float]:
    """Frames and average frames a second as the file's header has them, 0 where it has none."""
    with _opened(path) as (_, stream):
        return stream.frames, float(stream.average_rate or 0)


def _decode(path: Path, wanted: frozenset[int]) -> tuple[dict[int, Image.Image], int]:
    """The wanted frames by their index, and how many frames there are."""
    kept, count = {}, 0
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if count in wanted:
                kept[count] = _upright(frame)
            count += 1
    return kept, count


def _upright(frame) -> Image.Image:
    """A decoded frame as RGB, turned as its display matrix says: phones film sideways."""
    image = frame.to_image()
    turn = UPRIGHT.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


def _sampled(path: Path, total: int, fps: float) -> list[int]:
    try:
        return sample_frames(total, fps)
    except ValueError as error:
        raise LanceQuantError(f"{path}: {error} to sample, so give a longer one") from None


def _words(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
