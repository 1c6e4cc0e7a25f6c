"""`PRESETS`: the resolutions that upstream names (Lance spec sec. 6). Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Pixel budgets as edges of a square: of the VAE's and of the vision tower's input."""

    image_edge: int
    vit_edge: int


PRESETS = {
    "image_256res": Preset(256, 224),
    "video_192p": Preset(256, 224),
    "image_512res": Preset(512, 448),
    "image_768res": Preset(768, 672),
    "video_360p": Preset(480, 476),
    "video_480p": Preset(640, 616),
}
