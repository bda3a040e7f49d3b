"""Tells what a clip of the trained model shows, from its pixels alone: the colour, the shape and where it moves."""

from __future__ import annotations

import math

import torch

from .shapes import AREAS, BACKGROUND, COLOURS, DIRECTIONS, SHAPES, Scene, signed_distance

_LEAST_AREA = 40
_LEAST_WAY = 5.0


def recognise(clip: torch.Tensor) -> Scene | None:
    """The scene of a clip (frames, height, width, 3) in [0, 1]; None where there is no one moving shape in it."""
    away = (clip - torch.tensor(BACKGROUND)).norm(dim=-1)
    inside = away > away.flatten(1).quantile(0.99, dim=1)[:, None, None] / 2
    areas = inside.flatten(1).sum(dim=1)
    if away.max() < 0.3 or areas.min() < _LEAST_AREA:
        return None
    direction = _direction(inside)
    if direction is None:
        return None
    colour = clip[inside].median(dim=0).values
    name = min(COLOURS, key=lambda key: float((torch.tensor(COLOURS[key]) - colour).norm()))
    shape = max(SHAPES, key=lambda key: sum(_likeness(key, frame) for frame in inside))
    return Scene(name, shape, direction)


def _direction(inside: torch.Tensor) -> str | None:
    """Where the middle of the shape goes from the first frame to the last."""
    first, last = (frame.nonzero().float().mean(dim=0) for frame in (inside[0], inside[-1]))
    down, right = (last - first).tolist()
    if max(abs(down), abs(right)) < _LEAST_WAY:
        return None
    return max(DIRECTIONS, key=lambda key: DIRECTIONS[key][0] * right + DIRECTIONS[key][1] * down)


def _likeness(shape: str, frame: torch.Tensor) -> float:
    """Overlap (intersection over union) of a frame's mask with the perfect shape of the same middle and area."""
    y, x = frame.nonzero().float().mean(dim=0).tolist()
    radius = math.sqrt(float(frame.sum()) / AREAS[shape])
    rows, columns = (torch.arange(size, dtype=torch.float32) for size in frame.shape)
    perfect = signed_distance(shape, columns[None, :] - x, rows[:, None] - y, radius) <= 0
    return float((frame & perfect).sum() / (frame | perfect).sum())
