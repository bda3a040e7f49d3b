"""A saved graph taken apart: subgraphs unfolded, links resolved to (node, output), widget values named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .widgets import FRONTEND_ONLY, ObjectInfo, read_values

Source = tuple[str, int]
Saved = Mapping[str, Any]

NOTES = frozenset({"MarkdownNote", "Note"})
ALWAYS, NEVER, BYPASS = 0, 2, 4
_INPUT, _OUTPUT = -10, -20


class UnknownNodeError(KeyError):
    """The graph has a node that the server does not know."""


@dataclass
class Node:
    """One node of a flat graph.

    Attributes:
        type: class name.
        title: its title, None for the class's own.
        values: widget name -> value, with the frontend's own widgets.
        links: input name -> the node and output it is linked to.
    """

    type: str
    title: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, Source] = field(default_factory=dict)


Flat = dict[str, Node]


@dataclass
class _Link:
    origin: int
    origin_slot: int
    target: int
    target_slot: int


class _Scope:
    """One level of nesting: the graph's own nodes and links, or a subgraph's, with what its host feeds into it."""

    def __init__(self, graph: Saved, definitions: Mapping[str, Saved], prefix: str, host: _Host | None):
        self.graph, self.definitions, self.prefix, self.host = graph, definitions, prefix, host
        self.nodes: dict[int, dict[str, Any]] = {node["id"]: node for node in graph["nodes"]}
        self.links = dict(map(_read_link, graph.get("links", [])))
        self.inner: dict[int, _Scope] = {}
        for number, node in self.nodes.items():
            definition = definitions.get(node["type"])
            if definition is not None:
                host_of_inner = _Host(self, node, definition)
                self.inner[number] = _Scope(definition, definitions, f"{prefix}{number}:", host_of_inner)

    def resolve(self, link_id: int | None) -> Source | _Value | None:
        """What a link brings: a node's output, a host's widget value, or nothing."""
        link = self.links.get(link_id) if link_id is not None else None
        if link is None:
            return None
        if link.origin == _INPUT:
            return self.host.feeds(link.origin_slot) if self.host else None
        return self._output(link.origin, link.origin_slot)

    def _output(self, number: int, slot: int) -> Source | _Value | None:
        node = self.nodes[number]
        mode = node.get("mode", ALWAYS)
        if mode == NEVER:
            return None
        if mode == BYPASS:
            return self._bypassed(node, slot)
        if node["type"] == "Reroute":
            return self.resolve(node["inputs"][0].get("link"))
        if node["type"] == "PrimitiveNode":
            return _Value(node["widgets_values"][0])
        if number in self.inner:
            inner = self.inner[number]
            into = [key for key, link in inner.links.items() if (link.target, link.target_slot) == (_OUTPUT, slot)]
            return inner.resolve(into[0]) if into else None
        return f"{self.prefix}{number}", slot

    def _bypassed(self, node: dict[str, Any], slot: int) -> Source | _Value | None:
        """A bypassed node hands on its input of the same place, or the first one, of the output's type."""
        kind = node["outputs"][slot]["type"]
        inputs = node.get("inputs", [])
        same_place = inputs[slot : slot + 1]
        for entry in [*same_place, *inputs]:
            if entry["type"] == kind:
                return self.resolve(entry.get("link"))
        return None


@dataclass(frozen=True)
class _Value:
    """A widget value that comes through a link: from a subgraph's host or a primitive."""

    value: Any


class _Host:
    """A subgraph node: what its inputs are linked to, and the values its own widgets have."""

    def __init__(self, scope: _Scope, node: dict[str, Any], definition: Saved):
        self.scope, self.node, self.definition = scope, node, definition
        self.own_values = _promoted_values(node, definition)

    def feeds(self, slot: int) -> Source | _Value | None:
        """What comes in through the subgraph's input `slot`."""
        name = self.definition["inputs"][slot]["name"]
        for entry in self.node.get("inputs", []):
            if entry["name"] == name and entry.get("link") is not None:
                return self.scope.resolve(entry["link"])
        return self.own_values.get(name)


def _promoted_values(node: Mapping[str, Any], definition: Saved) -> dict[str, _Value]:
    """A subgraph node's own values, listed in the order of the inputs that end in a widget.

    Without any, the values of the nodes inside hold.
    """
    values = node.get("widgets_values") or []
    nodes = {inner["id"]: inner for inner in definition["nodes"]}
    links = dict(map(_read_link, definition.get("links", [])))
    named, left = {}, iter(values)
    for entry in definition["inputs"]:
        targets = [links[key] for key in entry.get("linkIds", []) if key in links]
        if any(_feeds_widget(nodes, link) for link in targets):
            try:
                named[entry["name"]] = _Value(next(left))
            except StopIteration:
                break
    return named


def _feeds_widget(nodes: Mapping[int, Mapping[str, Any]], link: _Link) -> bool:
    node = nodes.get(link.target)
    return node is not None and "widget" in node["inputs"][link.target_slot]


def _read_link(link: Any) -> tuple[int, _Link]:
    if isinstance(link, Mapping):
        return link["id"], _Link(link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"])
    return link[0], _Link(*link[1:5])


def unfold(saved: Saved, info: ObjectInfo) -> Flat:
    """The graph without subgraphs, notes, reroutes, muted and bypassed nodes.

    A node inside subgraph node 7 is called "7:3", as in the frontend's own prompts.
    Raises UnknownNodeError when `info` lacks a class.
    """
    definitions = {entry["id"]: entry for entry in saved.get("definitions", {}).get("subgraphs", [])}
    return dict(_nodes(_Scope(saved, definitions, "", None), info))


def _nodes(scope: _Scope, info: ObjectInfo) -> Iterator[tuple[str, Node]]:
    for number, node in scope.nodes.items():
        if node.get("mode", ALWAYS) in (NEVER, BYPASS) or node["type"] in NOTES | {"Reroute", "PrimitiveNode"}:
            continue
        if number in scope.inner:
            yield from _nodes(scope.inner[number], info)
            continue
        yield f"{scope.prefix}{number}", _read_node(scope, node, info)


def _read_node(scope: _Scope, saved: dict[str, Any], info: ObjectInfo) -> Node:
    if saved["type"] not in info:
        raise UnknownNodeError(f"{saved['type']} (node {scope.prefix}{saved['id']})")
    node = Node(saved["type"], saved.get("title"))
    values = saved.get("widgets_values") or []
    node.values = dict(values) if isinstance(values, Mapping) else read_values(info[saved["type"]], values)
    for entry in saved.get("inputs", []):
        source = scope.resolve(entry.get("link"))
        if isinstance(source, _Value):
            node.values[entry["name"]] = source.value
        elif source is not None:
            node.links[entry["name"]] = source
    return node


def api_form(flat: Mapping[str, Node]) -> dict[str, dict[str, Any]]:
    """The prompt that ComfyUI's server takes: class, inputs (a value, or [node, output]) and title of each node."""
    prompt = {}
    for key, node in flat.items():
        inputs = {name: value for name, value in node.values.items() if not _frontend_only(name)}
        inputs |= {name: list(source) for name, source in node.links.items()}
        prompt[key] = {"class_type": node.type, "inputs": inputs, "_meta": {"title": node.title or node.type}}
    return prompt


def _frontend_only(name: str) -> bool:
    return name.rpartition(".")[2] in FRONTEND_ONLY
