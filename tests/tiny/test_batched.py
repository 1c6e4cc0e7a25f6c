"""The batched passes are the model's: vision tower, answers, velocities of both flows, and the drawn latents."""

import random

import pytest
import torch

from lance_quant.model import pixels, positions, prompts, sampler
from lance_quant.model.request import INSTRUCTIONS
from lance_quant.model.routing import Routing
from lance_quant.tiny import batched, export, language, layouts, tokenizer, training, world
from lance_quant.tiny.pools import shrink

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


class Case:
    """A random Lance-tiny in float32 and three scenes."""

    def __init__(self):
        self.tokenizer = tokenizer.train_tokenizer()
        torch.manual_seed(0)
        self.lance = training.build_lance(*export.architecture(self.tokenizer), "cpu").eval().requires_grad_(False)
        self.lance.llm2vae.weight.normal_(0, 0.1)
        for parameter in self.lance.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        rng = random.Random(0)
        self.scenes = [world.sample_scene(rng) for _ in range(3)]
        self.small = shrink(world.render(world.pack(self.scenes)))
        self.asked = [language.ask(scene, rng) for scene in self.scenes]
        self.captions = [language.caption(scene, rng) for scene in self.scenes]
        self.asker = batched.Asker(self.lance, layouts.AskLayout(self.tokenizer))
        self.drawer = batched.Drawer(self.lance, layouts.DrawLayout(self.tokenizer))
        parts = [self.drawer.layout.caption(caption) for caption in self.captions]
        self.ids = torch.tensor([ids for ids, _ in parts])
        self.lengths = torch.tensor([length for _, length in parts])
        self.noise = torch.randn(3, 64, 48)

    def sample(self, index: int):
        return prompts.assemble("t2i", self.tokenizer, self.captions[index], latent_grid=(1, 8, 8))


@pytest.fixture(scope="module")
def case():
    return Case()


def test_shrinking_is_pillows_bicubic(case):
    for scene, small in zip(case.scenes, case.small, strict=True):
        image = pixels.bucket_resize(world.picture(scene), layouts.VIT_EDGE)
        true = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(112, 112, 3).permute(2, 0, 1)
        difference = (true.int() - small.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02


def test_looks(case):
    patches = case.asker.patches(case.small)
    true = case.lance.look(patches.flatten(0, 1), [(1, 8, 8)] * 3)
    torch.testing.assert_close(case.asker.look(case.small).flatten(0, 1), true, **CLOSE)


def test_answer_logits(case):
    layout = layouts.AskLayout(case.tokenizer)
    for index, asked in enumerate(case.asked):
        ids, start, end = layout.text(asked.prompt, asked.answer)
        logits = case.asker.logits(case.small[index : index + 1], torch.tensor([ids]))[0, :end]
        sample = prompts.assemble(
            "x2t_image", case.tokenizer, asked.prompt, instruction=INSTRUCTIONS["x2t_image"], vit_grid=(1, 8, 8)
        )
        answer = prompts.encode(case.tokenizer, asked.answer + prompts.IM_END)
        full = torch.cat((sample.ids, torch.tensor(answer)))
        behind = len(layout.prefix) + 16
        assert full[behind:].tolist() == ids[:end] and ids[start:end] == answer
        hidden = case.lance.language_model.model.embed_tokens(full)
        hidden[sample.vit_indexes] = case.lance.look(case.asker.patches(case.small)[index], [(1, 8, 8)])
        lengths = (*sample.split_lens[:-1], sample.split_lens[-1] + len(answer))
        out = case.lance.language_model.model(
            hidden[None],
            positions.rope_positions(full, sample.grids, case.lance.config.video_token_id),
            Routing(),
            mask=positions.block_mask(lengths, sample.split_modes),
        )
        torch.testing.assert_close(logits, case.lance.language_model.lm_head(out)[0, behind:], **CLOSE)


@pytest.mark.parametrize("cached", [True, False])
def test_velocities_of_both_branches(case, cached):
    t = torch.tensor(0.7)
    zero = torch.zeros_like(case.lengths)
    branches = (
        case.drawer.branch(case.lengths, case.lengths),
        case.drawer.branch(zero, case.lengths if cached else zero),
    )
    mine = [case.drawer.velocity(case.ids, case.noise, t.expand(3, 1), branch) for branch in branches]
    for index in range(3):
        flow = sampler.start_flow(
            case.lance, case.sample(index), case.noise[index], sampler.FlowConfig(steps=4, cached=cached)
        )
        true = flow.velocities(case.noise[index], t, True)
        torch.testing.assert_close(mine[0][index], true.conditional, **CLOSE)
        torch.testing.assert_close(mine[1][index], true.unconditional, **CLOSE)


def test_drawn_latents(case):
    cfg = sampler.FlowConfig(steps=4)
    drawn = case.drawer.draw(case.ids, case.lengths, case.noise, cfg)
    for index in range(3):
        flow = sampler.start_flow(case.lance, case.sample(index), case.noise[index], cfg)
        torch.testing.assert_close(drawn[index], sampler.run_flow(flow, case.noise[index], cfg), atol=1e-3, rtol=1e-3)


def test_exact_tells_a_wrong_answer(case):
    text = torch.tensor([layouts.AskLayout(case.tokenizer).text("What is it?", "red circle")[0]])
    spans = torch.tensor([layouts.AskLayout(case.tokenizer).text("What is it?", "red circle")[1:]])
    logits = case.asker.logits(case.small[:1], text)
    told = text.clone()
    for place in range(int(spans[0, 0]), int(spans[0, 1])):  # write what the model itself would say
        logits = case.asker.logits(case.small[:1], told)
        logits[..., tokenizer.LENGTH :] = -torch.inf
        told[0, place] = logits[0, place - 1].argmax()
    assert case.asker.exact(case.small[:1], told, spans).all()
    told[0, int(spans[0, 0])] += 1
    assert not case.asker.exact(case.small[:1], told, spans).any()
