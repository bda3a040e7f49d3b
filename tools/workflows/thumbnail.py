"""The template browser's picture of a workflow: its graph in miniature, with the pack's own nodes in color, and a title."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from . import tidy

WIDTH, HEIGHT, TITLE_HEIGHT, MARGIN = 640, 400, 96, 20
_SCALE = 2
_BACKGROUND, _GROUP, _NODE, _TITLE, _OWN, _NOTE = "#1b1c20", "#22303c", "#3a3c42", "#4b4e55", "#2f8f6b", "#57472f"
_LINKS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6", "VIDEO": "#7fbf8f", "AUDIO": "#7fd6d6", "MODEL_PATCH": "#9bd27f",
}  # fmt: skip


def draw(saved: Mapping[str, Any], title: str, subtitle: str) -> Image.Image:
    """The picture, WIDTH x HEIGHT."""
    picture = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE), _BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    canvas.text((MARGIN * _SCALE, 14 * _SCALE), title, "#f2f2f2", _font(30))
    canvas.text((MARGIN * _SCALE, 56 * _SCALE), subtitle, "#8fd3b6", _font(20))
    nodes = [node for node in saved["nodes"] if node["type"] != "MarkdownNote"]
    boxes = [tidy.body(node) for node in nodes]
    boxes += [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in saved["groups"])]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    room = (WIDTH - 2 * MARGIN) * _SCALE, (HEIGHT - TITLE_HEIGHT - MARGIN) * _SCALE
    zoom = min(room[0] / (right - left), room[1] / (bottom - top))
    shift = (
        MARGIN * _SCALE + (room[0] - zoom * (right - left)) / 2,
        TITLE_HEIGHT * _SCALE + (room[1] - zoom * (bottom - top)) / 2,
    )

    def at(x: float, y: float) -> tuple[float, float]:
        return shift[0] + (x - left) * zoom, shift[1] + (y - top) * zoom

    for group in saved["groups"]:
        x, y, width, height = group["bounding"]
        canvas.rounded_rectangle((*at(x, y), *at(x + width, y + height)), 8, _GROUP)
    types = {link[0]: link[5] for link in saved["links"]}
    for number, points in tidy.curves(saved).items():
        canvas.line([at(*point) for point in points], _LINKS.get(types[number], "#8a9a8a"), 3)
    for node in nodes:
        x0, y0, x1, y1 = tidy.body(node)
        own = node["type"].startswith("Lowbit")
        canvas.rounded_rectangle((*at(x0, y0), *at(x1, y1)), 6, _NODE)
        canvas.rounded_rectangle((*at(x0, y0), *at(x1, y0 + tidy.TITLE + 20)), 6, _OWN if own else _TITLE)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def write(path: Path, saved: Mapping[str, Any], title: str, subtitle: str) -> None:
    """Writes the picture as a JPEG."""
    draw(saved, title, subtitle).save(path, quality=86, optimize=True)


def _font(size: int) -> Any:
    return ImageFont.load_default(size * _SCALE)
