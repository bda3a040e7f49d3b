"""How large a node is: worked out from its sockets, its widgets and the texts that they show."""

from __future__ import annotations

from .layout import Size, node_height, note_height, text_width
from .room import METER_WIDTH
from .unfold import NOTES, Node
from .widgets import ObjectInfo, list_values, options_of, walk

WIDTH, TEXT_WIDTH, HOST_WIDTH, NOTE_WIDTH, TEXT_HEIGHT, HOST_TEXT_HEIGHT = 280, 400, 360, 480, 54, 144
SHOWING = ("LowbitOptimize", "LowbitAttentionReport", "LowbitMemoryReport", "PreviewAny", "PreviewImage", "SaveImage", "SaveVideo")
"""Nodes that show a text or a picture once they have run."""
LEAST_WIDTHS = dict.fromkeys(SHOWING, TEXT_WIDTH) | {"LowbitMemoryManager": METER_WIDTH}

Rows = tuple[int, int]
"""How many sockets a node has on its left and on its right."""


def node_size(node: Node, rows: Rows, info: ObjectInfo, extra: int = 0) -> Size:
    """Width and height of a node; `extra` is height beyond its rows."""
    if node.type in NOTES:
        return NOTE_WIDTH, note_height(node.values["text"])
    widgets = widgets_of(node, info)
    texts = sum(is_text(node, widget, info) for widget in widgets)
    height = node_height(*rows, len(widgets), extra + texts * (TEXT_HEIGHT - 24))
    title = node.title or info[node.type]["display_name"] or node.type
    least = max(LEAST_WIDTHS.get(node.type, WIDTH), TEXT_WIDTH if texts else 0)
    return max(least, text_width(title, [(widget, shown(node, widget, info)) for widget in widgets])), height


def host_size(title: str, rows: Rows, widgets: list[tuple[str, Node, str]], info: ObjectInfo, extra: int = 0) -> Size:
    """Width and height of a subgraph's node, which shows `widgets`: label, and the node and widget inside."""
    texts = sum(is_text(node, widget, info) for _, node, widget in widgets)
    height = node_height(*rows, len(widgets), extra + texts * (HOST_TEXT_HEIGHT - 24))
    labels = [(label, shown(node, widget, info)) for label, node, widget in widgets]
    return max(HOST_WIDTH, text_width(title, labels)), height


def widgets_of(node: Node, info: ObjectInfo) -> list[str]:
    """The names of a node's widgets in the order in which they are drawn."""
    return [widget for widget, _ in walk(info[node.type], lambda name, _: node.values[name])]


def shown(node: Node, widget: str, info: ObjectInfo) -> str:
    """The text that a widget of one line shows; nothing for several lines."""
    if is_text(node, widget, info):
        return ""
    values = list_values(info[node.type], node.values)
    return str(dict(zip(widgets_of(node, info), values, strict=False)).get(widget, ""))


def is_text(node: Node, widget: str, info: ObjectInfo) -> bool:
    """Whether a widget takes several lines of text."""
    for name, specification in walk(info[node.type], lambda key, _: node.values[key]):
        if name == widget and specification is not None:
            return bool(options_of(specification).get("multiline"))
    return False
