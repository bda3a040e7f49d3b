"""Draws the training clips: one coloured shape that moves across a dark background, and the prompts that describe them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

SIZE = 64
FRAMES = 13
BACKGROUND = (0.09, 0.10, 0.13)
COLOURS = {
    "red": (0.90, 0.16, 0.18),
    "green": (0.16, 0.75, 0.30),
    "blue": (0.18, 0.40, 0.95),
    "yellow": (0.98, 0.82, 0.15),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("square", "circle", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
AREAS = {"square": (2 * 0.88) ** 2, "circle": math.pi, "triangle": 3 * math.sqrt(3) / 4}
"""Area of each shape of radius one."""
TEMPLATES = (
    "a {colour} {shape} moves {direction}",
    "{colour} {shape} moving {direction}",
    "the {shape} is {colour} and it moves {direction}",
)
_RADIUS = (9.0, 12.0)
_DISTANCE = (24.0, 30.0)


@dataclass(frozen=True)
class Scene:
    """What a clip shows; `prompt` says it in the words of one template."""

    colour: str
    shape: str
    direction: str

    def prompt(self, template: int = 0) -> str:
        return TEMPLATES[template].format(colour=self.colour, shape=self.shape, direction=self.direction)


SCENES = tuple(Scene(*words) for words in itertools.product(COLOURS, SHAPES, DIRECTIONS))


def draw(scene: Scene, generator: torch.Generator) -> torch.Tensor:
    """A clip of a scene, its size, speed and path drawn at random: (FRAMES, 3, SIZE, SIZE), float32 in [0, 1]."""
    radius, distance, across = torch.rand(3, generator=generator).tolist()
    radius = _RADIUS[0] + radius * (_RADIUS[1] - _RADIUS[0])
    distance = _DISTANCE[0] + distance * (_DISTANCE[1] - _DISTANCE[0])
    middle = (SIZE - 1) / 2
    room = middle - radius - 2
    along = torch.linspace(-distance / 2, distance / 2, FRAMES)
    offset = (2 * across - 1) * room
    x_way, y_way = DIRECTIONS[scene.direction]
    x = middle + (along * x_way if x_way else torch.full((FRAMES,), offset))
    y = middle + (along * y_way if y_way else torch.full((FRAMES,), offset))
    grid = torch.arange(SIZE, dtype=torch.float32)
    inside = (
        0.5 - signed_distance(scene.shape, grid - x[:, None, None], grid[:, None] - y[:, None, None], radius)
    ).clamp(0, 1)
    background, colour = (torch.tensor(rgb)[None, :, None, None] for rgb in (BACKGROUND, COLOURS[scene.colour]))
    return background + inside[:, None] * (colour - background)


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Signed distance in pixels to the outline (negative inside), of points relative to the shape's middle."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs().expand_as(x + y), y.abs().expand_as(x + y)) - 0.88 * radius
    slope = math.sqrt(3) / 2
    return torch.maximum(slope * x.abs() - y / 2 - radius / 2, (y - radius / 2).expand_as(x + y))


def batch(count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[Scene]]:
    """Random clips, (count, FRAMES, 3, SIZE, SIZE) in [0, 1], and their scenes."""
    scenes = [SCENES[index] for index in torch.randint(len(SCENES), (count,), generator=generator).tolist()]
    return torch.stack([draw(scene, generator) for scene in scenes]), scenes
