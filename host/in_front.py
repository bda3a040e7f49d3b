"""Puts this pack's code in front of core's: classes, wrappers, and what core is told of free memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def class_in_front(core_class: type, mixin: type) -> type:
    """Core's class with `mixin` in front; one for each class, kept on it, so that both go together."""
    if issubclass(core_class, mixin):
        return core_class
    name = f"_lowbit_{mixin.__name__}"
    made = core_class.__dict__.get(name)
    if made is None:
        made = type(core_class.__name__, (mixin, core_class), {"__module__": core_class.__module__})
        setattr(core_class, name, made)
    return made


def set_wrappers(patcher: Any, key: str, wrappers: Mapping[str, Callable[..., Any]]) -> None:
    """Have a patcher call `wrappers`, by kind, in the place of those that a node further up the chain has put there."""
    for kind, wrapper in wrappers.items():
        patcher.remove_wrappers_with_key(kind, key)
        patcher.add_wrapper_with_key(kind, key, wrapper)


@contextlib.contextmanager
def seeing_free_memory(patcher: Any, times: int) -> Iterator[None]:
    """For the length of a call core sees so many times the free memory for a patcher's model, unless somebody answers already."""
    if "get_free_memory" in vars(patcher):
        yield
        return
    patcher.get_free_memory = lambda device: times * type(patcher).get_free_memory(patcher, device)
    try:
        yield
    finally:
        del patcher.get_free_memory
