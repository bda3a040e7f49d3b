"""Looks for what makes a saved graph hard to read: nodes that overlap, links behind nodes, links that cross."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from .room import room_below

TITLE = 30
_SAMPLES = 48
_INPUT, _OUTPUT = -10, -20

Point = tuple[float, float]
Rectangle = tuple[float, float, float, float]


def levels(saved: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, graph) of the root graph ("") and of every subgraph."""
    yield "", saved
    for definition in saved.get("definitions", {}).get("subgraphs", []):
        yield definition["name"], definition


def body(node: Mapping[str, Any]) -> Rectangle:
    """Left, top, right and bottom of a node with its title."""
    x, y = node["pos"]
    width, height = node["size"]
    return x, y - TITLE, x + width, y + height


def full(node: Mapping[str, Any]) -> Rectangle:
    """Left, top, right and bottom of a node with its title and all that it grows by."""
    left, top, right, bottom = body(node)
    return left, top, right, bottom + room_below(node)


def overlaps(graph: Mapping[str, Any], margin: int = 10) -> list[tuple[int, int]]:
    """Pairs of nodes that overlap or nearly touch, at the latest when they have grown."""
    found = []
    for one, other in combinations(graph["nodes"], 2):
        a, b = full(one), full(other)
        if a[0] < b[2] + margin and b[0] < a[2] + margin and a[1] < b[3] + margin and b[1] < a[3] + margin:
            found.append((one["id"], other["id"]))
    return found


def curves(graph: Mapping[str, Any]) -> dict[int, list[Point]]:
    """Link -> points along it, as the frontend draws it: a spline between each two of its ends and reroutes."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    extra = graph.get("extra", {})
    reroutes = {entry["id"]: entry for entry in extra.get("reroutes", [])}
    last = {entry["id"]: entry["parentId"] for entry in extra.get("linkExtensions", [])}
    found = {}
    for entry in graph["links"]:
        link = _listed(entry)
        number, origin, origin_slot, target, target_slot = link[:5]
        way, parent = [], last.get(number)
        while parent is not None:
            way.append(tuple(reroutes[parent]["pos"]))
            parent = reroutes[parent].get("parentId")
        stops = [_output(graph, nodes, origin, origin_slot), *reversed(way), _input(graph, nodes, target, target_slot)]
        points: list[Point] = []
        for start, end in zip(stops, stops[1:], strict=False):
            points += _spline(start, end)
        found[number] = points
    return found


def _listed(link: Any) -> list[Any]:
    """A link as the root graph lists it: id, origin, its slot, target, its slot, type."""
    return list(link.values()) if isinstance(link, Mapping) else link


def _output(graph: Mapping[str, Any], nodes: Mapping[int, Any], number: int, slot: int) -> Point:
    if number == _INPUT:
        x, y, width, _ = graph["inputNode"]["bounding"]
        return x + width, y + 20 + 20 * slot
    x, y = nodes[number]["pos"]
    return x + nodes[number]["size"][0], y + 14 + 20 * slot


def _input(graph: Mapping[str, Any], nodes: Mapping[int, Any], number: int, slot: int) -> Point:
    if number == _OUTPUT:
        x, y, _, _ = graph["outputNode"]["bounding"]
        return x, y + 20 + 20 * slot
    node = nodes[number]
    x, y = node["pos"]
    entry = node["inputs"][slot]
    sockets = [other for other in node["inputs"] if "widget" not in other]
    if "widget" not in entry:
        return x, y + 14 + 20 * sockets.index(entry)
    rows = 20 * max(len(sockets), len(node["outputs"]))
    widgets = [other for other in node["inputs"] if "widget" in other]
    return x, y + rows + 18 + 24 * widgets.index(entry)


def _spline(start: Point, end: Point) -> list[Point]:
    reach = 0.25 * ((start[0] - end[0]) ** 2 + (start[1] - end[1]) ** 2) ** 0.5
    controls = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    points = []
    for step in range(_SAMPLES + 1):
        t = step / _SAMPLES
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        x = sum(weight * control[0] for weight, control in zip(weights, controls, strict=True))
        y = sum(weight * control[1] for weight, control in zip(weights, controls, strict=True))
        points.append((x, y))
    return points


def links_behind_nodes(graph: Mapping[str, Any], slack: int = 4) -> list[tuple[int, int]]:
    """(link, node) where a link between two nodes runs behind a node, as it is or as it will be."""
    found = []
    ends = {link[0]: (link[1], link[3]) for link in map(_listed, graph["links"])}
    for link, points in curves(graph).items():
        if _INPUT in ends[link] or _OUTPUT in ends[link]:
            continue
        for node in graph["nodes"]:
            left, top, right, bottom = full(node)
            inside = (left + slack < x < right - slack and top + slack < y < bottom - slack for x, y in points)
            if any(inside):
                found.append((link, node["id"]))
    return found


def crossings(graph: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Pairs of links that cross."""
    found = []
    for (one, a), (other, b) in combinations(curves(graph).items(), 2):
        if a[0] == b[0]:
            continue
        if any(_cross(p, q, r, s) for p, q in zip(a, a[1:], strict=False) for r, s in zip(b, b[1:], strict=False)):
            found.append((one, other))
    return found


def _cross(p: Point, q: Point, r: Point, s: Point) -> bool:
    if max(p[0], q[0]) < min(r[0], s[0]) or max(r[0], s[0]) < min(p[0], q[0]):
        return False

    def left_of(a: Point, b: Point, c: Point) -> bool:
        return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])

    return left_of(p, q, r) != left_of(p, q, s) and left_of(r, s, p) != left_of(r, s, q)
