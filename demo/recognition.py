"""Tells what a clip of the trained model shows, from its pixels alone: the colour, the shape and where it moves."""

from __future__ import annotations

import torch

from .train.shapes import BACKGROUND, COLOURS, DIRECTIONS, Scene

_LEAST_AREA = 40
_LEAST_WAY = 5.0
# Share of its bounding box that a shape fills: a triangle half, a circle pi / 4, a square all.
_FILLS = (("triangle", 0.66), ("circle", 0.90), ("square", 1.01))


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
    fill = torch.stack([_fill(frame) for frame in inside]).median()
    shape = next(shape for shape, most in _FILLS if fill <= most)
    return Scene(name, shape, direction)


def _direction(inside: torch.Tensor) -> str | None:
    """Where the middle of the shape goes from the first frame to the last."""
    first, last = (frame.nonzero().float().mean(dim=0) for frame in (inside[0], inside[-1]))
    down, right = (last - first).tolist()
    if max(abs(down), abs(right)) < _LEAST_WAY:
        return None
    return max(DIRECTIONS, key=lambda key: DIRECTIONS[key][0] * right + DIRECTIONS[key][1] * down)


def _fill(frame: torch.Tensor) -> torch.Tensor:
    rows, columns = frame.nonzero(as_tuple=True)
    box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    return len(rows) / box.float()
