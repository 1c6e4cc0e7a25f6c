"""`LanceConfig`: every size and token id of a Lance, read from the checkpoint's own `llm_config.json`.

Nothing in the model is written for one size: the published 3B (Lance spec sec. 2), Lance-tiny and the parity
fixtures differ only in this dataclass.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from lance_quant.errors import LanceQuantError

# What upstream's launcher sets and its `llm_config.json` does not say (Lance spec sec. 2). A file that says so wins.
LAUNCHER_CONSTANTS = {
    "qk_norm": True,
    "attention_bias": True,
    "latent_channels": 48,
    "max_latent_size": 64,
    "max_num_frames": 121,
}

# field -> (names it goes by in llm_config.json)
TOKEN_IDS = {
    "eos_token_id": ("eos_token_id",),
    "vision_start_token_id": ("vision_start_token_id", "vision_start"),
    "vision_end_token_id": ("vision_end_token_id", "vision_end"),
    "video_token_id": ("video_token_id",),
}

ABSENT = -1  # id of a token that a text model does not have

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
)

TEMPORAL_DOWNSAMPLE = 4  # of the Wan 2.2 VAE: frames -> latent frames
SPATIAL_DOWNSAMPLE = 16  # of the Wan 2.2 VAE: pixels -> latents


@dataclass(frozen=True, kw_only=True)
class LanceConfig:
    """Sizes and token ids of one Lance checkpoint (Lance spec sec. 2 and 4).

    `mrope_section` counts rotary frequencies per axis (t, h, w) and sums to head_dim / 2. `max_latent_size` is the side
    of the latent position table; `tokenizer_length` bounds the ids that decoding may choose (vocab_size is padded).
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    qk_norm: bool
    attention_bias: bool
    latent_channels: int
    max_latent_size: int
    max_num_frames: int
    eos_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    video_token_id: int
    tokenizer_length: int

    @property
    def max_latent_frames(self) -> int:
        """Rows of the latent position table along time (Lance spec sec. 2)."""
        return (self.max_num_frames - 1) // TEMPORAL_DOWNSAMPLE + 1

    @classmethod
    def from_dict(
        cls, values: dict, tokenizer_length: int, source: str = "llm_config.json", text_only: bool = False
    ) -> "LanceConfig":
        """Resolve the fields of an `llm_config.json`; `source` names the file in errors.

        text_only: a decoder alone, whose file need not name vision tokens or rotary sections (text moves on all axes).
        Raises LanceQuantError where a field is missing or the rotary sections do not fit the head size.
        """
        values = LAUNCHER_CONSTANTS | values
        for name in SIZES:
            if name not in values:
                raise LanceQuantError(f"{source} lacks '{name}': take the file that belongs to the checkpoint")
        ids = {}
        for field, names in TOKEN_IDS.items():
            found = [values[name] for name in names if values.get(name) is not None]
            if text_only and field != "eos_token_id":
                found = found or [ABSENT]
            if not found:
                raise LanceQuantError(f"{source} lacks '{names[0]}': take the file that belongs to the checkpoint")
            ids[field] = int(found[0])
        head_dim = int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])
        section = tuple((values.get("rope_scaling") or {}).get("mrope_section") or ())
        if text_only and not section:
            section = (head_dim // 2, 0, 0)
        if len(section) != 3 or sum(section) * 2 != head_dim:
            raise LanceQuantError(
                f"{source}: rope_scaling.mrope_section {list(section)} must hold three numbers that sum to "
                f"{head_dim // 2}, half of the head size"
            )
        return cls(
            **{name: values[name] for name in (*SIZES, *LAUNCHER_CONSTANTS)},
            **ids,
            head_dim=head_dim,
            mrope_section=section,
            tokenizer_length=tokenizer_length,
        )

    @classmethod
    def from_folder(cls, folder: Path, text_only: bool = False) -> "LanceConfig":
        """Read `llm_config.json` and the tokenizer's length from a model folder (Lance spec sec. 1)."""
        return cls.from_dict(
            read_json(folder / "llm_config.json"),
            tokenizer_length(folder / "tokenizer.json"),
            source=str(folder / "llm_config.json"),
            text_only=text_only,
        )


def tokenizer_length(path: Path) -> int:
    """`len(tokenizer)` of a `tokenizer.json`: one more than the highest id, added tokens included."""
    values = read_json(path)
    try:
        ids = [*values["model"]["vocab"].values(), *(token["id"] for token in values["added_tokens"])]
    except (KeyError, TypeError, AttributeError):
        raise LanceQuantError(f"{path} is not a BPE tokenizer: take the checkpoint's own file") from None
    return max(ids) + 1


def read_json(path: Path) -> dict:
    """The object in a JSON file; LanceQuantError where the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LanceQuantError(f"{path} is missing: take the whole folder of the checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LanceQuantError(f"{path} is not readable JSON ({error}): fetch the file again") from None
