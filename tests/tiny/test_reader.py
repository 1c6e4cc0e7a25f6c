"""The reader is right on true pictures, stands noise, and sees what is wrong."""

import random
from dataclasses import replace

import torch

from lance_quant.tiny import reader, world

RNG = random.Random(8)
SCENES = [world.sample_scene(RNG, unseen=i % 2 == 0) for i in range(150)]
PICTURES = world.render(world.pack(SCENES))


def test_true_pictures():
    assert reader.agreement(PICTURES, SCENES) >= 0.99


def test_noisy_pictures():
    noise = torch.randn(PICTURES.shape, generator=torch.Generator().manual_seed(0)) * 10
    noisy = (PICTURES.float() + noise).clamp(0, 255).to(torch.uint8)
    assert reader.agreement(noisy, SCENES) >= 0.97


def test_other_colour_other_kind_and_a_missing_thing_do_not_match():
    reading = reader.read(PICTURES)
    for index, scene in enumerate(SCENES):
        first = scene.things[0]
        colour = next(name for name in world.COLOURS if name != first.colour)
        kind = next(name for name in world.KINDS if name != first.kind)
        rest = scene.things[1:]
        assert reader.matches(reading, index, scene)
        assert not reader.matches(reading, index, replace(scene, things=(replace(first, colour=colour), *rest)))
        assert not reader.matches(reading, index, replace(scene, things=(replace(first, kind=kind), *rest)))
        assert not reader.matches(reading, index, replace(scene, things=rest))


def test_a_blot_is_no_thing():
    picture = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    picture[0, 0, 50:80, 40:90] = 220
    reading = reader.read(picture)
    assert reading.unreadable(0) or reading.scene(0).things == ()
