"""Where nodes go: nested rows, columns and groups of nodes whose sizes are worked out from their sockets and widgets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

TITLE = 30
SLOT = 20
WIDGET = 24
GROUP_PADDING = 24
GROUP_TITLE = 44
GAP = 40
LINK_GAP = 90

Size = tuple[int, int]
Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True)
class Box:
    """Nodes (by name) and further boxes, side by side or one below the other.

    Attributes:
        children: node names and boxes.
        across: side by side.
        title: it is drawn as a group of this name.
        gap: space between children.
        above: space left free above the box.
        left: space left free on its left.
        color: of the group.
    """

    children: tuple[Box | str, ...]
    across: bool
    title: str = ""
    gap: int = GAP
    above: int = 0
    left: int = 0
    color: str = "#3f789e"

    def names(self) -> Iterator[str]:
        """The nodes inside, in reading order."""
        for child in self.children:
            if isinstance(child, str):
                yield child
            else:
                yield from child.names()


def row(*children: Box | str, title: str = "", gap: int = LINK_GAP, above: int = 0, left: int = 0) -> Box:
    """Boxes side by side, tops aligned."""
    return Box(children, True, title, gap, above, left)


def column(*children: Box | str, title: str = "", gap: int = GAP, above: int = 0, left: int = 0) -> Box:
    """Boxes one below the other, left sides aligned."""
    return Box(children, False, title, gap, above, left)


@dataclass
class Placement:
    """Positions (of a node's body, below its title), sizes and group rectangles (x, y, width, height)."""

    positions: dict[str, tuple[int, int]] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)
    groups: list[tuple[str, Rectangle, str]] = field(default_factory=list)


def place(box: Box, sizes: Mapping[str, Size], x: int = 0, y: int = 0) -> Placement:
    """Positions for every node of the box, its top left corner at (x, y), nodes of a column equally wide.

    Raises KeyError for a node without a size.
    """
    placement = Placement(sizes={name: sizes[name] for name in box.names()})
    _align(box, placement.sizes)
    _place(box, x, y, placement)
    return placement


def _align(box: Box, sizes: dict[str, Size]) -> None:
    """Nodes of one column become equally wide."""
    names = [child for child in box.children if isinstance(child, str)]
    widest = max((sizes[name][0] for name in names), default=0)
    for name in names if not box.across else ():
        sizes[name] = widest, sizes[name][1]
    for child in box.children:
        if isinstance(child, Box):
            _align(child, sizes)


def _place(box: Box | str, x: int, y: int, placement: Placement) -> Size:
    if isinstance(box, str):
        placement.positions[box] = (x, y + TITLE)
        width, height = placement.sizes[box]
        return width, height + TITLE
    x, y = x + box.left, y + box.above
    index = len(placement.groups)
    left, top = (x + GROUP_PADDING, y + GROUP_TITLE) if box.title else (x, y)
    width = height = 0
    for number, child in enumerate(box.children):
        gap = box.gap if number else 0
        if box.across:
            wide, high = _place(child, left + width + gap, top, placement)
            width, height = width + gap + wide, max(height, high)
        else:
            wide, high = _place(child, left, top + height + gap, placement)
            width, height = max(width, wide), height + gap + high
    if not box.title:
        return width + box.left, height + box.above
    whole = width + 2 * GROUP_PADDING, height + GROUP_TITLE + GROUP_PADDING
    placement.groups.insert(index, (box.title, (x, y, *whole), box.color))
    return whole[0] + box.left, whole[1] + box.above


def node_height(sockets_in: int, sockets_out: int, widgets: int, extra: int = 0) -> int:
    """The height that the frontend gives a node with these rows; `extra` for texts and previews."""
    height = SLOT * max(sockets_in, sockets_out, 1) + 6 + extra
    return height + WIDGET * widgets + 8 if widgets else height


def text_width(title: str, rows: list[tuple[str, str]]) -> int:
    """The width in which a title and the widgets' labels and values are not cut, in tens.

    From the mean width of a character at the frontend's 14 and 12 pixels, and what it draws around them. Nodes 2.0 makes
    every label as wide as the longest one.
    """
    longest = max((len(label) for label, _ in rows), default=0)
    needed = [46 + 7.8 * len(title), *(78 + 6.7 * (len(label) + len(value)) for label, value in rows)]
    needed += [64 + 6.2 * longest + 6.7 * len(value) for _, value in rows]
    return -(-int(max(needed)) // 10) * 10


def note_height(text: str, characters: int = 76) -> int:
    """The height in which a Markdown note of the usual width is not cut; `characters` are those of one line."""
    lines = sum(max(1, -(-len(re.sub(r"\(http[^)]*\)", "", line)) // characters)) for line in text.splitlines())
    return 60 + 15 * lines
