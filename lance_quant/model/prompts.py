"""Prompt text of the seven tasks and its assembly into a `Sample` (Lance spec sec. 4 and 5).

A prompt is a list of visual blocks around text. Each block is `<|vision_start|>`, as many pads as it has tokens, and
`<|vision_end|>`; pictures use the video pad as well (quirk Q1).
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from lance_quant.errors import LanceQuantError
from lance_quant.model.positions import CAPTION, CLEAN, NOISE, TEXT, VIT, Grid, grid_tokens
from lance_quant.model.request import TASKS, UNDERSTANDING
from lance_quant.model.sequence import Sample

IM_END = "<|im_end|>"
PAD = "<|video_pad|>"
BLOCK = f"<|vision_start|>{PAD}<|vision_end|>"

DESCRIBE_IMAGE = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the "
    "objects and background:"
)
DESCRIBE_VIDEO = (
    "Describe the video by detailing the color, quantity, visible text, shape, size, texture, spatial relationships "
    "and motion/camera movements of the objects and background:"
)
EDIT = (
    "Describe the key features of the input {media} (color, shape, size, texture, objects, background), then explain "
    "how the user’s text instruction should alter or modify the {media}. Generate a new {media} that meets the user’s "
    "requirements while maintaining consistency with the original input where appropriate."
)
SYSTEM = {
    "t2i": DESCRIBE_IMAGE,
    "t2v": DESCRIBE_VIDEO,
    "i2v": DESCRIBE_VIDEO,
    "image_edit": EDIT.format(media="image"),
    "video_edit": EDIT.format(media="video"),
}

# what stands before the user's text; the first frame of i2v is not in the prompt
USER_BLOCKS = {
    "t2i": (),
    "t2v": (),
    "i2v": (),
    "image_edit": ("vit", "clean"),
    "video_edit": ("vit", "clean"),
    "x2t_image": ("vit",),
    "x2t_video": ("vit",),
}
BLOCK_RULES = {"vit": ("full", VIT), "clean": ("full_noise", CLEAN), "noise": ("noise", NOISE)}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The checkpoint's own BPE tokenizer. Raises LanceQuantError where tokenizer.json is missing or unreadable."""
    path = Path(folder) / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise LanceQuantError(f"{path} is not a readable tokenizer ({error}): take the checkpoint's own file") from None


def render(task: str, prompt: str, instruction: str) -> str:
    """The prompt text with one pad a block. Understanding ends after `assistant\\n`, where the answer begins."""
    system = SYSTEM.get(task, instruction)
    user = BLOCK * len(USER_BLOCKS[task]) + prompt
    head = f"<|im_start|>system\n{system}{IM_END}\n<|im_start|>user\n{user}{IM_END}\n<|im_start|>assistant\n"
    return head if task in UNDERSTANDING else f"{head}{BLOCK}{IM_END}"


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode_answer(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Text of decoded ids, the stop token removed and stripped (Lance spec sec. 14)."""
    return tokenizer.decode(tokens, skip_special_tokens=False).replace(IM_END, "").strip()


def latent_rope_grid(latent: Grid) -> Grid:
    """A latent grid as positions see it: doubled, so that the 2x2 merge gives the latents back (Lance spec sec. 8)."""
    return latent[0], 2 * latent[1], 2 * latent[2]


def assemble(
    task: str,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    instruction: str = "",
    vit_grid: Grid | None = None,
    latent_grid: Grid | None = None,
) -> Sample:
    """Ids, splits, modality and index lists of one prompt, without pixels (Lance spec sec. 5).

    vit_grid: patches (t, h, w) of what the task looks at; latent_grid: latents (t, h, w) of what it draws, which is
    also the source's in the edit tasks.
    """
    if task not in TASKS:
        raise LanceQuantError(f"task '{task}' is unknown: take one of {', '.join(TASKS)}")
    prompt = _without_leading_newline(prompt)
    kinds = list(USER_BLOCKS[task]) + ([] if task in UNDERSTANDING else ["noise"])
    grids = [vit_grid if kind == "vit" else latent_rope_grid(latent_grid) for kind in kinds]
    pad = tokenizer.token_to_id(PAD)

    ids: list[int] = []
    blocks: list[tuple[int, int]] = []  # start of vision_start, end behind vision_end
    for token in encode(tokenizer, render(task, prompt, instruction)):
        if token == pad:
            count = grid_tokens(grids[len(blocks)])
            blocks.append((len(ids) - 1, len(ids) + count + 1))
            ids.extend([pad] * count)
        else:
            ids.append(token)

    caption = None
    if task not in UNDERSTANDING and prompt:
        user_blocks = blocks[: len(USER_BLOCKS[task])]
        search_from = user_blocks[-1][1] if user_blocks else _user_start(tokenizer, task)
        caption = _find(ids, encode(tokenizer, prompt), search_from, blocks[-1][0])

    lengths, modes = [], []
    modality = torch.full((len(ids),), TEXT)

    def text_until(end: int) -> None:
        start = sum(lengths)
        cuts = [start, end]
        if caption and start <= caption[0] and caption[1] <= end:
            cuts = [start, *caption, end]
        for a, b in zip(cuts, cuts[1:], strict=False):
            if b > a:
                lengths.append(b - a)
                modes.append("causal")

    for kind, (start, end) in zip(kinds, blocks, strict=True):
        text_until(start)
        mode, code = BLOCK_RULES[kind]
        lengths.append(end - start)
        modes.append(mode)
        modality[start:end] = code
    text_until(len(ids))
    if caption:
        modality[caption[0] : caption[1]] = CAPTION

    tensor = torch.tensor(ids)
    is_pad = tensor == pad
    latent = is_pad & ((modality == NOISE) | (modality == CLEAN))
    moving = is_pad & (modality == NOISE)
    if task == "i2v":  # latent frame 0 is the given picture and stays
        frozen = latent_grid[1] * latent_grid[2]
        moving[moving.nonzero().squeeze(1)[:frozen]] = False
    return Sample(
        task=task,
        ids=tensor,
        split_lens=tuple(lengths),
        split_modes=tuple(modes),
        modality=modality,
        grids=tuple(grids),
        vit_indexes=(is_pad & (modality == VIT)).nonzero().squeeze(1),
        vae_indexes=latent.nonzero().squeeze(1),
        mse_indexes=moving.nonzero().squeeze(1),
        latent_grids=tuple(latent_grid for kind in kinds if kind != "vit"),
        context_length=len(ids) if task in UNDERSTANDING else None,
    )


def _without_leading_newline(prompt: str) -> str:
    """A newline in front would merge with the template's own; upstream then does not find its caption (bug B3)."""
    lead = prompt[: len(prompt) - len(prompt.lstrip())]
    return prompt.lstrip() if "\n" in lead else prompt


def _user_start(tokenizer: Tokenizer, task: str) -> int:
    """Where the user's text begins: searching from here never hits the system text (bug B3)."""
    return len(encode(tokenizer, f"<|im_start|>system\n{SYSTEM[task]}{IM_END}\n<|im_start|>user\n"))


def _find(ids: list[int], part: list[int], start: int, end: int) -> tuple[int, int]:
    for index in range(start, end - len(part) + 1):
        if ids[index : index + len(part)] == part:
            return index, index + len(part)
    raise LanceQuantError("the tokenizer joins the prompt with the template: change the prompt's first characters")
