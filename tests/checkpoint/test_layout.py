"""The three layouts: what their files hold, how they open, and what they run."""

import pytest
import torch

from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.inspect import inspect_checkpoint
from lance_quant.checkpoint.layout import LAYOUT_TASKS, layout_of, open_checkpoint, served_tasks
from lance_quant.errors import LanceQuantError
from lance_quant.model.lance import load_lance
from lance_quant.model.request import TASKS
from lance_quant.model.routing import Routing
from tests.random_checkpoint import random_checkpoint


def test_the_video_layout_serves_every_task():
    assert set(LAYOUT_TASKS["video"]) == set(TASKS)
    assert set(LAYOUT_TASKS["image"]) == {"t2i", "image_edit", "x2t_image"}


def test_layout_of():
    assert layout_of(["language_model.lm_head.weight"]) == "text"
    assert layout_of(["language_model.lm_head.weight", "vae2llm.weight"]) == "image"
    assert layout_of(["vae2llm.weight", "vit_model.merger.ln_q.weight"]) == "video"


def test_a_text_model_opens_and_runs(tmp_path):
    checkpoint = random_checkpoint(tmp_path, layout="text")
    assert (checkpoint.layout, checkpoint.vae_file, checkpoint.vit_config_file) == ("text", None, None)
    summary = inspect_checkpoint(checkpoint, tmp_path / "hashes.json")
    assert summary.targets == {"und": 14, "gen": 14}
    assert not {"vae", "vit", "vit_config"} & set(summary.files)
    lance = load_lance(checkpoint, dtype=torch.float32)
    hidden = lance.language_model.model.embed_tokens(torch.arange(6))[None]
    out = lance.language_model.model(hidden, torch.arange(6).expand(3, -1), Routing(), [(0, 6, "causal")])
    assert out.shape == hidden.shape and out.isfinite().all()


def test_a_checkpoint_without_a_path_says_so():
    with pytest.raises(LanceQuantError, match="give its folder as checkpoint.path"):
        open_checkpoint(CheckpointConfig(name="text"))


@pytest.mark.parametrize("name, published", [("text", False), ("image", True)])
def test_only_lance_is_to_be_had_from_its_hub(tmp_path, name, published):
    (tmp_path / "empty").mkdir()
    for folder, hint in (("none", "huggingface.co/bytedance-research/Lance"), ("empty", "such as Lance_3B")):
        with pytest.raises(LanceQuantError, match=f"{folder}.* as checkpoint.path=") as told:
            open_checkpoint(CheckpointConfig(name=name, path=str(tmp_path / folder)))
        assert (hint in str(told.value)) == published


def test_a_layout_without_tasks_says_so():
    with pytest.raises(LanceQuantError, match="'t2i', which .* text layout does not serve: leave it at auto"):
        served_tasks("evaluation.tasks", ["t2i"], "text")
