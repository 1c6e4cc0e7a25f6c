"""`CheckpointConfig`: where a checkpoint lies and the picture size it is worked at."""

from dataclasses import dataclass

from lance_quant.errors import LanceQuantError


@dataclass(kw_only=True)
class CheckpointConfig:
    """What the user says of a checkpoint.

    path: folder that holds `model.safetensors` and `llm_config.json`; vit, vae: the vision tower's folder and the VAE
    file, found beside `path` where empty (Lance spec sec. 1). image_edge, vit_edge: pixel budgets of pictures as edges
    of a square, for the VAE and the vision tower (Lance spec sec. 6: 768 / 672 for image_768res); video_edge,
    video_vit_edge: those of clips (640 / 616 for video_480p). frames: of a clip to draw, where nothing else is said.
    """

    name: str = "tiny"
    path: str = ""
    vit: str = ""
    vae: str = ""
    image_edge: int = 128
    vit_edge: int = 112
    video_edge: int = 128
    video_vit_edge: int = 112
    frames: int = 5

    def __post_init__(self) -> None:
        for field, multiple in (("image_edge", 16), ("vit_edge", 28), ("video_edge", 16), ("video_vit_edge", 28)):
            value = getattr(self, field)
            if value < multiple or value % multiple:
                raise LanceQuantError(f"checkpoint.{field}={value} must be a positive multiple of {multiple} pixels")
        if self.frames < 1:
            raise LanceQuantError(f"checkpoint.frames={self.frames} must be at least 1")
