"""Edits of a whole picture whose result is computed: the instruction, and what it does to a frame."""

import random
from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from lance_quant.calibration.bundled.documents import font

Change = Callable[[Image.Image], Image.Image]


def sepia(image: Image.Image) -> Image.Image:
    return ImageOps.colorize(image.convert("L"), (38, 22, 8), (255, 240, 206))


def night(image: Image.Image) -> Image.Image:
    dark = ImageEnhance.Brightness(image).enhance(0.45)
    return ImageChops.multiply(dark, Image.new("RGB", image.size, (150, 170, 255)))


def sketch(image: Image.Image) -> Image.Image:
    edges = ImageOps.autocontrast(image.convert("L").filter(ImageFilter.FIND_EDGES), cutoff=2)
    return ImageOps.invert(edges).convert("RGB")


def swapped(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", (blue, green, red))


def framed(image: Image.Image) -> Image.Image:
    out, edge = image.copy(), round(0.05 * min(image.size))
    ImageDraw.Draw(out).rectangle((0, 0, image.width - 1, image.height - 1), outline=(206, 30, 36), width=edge)
    return out


def dotted(image: Image.Image) -> Image.Image:
    out, r = image.copy(), 0.12 * min(image.size)
    x, y = image.width - 1.4 * r, 1.4 * r
    ImageDraw.Draw(out).ellipse((x - r, y - r, x + r, y + r), fill=(250, 216, 50))
    return out


def titled(image: Image.Image) -> Image.Image:
    out = image.copy()
    draw, size = ImageDraw.Draw(out), min(image.size) / 9
    draw.rectangle((0, image.height - 1.7 * size, image.width, image.height), fill=(16, 16, 18))
    draw.text((image.width / 2, image.height - 0.85 * size), "HELLO WORLD", "white", font(size), anchor="mm")
    return out


def closer(image: Image.Image) -> Image.Image:
    w, h = image.size
    return image.crop((w // 4, h // 4, w - w // 4, h - h // 4)).resize((w, h), Image.Resampling.BICUBIC)


EDITS: tuple[tuple[str, Change], ...] = (
    ("Convert it to black and white.", lambda image: ImageOps.grayscale(image).convert("RGB")),
    ("Give it the warm brown tones of an old sepia photograph.", sepia),
    ("Mirror it from left to right.", ImageOps.mirror),
    ("Make it look as if it had been taken at night.", night),
    ("Add a thick red frame around it.", framed),
    ("Put a yellow circle into the upper right corner.", dotted),
    ("Turn it into a pencil sketch with dark lines on white.", sketch),
    ("Write HELLO WORLD in white letters on a black bar along the bottom.", titled),
    (
        "Blur it heavily, as if it were out of focus.",
        lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 60)),
    ),
    ("Exchange red and blue tones.", swapped),
    ("Zoom in on the centre.", closer),
    ("Invert all colours like a film negative.", ImageOps.invert),
    ("Make the colours much more vivid.", lambda image: ImageEnhance.Color(image).enhance(2.2)),
    ("Turn it upside down.", ImageOps.flip),
    ("Reduce it to a poster with only a few flat colours.", lambda image: ImageOps.posterize(image, 2)),
    (
        "Brighten it and soften the contrast.",
        lambda image: ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.35)).enhance(0.8),
    ),
)


def edit(place: int, rng: random.Random) -> tuple[str, Change]:
    """The edit at a place, in one of several wordings."""
    words, change = EDITS[place % len(EDITS)]
    return rng.choice(("", "", "Please edit as follows: ")) + words, change
