"""Scenes are the same for the same seed, keep their held-out promise and are drawn as they say."""

import random

import torch

from lance_quant.tiny import world


def scenes(count: int, **options) -> list[world.Scene]:
    rng = random.Random(4)
    return [world.sample_scene(rng, **options) for _ in range(count)]


def test_same_seed_same_scenes():
    assert scenes(20) == scenes(20)


def test_training_scenes_never_show_a_held_out_combination():
    assert not any(scene.is_held_out for scene in scenes(2000))
    assert all(scene.is_held_out for scene in scenes(200, unseen=True))


def test_every_kind_has_one_held_out_colour():
    for kind in world.KINDS:
        assert sum(world.held_out(colour, kind) for colour in world.COLOURS) == 1


def test_random_batches_keep_the_promise_too():
    batch, _ = world.random_batch(500, torch.Generator().manual_seed(0))
    shown = batch.kind >= 0
    assert (batch.colour[shown] != (3 * batch.kind[shown] + 1) % len(world.COLOURS)).all()
    assert shown.any(1).all() and not shown.all()


def test_a_thing_is_drawn_where_it_stands_in_its_colour():
    thing = world.Thing(kind="square", colour="red", size="large", cell=5, dx=2, dy=-1)
    pixels = world.render(world.pack([world.Scene(things=(thing,), background="black")]))[0]
    x, y = thing.centre()
    assert tuple(pixels[:, y, x].tolist()) == world.COLOURS["red"]
    assert tuple(pixels[:, 2, 2].tolist()) == world.BACKGROUNDS["black"]


def test_sprites_end_before_their_rim_at_the_farthest_jitter():
    reach = world.sprites().amax((0, 1))
    rows = (reach > 0).any(1).nonzero()
    assert rows.min() >= world.JITTER and rows.max() <= 2 * world.HALF - world.JITTER


def test_moving_things_reach_their_goal():
    thing = world.Thing(kind="circle", colour="blue", size="small", cell=0, goal=8)
    assert thing.centre(0.0) == (world.CENTRES[0],) * 2
    assert thing.centre(1.0) == (world.CENTRES[2],) * 2


def test_edits_change_one_thing_and_stay_in_the_trained_world():
    rng = random.Random(0)
    for scene in scenes(50):
        for name, edit in world.EDITS.items():
            edited = edit(scene, 0, rng)
            assert edited != scene and not edited.is_held_out
            kept = set(scene.things) & set(edited.things)
            assert len(kept) >= len(scene.things) - 1, name


def test_clips_move_one_thing_one_cell_to_a_free_place():
    rng = random.Random(6)
    clips = [world.sample_clip(rng) for _ in range(300)]
    moving = [scene for scene in clips if scene.mover]
    assert 200 < len(moving) < 290
    for scene in moving:
        assert sum(thing.direction is not None for thing in scene.things) == 1
        assert scene.mover.goal not in {thing.cell for thing in scene.things}
        assert sum((t.kind, t.colour) == (scene.mover.kind, scene.mover.colour) for t in scene.things) == 1
    assert {scene.mover.direction for scene in moving} == set(world.MOVES)
