"""Writes a flat graph in ComfyUI's saved form: nodes in place, groups, notes, chosen nodes folded into subgraphs."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from .layout import Box, Placement, place
from .room import ROOM
from .size import host_size, node_size
from .unfold import ALWAYS, NOTES, Flat, Node, Source
from .widgets import ObjectInfo, inputs_of, is_widget, list_values, options_of, walk

_INPUT, _OUTPUT = -10, -20
_MATCH = "COMFY_MATCHTYPE_V3"
_NAMESPACE = uuid.UUID("7c1d7f0a-5d0e-4d5c-9a39-6d1f6f0c2b11")
_KEPT_PROPERTIES = ("Node name for S&R", "cnr_id", "ver", "models")


@dataclass(frozen=True)
class Exposed:
    """A widget of nodes inside a subgraph that its host shows: label, and the (node, widget) pairs it sets."""

    label: str
    targets: tuple[tuple[str, str], ...]


@dataclass
class Subgraph:
    """Nodes folded into one.

    Attributes:
        title: name of the subgraph and its host node.
        box: the nodes inside and their layout.
        inputs: label -> the outside (node, output) that feeds nodes inside, in socket order.
        outputs: label -> the inside (node, output) that is used outside, in socket order.
        widgets: what the host shows of the widgets inside.
        level: height at which inputs and outputs are drawn inside; the middle unless given.
    """

    title: str
    box: Box
    inputs: dict[str, Source]
    outputs: dict[str, Source]
    widgets: list[Exposed] = field(default_factory=list)
    level: int | None = None


@dataclass
class Design:
    """A workflow before it is written.

    Attributes:
        name: its file's name.
        nodes: the flat graph, with notes.
        box: layout of the root graph.
        subgraphs: host name -> what is folded.
        routes: (node, input) -> the ways its link takes, "under NODE ...", "over NODE ...", "before NODE ...",
            "near NODE ...", "past NODE ..." or "around NODE ...".
        extra_heights: heights beyond sockets and widgets: texts and previews.
    """

    name: str
    nodes: Flat
    box: Box
    subgraphs: dict[str, Subgraph] = field(default_factory=dict)
    routes: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    extra_heights: dict[str, int] = field(default_factory=dict)


def saved_graph(design: Design, info: ObjectInfo) -> dict[str, Any]:
    """The design as a saved graph. Raises KeyError when the layout leaves a node out or a link has no way in."""
    return _Writer(design, info).write()


class _Writer:
    def __init__(self, design: Design, info: ObjectInfo):
        self.design, self.info = design, info
        self.inside = {name: key for key, graph in design.subgraphs.items() for name in graph.box.names()}
        placed = {*self.inside, *design.box.names()}
        if left_out := {*design.nodes, *design.subgraphs} - placed:
            raise KeyError(f"{design.name}: the layout leaves out {sorted(left_out)}")
        self.numbers = self._number()

    def _number(self) -> dict[str, int]:
        """A node keeps its number from the template where it is free."""
        numbers: dict[str, int] = {}
        wanted = {name: name.rpartition(":")[2] for name in [*self.design.nodes, *self.design.subgraphs]}
        for name, tail in wanted.items():
            if tail.isdigit() and int(tail) not in numbers.values():
                numbers[name] = int(tail)
        following = max(numbers.values(), default=0)
        for name in wanted:
            if name not in numbers:
                following += 1
                numbers[name] = following
        return numbers

    def identity(self, *parts: str) -> str:
        """A stable id, so that an unchanged design gives an unchanged file."""
        return str(uuid.uuid5(_NAMESPACE, "/".join((self.design.name, *parts))))

    def write(self) -> dict[str, Any]:
        level = _Level(self, list(self.design.box.names()), None)
        placement = place(self.design.box, level.sizes())
        nodes, links = level.write(placement)
        reroutes, extensions = level.reroutes(placement)
        definitions = [self._definition(key, graph) for key, graph in self.design.subgraphs.items()]
        last_link = max([link[0] for link in links] + [link["id"] for d in definitions for link in d["links"]])
        return {
            "id": self.identity(),
            "revision": 0,
            "last_node_id": max(self.numbers.values()),
            "last_link_id": last_link,
            "nodes": nodes,
            "links": links,
            "groups": _groups(placement),
            "definitions": {"subgraphs": definitions},
            "config": {},
            "extra": {"workflowRendererVersion": "LG", "reroutes": reroutes, "linkExtensions": extensions},
            "version": 0.4,
        }

    def _definition(self, key: str, graph: Subgraph) -> dict[str, Any]:
        level = _Level(self, list(graph.box.names()), key)
        placement = place(graph.box, level.sizes())
        nodes, links = level.write(placement)
        as_objects = [
            dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
            for link in links
        ]
        left, top, right, bottom = _bounds(placement)
        middle = (top + bottom) // 2 if graph.level is None else graph.level
        entries = [*graph.inputs, *(widget.label for widget in graph.widgets)]
        high_in, high_out = 20 * len(entries) + 40, 20 * len(graph.outputs) + 40
        return {
            "id": self.identity(key),
            "version": 1,
            "state": {
                "lastGroupId": len(placement.groups),
                "lastNodeId": max(self.numbers.values()),
                "lastLinkId": max((link[0] for link in links), default=0),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": graph.title,
            "inputNode": {"id": _INPUT, "bounding": [left - 300, middle - high_in // 2, 160, high_in]},
            "outputNode": {"id": _OUTPUT, "bounding": [right + 140, middle - high_out // 2, 160, high_out]},
            "inputs": [
                {
                    "id": self.identity(key, "in", label),
                    "name": label,
                    "type": level.input_type(label),
                    "linkIds": level.ids_from_input(number),
                }
                for number, label in enumerate(entries)
            ],
            "outputs": [
                {
                    "id": self.identity(key, "out", label),
                    "name": label,
                    "type": self.output_type(source),
                    "linkIds": level.ids_to_output(number),
                }
                for number, (label, source) in enumerate(graph.outputs.items())
            ],
            "widgets": [],
            "nodes": nodes,
            "groups": _groups(placement),
            "links": as_objects,
            "extra": {"workflowRendererVersion": "LG"},
        }

    def output_type(self, source: Source) -> str:
        """The type of a node's output; one that passes its input on has that input's type."""
        node = self.design.nodes[source[0]]
        kind = self.info[node.type]["output"][source[1]]
        if kind != _MATCH:
            return kind
        templates = self.info[node.type].get("output_matchtypes", None)
        for name, specification in inputs_of(self.info[node.type]):
            if specification[0] == _MATCH and name in node.links:
                template = options_of(specification)["template"]["template_id"]
                if templates is None or templates[source[1]] == template:
                    return self.output_type(node.links[name])
        return "*"


class _Level:
    """The nodes and links of the root graph, or of one subgraph."""

    def __init__(self, writer: _Writer, names: list[str], key: str | None):
        self.writer, self.names, self.key = writer, names, key
        self.graph = writer.design.subgraphs[key] if key else None
        self.inputs: dict[str, list[dict[str, Any]]] = {}
        self.links: list[list[Any]] = []
        for name in names:
            self._connect(name)
        if self.graph:
            for slot, source in enumerate(self.graph.outputs.values()):
                self._link(self._origin(source), (_OUTPUT, slot), writer.output_type(source))

    def _connect(self, name: str) -> None:
        if name in self.writer.design.subgraphs:
            self.inputs[name] = self._host_inputs(name)
        else:
            self.inputs[name] = self._node_inputs(name)

    def _link(self, origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
        number = len(self.links) + 1
        self.links.append([number, *origin, *target, kind])
        return number

    def _origin(self, source: Source) -> tuple[int, int]:
        """Where, on this level, the output comes from."""
        writer = self.writer
        home = writer.inside.get(source[0])
        if home == self.key:
            return writer.numbers[source[0]], source[1]
        if self.graph is not None:
            return _INPUT, list(self.graph.inputs.values()).index(source)
        if home is None:
            raise KeyError(f"{writer.design.name}: {source} is not in the layout")
        return writer.numbers[home], list(writer.design.subgraphs[home].outputs.values()).index(source)

    def _host_inputs(self, key: str) -> list[dict[str, Any]]:
        graph, writer = self.writer.design.subgraphs[key], self.writer
        entries = []
        for slot, (label, source) in enumerate(graph.inputs.items()):
            kind = writer.output_type(source)
            link = self._link(self._origin(source), (writer.numbers[key], slot), kind)
            widget = {"widget": {"name": label}} if self._fed_widget(graph, source) else {}
            entries.append({"name": label, "type": kind, **widget, "link": link})
        for exposed in graph.widgets:
            kind = self._widget_type(*exposed.targets[0])
            entries.append({"name": exposed.label, "type": kind, "widget": {"name": exposed.label}, "link": None})
        return entries

    def _fed_widget(self, graph: Subgraph, source: Source) -> tuple[str, str] | None:
        """The (node, widget) inside that an input sets, when it ends in a widget: its host then has one too."""
        for name in graph.box.names():
            for entry, found in self.writer.design.nodes[name].links.items():
                if found == source and not _has(
                    [e for e in self._sockets(self.writer.design.nodes[name]) if "widget" not in e], entry
                ):
                    return name, entry
        return None

    def _widget_type(self, name: str, widget: str) -> str:
        node = self.writer.design.nodes[name]
        description = self.writer.info[node.type]
        for found, specification in walk(description, lambda widget_name, _: node.values[widget_name]):
            if found == widget and specification is not None:
                return "COMBO" if isinstance(specification[0], list) else specification[0]
        raise KeyError(f"{node.type} has no widget {widget}")

    def _exposed(self, name: str, widget: str) -> int | None:
        """The slot of the subgraph's input that sets this widget."""
        if self.graph is None:
            return None
        for number, exposed in enumerate(self.graph.widgets):
            if (name, widget) in exposed.targets:
                return len(self.graph.inputs) + number
        return None

    def _node_inputs(self, name: str) -> list[dict[str, Any]]:
        node = self.writer.design.nodes[name]
        if node.type in NOTES:
            return []
        entries = [entry for entry in self._sockets(node) if "widget" not in entry]
        for widget in dict.fromkeys([*node.values, *node.links]):
            if _has(entries, widget):
                continue
            if widget in node.links or self._exposed(name, widget) is not None:
                entries.append({"name": widget, "type": self._widget_type(name, widget), "widget": {"name": widget}})
        for slot, entry in enumerate(entries):
            target = self.writer.numbers[name], slot
            exposed = self._exposed(name, entry["name"]) if "widget" in entry else None
            entry["link"] = None
            if exposed is not None:
                entry["link"] = self._link((_INPUT, exposed), target, entry["type"])
            elif entry["name"] in node.links:
                source = node.links[entry["name"]]
                kind = self.writer.output_type(source)
                entry["type"] = kind if entry["type"] in (_MATCH, "*") else entry["type"]
                entry["link"] = self._link(self._origin(source), target, kind)
        return entries

    def _sockets(self, node: Node) -> list[dict[str, Any]]:
        """A node's sockets as its template has them, or as its class describes them."""
        if node.sockets is not None:
            kept = ("name", "type", "shape", "label", "widget")
            return [{key: entry[key] for key in kept if key in entry} for entry in node.sockets]
        description = self.writer.info[node.type]
        optional = description["input"].get("optional", {})
        return [
            {"name": name, "type": specification[0]} | ({"shape": 7} if name in optional else {})
            for name, specification in inputs_of(description)
            if not is_widget(specification)
        ]

    def input_type(self, label: str) -> str:
        graph = self.graph
        if label in graph.inputs:
            return self.writer.output_type(graph.inputs[label])
        exposed = next(widget for widget in graph.widgets if widget.label == label)
        return self._widget_type(*exposed.targets[0])

    def ids_from_input(self, slot: int) -> list[int]:
        return [link[0] for link in self.links if (link[1], link[2]) == (_INPUT, slot)]

    def ids_to_output(self, slot: int) -> list[int]:
        return [link[0] for link in self.links if (link[3], link[4]) == (_OUTPUT, slot)]

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {name: self._size(name) for name in self.names}

    def _size(self, name: str) -> tuple[int, int]:
        """Width and height, with the room that the node needs once it has run."""
        design, info = self.writer.design, self.writer.info
        extra = design.extra_heights.get(name, 0)
        rows = len([entry for entry in self.inputs[name] if "widget" not in entry]), len(self._outputs(name))
        if name in design.subgraphs:
            graph = design.subgraphs[name]
            shown = [(exposed.label, *exposed.targets[0]) for exposed in graph.widgets]
            widgets = [(label, design.nodes[node], widget) for label, node, widget in shown]
            return host_size(graph.title, rows, widgets, info, extra)
        return node_size(design.nodes[name], rows, info, extra + self._room(name))

    def _room(self, name: str) -> int:
        node = self.writer.design.nodes.get(name)
        return ROOM.get(node.type, 0) if node else 0

    def _outputs(self, name: str) -> list[tuple[str, str]]:
        design, info = self.writer.design, self.writer.info
        if name in design.subgraphs:
            return [
                (label, self.writer.output_type(source)) for label, source in design.subgraphs[name].outputs.items()
            ]
        node = design.nodes[name]
        if node.type in NOTES:
            return []
        names = info[node.type]["output_name"]
        return [(label, self.writer.output_type((name, slot))) for slot, label in enumerate(names)]

    def write(self, placement: Placement) -> tuple[list[dict[str, Any]], list[list[Any]]]:
        order = {name: number for number, name in enumerate(self._sorted())}
        nodes = []
        for name in self.names:
            number = self.writer.numbers[name]
            width, height = placement.sizes[name]
            entry = {
                "id": number,
                "type": self._type(name),
                "pos": list(placement.positions[name]),
                "size": [width, height - self._room(name)],
                "flags": {},
                "order": order[name],
                "mode": self.writer.design.nodes[name].mode if name in self.writer.design.nodes else ALWAYS,
                "inputs": self.inputs[name],
                "outputs": [
                    {
                        "name": label,
                        "type": kind,
                        "links": [link[0] for link in self.links if (link[1], link[2]) == (number, slot)] or None,
                    }
                    for slot, (label, kind) in enumerate(self._outputs(name))
                ],
                **self._look(name),
            }
            nodes.append(entry)
        return nodes, self.links

    def reroutes(self, placement: Placement) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The bends of the links that are led around nodes, and which bend each link comes from last."""
        bends: list[dict[str, Any]] = []
        extensions = []
        for (name, entry), ways in self.writer.design.routes.items():
            if name not in self.inputs:
                continue
            link = next(found["link"] for found in self.inputs[name] if found["name"] == entry)
            parent = None
            for x, y in (point for way in ways for point in _bend(placement, way)):
                number = len(bends) + 1
                follows = {} if parent is None else {"parentId": parent}
                bends.append({"id": number, **follows, "pos": [x, y], "linkIds": [link]})
                parent = number
            extensions.append({"id": link, "parentId": parent})
        return bends, extensions

    def _type(self, name: str) -> str:
        design = self.writer.design
        return self.writer.identity(name) if name in design.subgraphs else design.nodes[name].type

    def _look(self, name: str) -> dict[str, Any]:
        """Title, properties, widget values and colors."""
        design = self.writer.design
        if name in design.subgraphs:
            graph = design.subgraphs[name]
            fed = [self._fed_widget(graph, source) for source in graph.inputs.values()]
            targets = [*filter(None, fed), *(exposed.targets[0] for exposed in graph.widgets)]
            values = [design.nodes[node].values[widget] for node, widget in targets]
            return {"title": graph.title, "properties": {}, "widgets_values": values}
        node = design.nodes[name]
        title = {"title": node.title} if node.title else {}
        if node.type in NOTES:
            return {
                **title,
                "properties": {},
                "widgets_values": list(node.values.values()),
                "color": "#432",
                "bgcolor": "#000",
            }
        saved = node.look.get("properties", {})
        properties = {"Node name for S&R": node.type} | {key: saved[key] for key in _KEPT_PROPERTIES if key in saved}
        colors = {key: node.look[key] for key in ("color", "bgcolor") if key in node.look}
        return {
            **title,
            "properties": properties,
            "widgets_values": list_values(self.writer.info[node.type], node.values),
            **colors,
        }

    def _sorted(self) -> list[str]:
        """The nodes so that each comes after what it is linked to."""
        names = {self.writer.numbers[name]: name for name in self.names}
        before = {
            name: [names[link[1]] for link in self.links if link[3] == number and link[1] in names]
            for number, name in names.items()
        }
        done: dict[str, None] = {}

        def visit(name: str) -> None:
            if name not in done:
                for earlier in before[name]:
                    visit(earlier)
                done[name] = None

        for name in self.names:
            visit(name)
        return list(done)


def _bend(placement: Placement, way: str) -> list[tuple[int, int]]:
    """Two points, before and behind some nodes, below all of them for "under A B" and above for "over A B".

    "before A B" is the first of the two below, alone; "near A B" is closer to the nodes, "past A B" on their right.
    "around A B" is below, and comes up further to the right.
    """
    side, *names = way.split()
    corners = [(*placement.positions[name], *placement.sizes[name]) for name in names]
    left, right = min(x for x, *_ in corners), max(x + width for x, _, width, _ in corners)
    level = min(y for _, y, *_ in corners) - 92 if side == "over" else max(y + high for _, y, _, high in corners) + 20
    first = {"near": left - 14, "past": right + 40}.get(side, left - 80)
    return (
        [(first, level)]
        if side in ("before", "near", "past")
        else [(first, level), (right + (200 if side == "around" else 60), level)]
    )


def _has(entries: list[dict[str, Any]], name: str) -> bool:
    return any(entry["name"] == name for entry in entries)


def _groups(placement: Placement) -> list[dict[str, Any]]:
    return [
        {"id": number, "title": title, "bounding": list(bounding), "color": color, "font_size": 24, "flags": {}}
        for number, (title, bounding, color) in enumerate(placement.groups, 1)
    ]


def _bounds(placement: Placement) -> tuple[int, int, int, int]:
    xs, ys = zip(*placement.positions.values(), strict=True)
    right = max(x + placement.sizes[name][0] for name, (x, _) in placement.positions.items())
    bottom = max(y + placement.sizes[name][1] for name, (_, y) in placement.positions.items())
    return min(xs), min(ys) - 30, right, bottom
