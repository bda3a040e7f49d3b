"""The template browser's pictures of the bundled workflows: `python -m tools.thumbnails`.

Each shows the graph in miniature, with the pack's own nodes in color, and a title.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from testing.workflows.bundled import FOLDER, WORKFLOWS, saved

WIDTH, HEIGHT, TITLE_HEIGHT, MARGIN = 640, 400, 96, 20
_SCALE, _NODE_TITLE, _POINTS = 2, 30, 48
_BACKGROUND, _GROUP, _NODE, _TITLE, _OWN = "#1b1c20", "#22303c", "#3a3c42", "#4b4e55", "#2f8f6b"
_LINKS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6", "VIDEO": "#7fbf8f", "AUDIO": "#7fd6d6", "MODEL_PATCH": "#9bd27f",
}  # fmt: skip

Point = tuple[float, float]


def body(node: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - _NODE_TITLE, x + width, y + height


def curves(graph: Mapping[str, Any]) -> dict[int, list[Point]]:
    """Link -> points along it, as the frontend draws it: a spline between each two of its ends and reroutes."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    reroutes = {entry["id"]: entry for entry in graph["extra"].get("reroutes", [])}
    last = {entry["id"]: entry["parentId"] for entry in graph["extra"].get("linkExtensions", [])}
    found = {}
    for number, origin, origin_slot, target, target_slot, _ in graph["links"]:
        way, parent = [], last.get(number)
        while parent is not None:
            way.append(tuple(reroutes[parent]["pos"]))
            parent = reroutes[parent].get("parentId")
        (x, y), (width, _) = nodes[origin]["pos"], nodes[origin]["size"]
        stops = [(x + width, y + 14 + 20 * origin_slot), *reversed(way), _input(nodes[target], target_slot)]
        found[number] = [point for start, end in zip(stops, stops[1:], strict=False) for point in _spline(start, end)]
    return found


def _input(node: Mapping[str, Any], slot: int) -> Point:
    """Where a link enters: at one of the sockets, or beside a widget below them."""
    (x, y), entry = node["pos"], node["inputs"][slot]
    alike = [other for other in node["inputs"] if ("widget" in other) == ("widget" in entry)]
    if "widget" not in entry:
        return x, y + 14 + 20 * alike.index(entry)
    rows = max(len(node["inputs"]) - len(alike), len(node["outputs"]))
    return x, y + 20 * rows + 18 + 24 * alike.index(entry)


def _spline(start: Point, end: Point) -> list[Point]:
    reach = 0.25 * math.dist(start, end)
    controls = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    points = []
    for t in (step / _POINTS for step in range(_POINTS + 1)):
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        x, y = (sum(w * control[axis] for w, control in zip(weights, controls, strict=True)) for axis in (0, 1))
        points.append((x, y))
    return points


def draw(graph: Mapping[str, Any], title: str, subtitle: str) -> Image.Image:
    """The picture, WIDTH x HEIGHT."""
    picture = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE), _BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    canvas.text((MARGIN * _SCALE, 14 * _SCALE), title, "#f2f2f2", ImageFont.load_default(30 * _SCALE))
    canvas.text((MARGIN * _SCALE, 56 * _SCALE), subtitle, "#8fd3b6", ImageFont.load_default(20 * _SCALE))
    nodes = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    boxes = [body(node) for node in nodes]
    boxes += [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in graph["groups"])]
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

    for group in graph["groups"]:
        x, y, width, height = group["bounding"]
        canvas.rounded_rectangle((*at(x, y), *at(x + width, y + height)), 8, _GROUP)
    types = {link[0]: link[5] for link in graph["links"]}
    for number, points in curves(graph).items():
        canvas.line([at(*point) for point in points], _LINKS.get(types[number], "#8a9a8a"), 3)
    for node in nodes:
        x0, y0, x1, y1 = body(node)
        own = node["type"].startswith("Lowbit")
        canvas.rounded_rectangle((*at(x0, y0), *at(x1, y1)), 6, _NODE)
        canvas.rounded_rectangle((*at(x0, y0), *at(x1, y0 + _NODE_TITLE + 20)), 6, _OWN if own else _TITLE)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    for name, workflow in WORKFLOWS.items():
        picture = draw(saved(name), workflow.title, workflow.subtitle)
        picture.save(FOLDER / f"{name}.jpg", quality=86, optimize=True)
