"""What a model call moves on besides its output, put back before the call is made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_STATES = ("ar_state", "easycache")
"""Keys of the transformer options with what core moves on from call to call: autoregressive Wan's and EasyCache's."""


def restorer(options: dict[str, Any] | None) -> Callable[[], None]:
    """A function that puts back what a call of the model uses up; take it before the call.

    A forward of autoregressive Wan moves the ends of its key and value caches on, in place: made twice, it would see
    its own frames as earlier ones. EasyCache compares with the call before: with itself it finds no difference, and
    skips the step.

    Args:
        options: the transformer options of the call.
    """
    states = [(options or {}).get(name) for name in _STATES]
    # An object's attributes are a dictionary too.
    before = [(held, held.copy()) for state in states for held in _containers(getattr(state, "__dict__", state))]

    def restore() -> None:
        for held, entries in before:
            held.clear()
            if isinstance(held, dict):
                held.update(entries)
            else:
                held.extend(entries)

    return restore


def _containers(value: Any) -> Iterator[Any]:
    """A dictionary or list and those in it; their tensors are not copied."""
    if isinstance(value, (dict, list)):
        yield value
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _containers(inside)
