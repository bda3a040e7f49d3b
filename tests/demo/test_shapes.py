"""The drawn clips, and the telling of what a clip shows."""

from __future__ import annotations

import pytest
import torch

from demo.recognition import recognise
from demo.shapes import BACKGROUND, FRAMES, SCENES, SIZE, Scene, batch, draw


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.prompt())
def test_every_scene_is_told_from_its_pixels(scene):
    generator = torch.Generator().manual_seed(SCENES.index(scene))
    for _ in range(3):
        assert recognise(draw(scene, generator).movedim(1, -1)) == scene


def test_a_noisy_clip_is_still_told():
    scene = Scene("blue", "triangle", "up")
    clip = draw(scene, torch.Generator().manual_seed(1)).movedim(1, -1)
    assert recognise(clip + 0.02 * torch.randn(clip.shape)) == scene


def test_nothing_is_told_from_an_empty_a_noisy_or_a_still_clip():
    empty = torch.tensor(BACKGROUND).expand(FRAMES, SIZE, SIZE, 3)
    still = draw(SCENES[0], torch.Generator().manual_seed(2))[:1].expand(FRAMES, -1, -1, -1).movedim(1, -1)
    assert recognise(empty) is None
    assert recognise(torch.rand(FRAMES, SIZE, SIZE, 3)) is None
    assert recognise(still) is None


def test_a_reversed_clip_moves_the_other_way():
    clip = draw(Scene("red", "square", "left"), torch.Generator().manual_seed(3)).movedim(1, -1)
    assert recognise(clip.flip(0)) == Scene("red", "square", "right")


def test_a_batch_has_its_scenes_in_range_and_in_view():
    clips, scenes = batch(20, torch.Generator().manual_seed(4))
    assert clips.shape == (20, FRAMES, 3, SIZE, SIZE)
    assert 0 <= clips.min() <= clips.max() <= 1
    edge = torch.cat([clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]], dim=-1)
    assert (edge - torch.tensor(BACKGROUND).view(3, 1)).abs().max() < 1e-6
    assert len(scenes) == 20
