"""Which widgets a node has, in the order in which a saved graph lists their values: read off /object_info."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

ObjectInfo = Mapping[str, Mapping[str, Any]]
Specification = list[Any]

_WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR"})
_DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
_UPLOADS = ("image_upload", "video_upload", "file_upload")
CONTROL = "control_after_generate"
FRONTEND_ONLY = frozenset({CONTROL, "upload", "audioUI", "preview"})
"""Last parts of the names of widgets that a saved graph has and a prompt has not."""


def inputs_of(description: Mapping[str, Any]) -> Iterator[tuple[str, Specification]]:
    """(name, specification) of a node's inputs, required ones first, as its description orders them."""
    for kind in ("required", "optional"):
        entries = description["input"].get(kind, {})
        for name in description.get("input_order", {}).get(kind, entries):
            yield name, entries[name]


def options_of(specification: Specification) -> Mapping[str, Any]:
    """The options beside an input's type."""
    return specification[1] if len(specification) > 1 else {}


def is_widget(specification: Specification) -> bool:
    """Whether the frontend draws a widget for this input."""
    kind = specification[0]
    if options_of(specification).get("forceInput"):
        return False
    return isinstance(kind, list) or kind in _WIDGET_TYPES or kind == _DYNAMIC_COMBO


def default_of(specification: Specification) -> Any:
    """What the widget shows on a new node."""
    options = options_of(specification)
    if "default" in options:
        return options["default"]
    choices = specification[0] if isinstance(specification[0], list) else options.get("options")
    if choices:
        first = choices[0]
        return first["key"] if isinstance(first, Mapping) else first
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(specification[0], "")


def walk(
    inputs: Iterable[tuple[str, Specification]], choose: Callable[[str], Any], prefix: str = ""
) -> Iterator[tuple[str, Specification | None]]:
    """(name, specification) of every widget in saved order; a widget of the frontend's own has no specification.

    `choose(name)` is asked for the value of a dynamic combo, which decides what widgets follow it.
    """
    for short, specification in inputs:
        if not is_widget(specification):
            continue
        name, options = prefix + short, options_of(specification)
        yield name, specification
        if specification[0] == _DYNAMIC_COMBO:
            chosen = choose(name)
            nested = next((option for option in options["options"] if option["key"] == chosen), None)
            if nested is not None:
                yield from walk(inputs_of({"input": nested["inputs"]}), choose, f"{name}.")
        # The frontend goes by the whole name: a dynamic combo's seed has no control unless it asks for one.
        if options.get(CONTROL) or (specification[0] == "INT" and name in ("seed", "noise_seed")):
            yield f"{prefix}{CONTROL}", None
        if options.get("audio_upload"):
            yield "audioUI", None
            yield "upload", None
        elif any(options.get(upload) for upload in _UPLOADS) and not options.get("widgetType"):
            yield "upload", None


def read_values(description: Mapping[str, Any], values: list[Any]) -> dict[str, Any]:
    """Names the values of a saved node; those of widgets that it was saved without are their defaults."""
    left, named, missing = iter(values), {}, object()
    for name, specification in walk(inputs_of(description), named.get):
        value = next(left, missing)
        if value is missing and specification is None:
            continue
        named[name] = default_of(specification) if value is missing and specification else value
    return named
