"""Pictures and clips from files and back, and one sentence for each that is none."""

import struct
import sys

import numpy as np
import pytest
from PIL import Image

from lance_quant.errors import LanceQuantError
from lance_quant.media import read_clip, read_image, write_clip, write_image
from lance_quant.model.pixels import sample_frames


def ramp(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames whose grey says which one they are."""
    return np.repeat(np.arange(count, dtype=np.uint8) * 4, height * width * 3).reshape(count, height, width, 3)


def greys(clip: list[Image.Image]) -> list[int]:
    return [round(np.asarray(frame).mean() / 4) for frame in clip]


def test_a_picture_survives(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    write_image(tmp_path / "a.png", pixels)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), pixels)


def test_palettes_and_transparency_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "b.gif", transparency=0)
    for name in ("a.png", "b.gif"):
        image = read_image(tmp_path / name)
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_left_as_upstream_leaves_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (40, 20)


@pytest.mark.parametrize(("count", "fps"), [(48, 12), (30, 24), (20, 8)])
def test_the_sampled_frames_of_a_clip(tmp_path, count, fps):
    write_clip(tmp_path / "a.mp4", ramp(count), fps=fps)
    clip = read_clip(tmp_path / "a.mp4")
    assert greys(clip) == pytest.approx(sample_frames(count, fps), abs=1)
    assert greys(clip)[0] == 0 and clip[0].size == (48, 32) and clip[0].mode == "RGB"


def test_an_odd_size_grows_by_one_pixel(tmp_path):
    write_clip(tmp_path / "a.mp4", ramp(13, 31, 47))
    assert read_clip(tmp_path / "a.mp4")[0].size == (48, 32)


def test_a_clip_is_the_same_bytes_again(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, ramp(13))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_an_animated_gif_is_a_clip(tmp_path):
    frames = [Image.fromarray(frame) for frame in ramp(20)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert greys(read_clip(tmp_path / "a.gif")) == sample_frames(20, 10)


def test_a_header_that_does_not_count(tmp_path):
    """Matroska does not count its frames."""
    import av

    write_clip(tmp_path / "a.mp4", ramp(40))
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "b.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(tmp_path / "b.mkv")) as container:
        assert container.streams.video[0].frames == 0
    assert greys(read_clip(tmp_path / "b.mkv")) == greys(read_clip(tmp_path / "a.mp4"))


def test_a_clip_filmed_sideways_is_turned_upright(tmp_path):
    frames = np.zeros((13, 32, 48, 3), np.uint8)
    frames[:, :, :24] = 255  # left half
    write_clip(tmp_path / "a.mp4", frames)
    data = (tmp_path / "a.mp4").read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    track = data.index(b"tkhd")
    (tmp_path / "a.mp4").write_bytes(data[:track] + data[track:].replace(upright, clockwise, 1))
    first = np.asarray(read_clip(tmp_path / "a.mp4")[0])
    assert first.shape == (48, 32, 3)
    assert first[:20].mean() > 250 and first[28:].mean() < 5  # left became top


def refusal(read, path) -> str:
    with pytest.raises(LanceQuantError) as refused:
        read(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("read", [read_image, read_clip])
def test_what_is_no_file(tmp_path, read):
    assert "is missing" in refusal(read, tmp_path / "none.png")
    assert "is a folder" in refusal(read, tmp_path)


def test_what_is_no_picture(tmp_path):
    file = tmp_path / "a.png"
    file.write_text("words")
    assert "is not a picture" in refusal(read_image, file)
    write_image(file, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    file.write_bytes(file.read_bytes()[:2000])
    assert "is not a whole picture" in refusal(read_image, file)


def test_what_is_no_clip(tmp_path):
    file = tmp_path / "a.mp4"
    file.write_text("words")
    assert "is not a clip" in refusal(read_clip, file)
    file.write_bytes(b"")
    assert "is not a clip" in refusal(read_clip, file)


def test_too_short_a_clip(tmp_path):
    write_clip(tmp_path / "a.mp4", ramp(1), fps=24)
    assert "1 frames at 24 a second is too short" in refusal(read_clip, tmp_path / "a.mp4")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    assert "too short" in refusal(read_clip, tmp_path / "b.png")


def test_a_header_that_counts_wrongly(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", ramp(40))
    right = greys(read_clip(tmp_path / "a.mp4"))
    for wrong in (7, 90):
        monkeypatch.setattr("lance_quant.media._announced", lambda path, wrong=wrong: (wrong, 12.0))
        assert greys(read_clip(tmp_path / "a.mp4")) == right


def test_only_clips_need_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    write_image(tmp_path / "a.png", ramp(1)[0])
    assert read_image(tmp_path / "a.png").size == (48, 32)
    with pytest.raises(LanceQuantError, match="pip install av"):
        read_clip(tmp_path / "a.png")
