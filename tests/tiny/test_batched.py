"""The batched passes are the model's, task by task: vision tower, answers, velocities of both flows, drawn latents."""

import random
from dataclasses import replace

import pytest
import torch

from lance_quant.model import pixels, prompts, sampler, understanding
from lance_quant.model.request import GENERATION, INSTRUCTIONS, TASKS, UNDERSTANDING
from lance_quant.tiny import batched, export, layouts, requests, tokenizer, training, world
from lance_quant.tiny.pools import shrink

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
COUNT = 3


class Case:
    """A random Lance-tiny in float32, and three scenes of a task."""

    def __init__(self, lance, words, task: str):
        self.lance, self.task = lance, task
        self.layout = layouts.layout_of(task, words.to_str())
        self.runner = batched.Runner(lance, self.layout)
        self.work = batched.working_weights(lance, torch.float32)
        rng = random.Random(0)
        told = [requests.speak(task, rng, unseen=False) for _ in range(COUNT)]
        self.scenes, self.said = zip(*told, strict=True)
        ways = world.WAY[: layouts.frames_of(task)]
        frames = torch.stack([shrink(world.render(world.pack(list(self.scenes), way))) for way in ways], 1)
        slots = [layouts.write_slot(self.layout, words, said.prompt, said.answer) for said in self.said]
        ids, lengths, self.asked = (torch.tensor(column) for column in zip(*slots, strict=True))
        self.prompts = batched.Prompts(ids, lengths, self.runner.look(frames, self.work))
        generator = torch.Generator().manual_seed(1)
        self.state = torch.randn(COUNT, self.layout.latents, 48, generator=generator)
        self.patches = self.runner.patches(frames).unflatten(0, (COUNT, -1)) if self.layout.looks.stop else None
        self.samples = [self._sample(index, words) for index in range(COUNT)]

    def _sample(self, index: int, words):
        looks = self.patches is not None
        grid = layouts.vit_grid_of(self.task) if looks else None
        sample = prompts.assemble(
            self.task,
            words,
            self.said[index].prompt,
            instruction=INSTRUCTIONS.get(self.task, ""),
            vit_grid=grid,
            latent_grid=None if self.task in UNDERSTANDING else layouts.latent_grid_of(self.task),
        )
        return replace(sample, vit_patches=self.patches[index].flatten(0, 1), vit_grids=(grid,)) if looks else sample


@pytest.fixture(scope="module")
def lance_and_words():
    words = tokenizer.train_tokenizer()
    torch.manual_seed(0)
    lance = training.build_lance(*export.architecture(words), "cpu").eval().requires_grad_(False)
    lance.llm2vae.weight.normal_(0, 0.1)
    for buffer in lance.vit_model.buffers():  # rounded frequencies, as a bf16 model holds them (quirk Q6)
        buffer.copy_(buffer.to(torch.bfloat16))
    for parameter in lance.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lance, words


@pytest.fixture(scope="module")
def case_of(lance_and_words):
    cases = {}

    def find(task: str) -> Case:
        if task not in cases:
            cases[task] = Case(*lance_and_words, task)
        return cases[task]

    return find


def test_shrinking_is_pillows_bicubic(case_of):
    scenes = case_of("x2t_image").scenes
    for scene, small in zip(scenes, shrink(world.render(world.pack(list(scenes)))), strict=True):
        image = pixels.bucket_resize(world.picture(scene), layouts.VIT_EDGE)
        true = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(112, 112, 3).permute(2, 0, 1)
        difference = (true.int() - small.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("task", ["x2t_image", "x2t_video"])
def test_patches_and_looks(case_of, task):
    case = case_of(task)
    frames = world.clip(case.scenes[0]) if task == "x2t_video" else (world.picture(case.scenes[0]),)
    patches, grid = pixels.vit_patches(pixels.vit_pixels(list(frames), layouts.VIT_EDGE))
    assert grid == layouts.vit_grid_of(task)
    assert (patches - case.patches[0].flatten(0, 1)).abs().max() < 0.02  # a level of shrinking
    for index, sample in enumerate(case.samples):
        true = case.lance.look(sample.vit_patches, sample.vit_grids)
        torch.testing.assert_close(case.prompts.seen[index], true, **CLOSE)


@pytest.mark.parametrize("task", UNDERSTANDING)
def test_answer_logits(case_of, lance_and_words, task):
    case = case_of(task)
    logits = case.runner.logits(case.prompts, case.work)
    for index, sample in enumerate(case.samples):
        answer = prompts.encode(lance_and_words[1], case.said[index].answer + prompts.IM_END)
        asked, length = int(case.asked[index]), int(case.prompts.lengths[index])
        assert case.prompts.ids[index, asked:length].tolist() == answer
        true = understanding.forced_logits(case.lance, sample, answer)
        torch.testing.assert_close(logits[index, asked - 1 : length - 1], true, **CLOSE)


@pytest.mark.parametrize("task", GENERATION)
@pytest.mark.parametrize("cached", [True, False])
def test_velocities_of_both_branches(case_of, task, cached):
    case = case_of(task)
    t, zero = torch.tensor(0.7), torch.zeros_like(case.prompts.lengths)
    free = case.prompts._replace(lengths=zero)
    mine = [
        case.runner.velocity(case.prompts, case.state, t.expand(COUNT), case.prompts.lengths, case.work),
        case.runner.velocity(free, case.state, t.expand(COUNT), case.prompts.lengths if cached else zero, case.work),
    ]
    for index, sample in enumerate(case.samples):
        cfg = sampler.FlowConfig(steps=4, cached=cached)
        flow = sampler.start_flow(case.lance, sample, case.state[index], cfg)
        true = flow.velocities(case.state[index], t, True)
        rows = slice(None) if cached else case.layout.moving[-case.layout.target :]  # the uncached flow's alone
        torch.testing.assert_close(mine[0][index][rows], true.conditional, **CLOSE)
        torch.testing.assert_close(mine[1][index][rows], true.unconditional, **CLOSE)


@pytest.mark.parametrize("task", ["t2i", "i2v", "image_edit"])
def test_drawn_latents(case_of, task):
    case, cfg = case_of(task), sampler.FlowConfig(steps=4)
    drawn = case.runner.draw(case.prompts, case.state, cfg, case.work)
    for index, sample in enumerate(case.samples):
        flow = sampler.start_flow(case.lance, sample, case.state[index], cfg)
        true = sampler.run_flow(flow, case.state[index], cfg)[-case.layout.target :]
        torch.testing.assert_close(drawn[index], true, atol=1e-3, rtol=1e-3)


def test_clean_latents_stay(case_of):
    case = case_of("i2v")
    clean = torch.ones(COUNT, case.layout.latents, 48)
    drawn = case.runner.draw(case.prompts, case.runner.start(case.state, clean), sampler.FlowConfig(steps=2), case.work)
    assert torch.equal(drawn[:, :64], clean[:, :64]) and not torch.equal(drawn[:, 64:], clean[:, 64:])


@pytest.mark.parametrize("task", TASKS)
def test_layouts_keep_kernels_aligned(case_of, task):
    assert case_of(task).layout.mask.shape[1] % layouts.ALIGN == 0


def test_exact_tells_a_wrong_answer(case_of):
    case = case_of("x2t_image")
    told = case.prompts.ids.clone()
    asked, length = int(case.asked[0]), int(case.prompts.lengths[0])
    for place in range(asked, length):  # write what the model itself would say
        logits = case.runner.logits(case.prompts._replace(ids=told), case.work)
        logits[..., tokenizer.LENGTH :] = -torch.inf
        told[0, place] = logits[0, place - 1].argmax()
    assert case.runner.exact(case.prompts._replace(ids=told), case.asked, case.work)[0]
    told[0, asked] += 1
    assert not case.runner.exact(case.prompts._replace(ids=told), case.asked, case.work)[0]


def test_compiled_kernels_give_the_same_for_any_number_of_rows(case_of):
    kernels = batched.Kernels.compiled(backend="aot_eager", fullgraph=True)
    for task in ("x2t_image", "t2i"):
        case = case_of(task)
        fast = batched.Runner(case.lance, case.layout, kernels)
        t = torch.full((COUNT,), 0.5)
        both = [
            runner.logits(case.prompts, case.work)
            if task in UNDERSTANDING
            else runner.velocity(case.prompts, case.state, t, case.prompts.lengths, case.work)
            for runner in (fast, case.runner)
        ]
        torch.testing.assert_close(*both, **CLOSE)
