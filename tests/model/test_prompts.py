"""Prompt templates and their assembly, id for id as upstream renders the seven tasks."""

import json

import pytest
import torch

from lance_quant.errors import LanceQuantError
from lance_quant.model.prompts import assemble, render
from lance_quant.model.request import TASKS, UNDERSTANDING
from tests.golden_cases import FOLDER

PROMPTS = json.loads((FOLDER / "prompt_templates.json").read_text())["prompts"]
VIDEO_PAD, IM_START, IM_END, NEWLINE, USER, ASSISTANT = 151656, 151644, 151645, 198, 872, 77091


def expand(runs):
    return [value for run in runs for value in ([run[0]] * run[1] if isinstance(run, list) else [run])]


class RecordedTokenizer:
    """Tokenizes what a fixture tokenized: the real vocabulary is not needed to check the assembly."""

    def __init__(self, task):
        case = PROMPTS[task]
        ids = expand(case["ids_rle"])
        collapsed = [v for i, v in enumerate(ids) if not (v == VIDEO_PAD and ids[i - 1] == VIDEO_PAD)]
        text = case["text_pads_collapsed"]
        self.known = {text: collapsed}
        self.prompt = question(task)
        modality = expand(case["modality_rle"])
        if 0 in modality:
            self.known[self.prompt] = [ids[i] for i, code in enumerate(modality) if code == 0]
        if task in UNDERSTANDING:  # ours ends where the answer begins
            end = case["ce_indexes"][0] + 1
            cut = text[: text.index("assistant\n") + len("assistant\n")]
            self.known[cut] = [v for i, v in enumerate(ids[:end]) if not (v == VIDEO_PAD and ids[i - 1] == VIDEO_PAD)]
        head = text[: text.index("user\n") + len("user\n")]
        self.known[head] = collapsed[: collapsed.index(USER) + 2]

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return type("Encoding", (), {"ids": self.known[text]})

    def token_to_id(self, token):
        return {"<|video_pad|>": VIDEO_PAD}[token]


def question(task):
    text = PROMPTS[task]["text_pads_collapsed"]
    user = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    return user.split("<|vision_end|>")[-1]


def instruction(task):
    return PROMPTS[task]["text_pads_collapsed"].split("<|im_start|>system\n")[1].split("<|im_end|>")[0]


@pytest.mark.parametrize("task", TASKS)
def test_assembly(task):
    case = PROMPTS[task]
    ids, modality = expand(case["ids_rle"]), expand(case["modality_rle"])
    grids = [tuple(grid) for grid in case["video_grid_thw"][0]]
    vit = tuple(case["vit_grid_thw"][0]) if case["vit_grid_thw"] else None
    latent = None
    if case["video_sizes"]:
        frames, height, width = case["video_sizes"][-1]
        latent = ((frames - 1) // 4 + 1, height // 16, width // 16)
    sample = assemble(
        task,
        RecordedTokenizer(task),
        question(task),
        instruction=instruction(task),
        vit_grid=vit,
        latent_grid=latent,
    )
    assert list(sample.grids) == grids
    if task in UNDERSTANDING:
        end = case["ce_indexes"][0] + 1
        assert sample.context_length == end
        assert sample.ids.tolist() == ids[:end]
        assert sample.modality.tolist() == modality[:end]
        assert list(sample.split_modes) == case["attn_modes"]
        assert list(sample.split_lens[:-1]) == case["split_lens"][:-1]
        return
    assert sample.ids.tolist() == ids
    assert sample.modality.tolist() == modality
    assert list(sample.split_lens) == case["split_lens"]
    assert list(sample.split_modes) == case["attn_modes"]
    moving = torch.zeros(len(ids), dtype=torch.bool)
    moving[sample.mse_indexes] = True
    frozen = latent[1] * latent[2] if task == "i2v" else 0
    assert int(moving.sum()) == latent[0] * latent[1] * latent[2] - frozen


def test_text_matches_the_template():
    assert render("t2i", question("t2i"), "") == PROMPTS["t2i"]["text_pads_collapsed"]
    for task in UNDERSTANDING:
        assert PROMPTS[task]["text_pads_collapsed"].startswith(render(task, question(task), instruction(task)))


def test_unknown_task():
    with pytest.raises(LanceQuantError, match="t2x"):
        assemble("t2x", None, "")
