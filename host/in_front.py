"""Puts this pack's code in front of core's: classes, functions, wrappers, and what core is told of free memory."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..versions import find

_ROUTED = "_lowbit_routed"


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


def named_alike(core: Callable[..., Any], own: Callable[..., Any]) -> bool:
    """Whether both take the same parameters: another ComfyUI may have more."""
    return list(inspect.signature(core).parameters) == list(inspect.signature(own).parameters)


def route(full_name: str, in_front: Callable[..., Any]) -> None:
    """Put a function in front of core's, in every module of core that has taken it under its name, for all models.

    Where core has none of that name, or one with other parameters, it is left as it is.

    Args:
        full_name: core's function.
        in_front: takes core's function, then what that takes.
    """
    core, name = find(full_name), full_name.rpartition(".")[2]
    if core is None or getattr(core, _ROUTED, False):
        return
    in_front = functools.partial(in_front, core)
    if not named_alike(core, in_front):
        return

    @functools.wraps(core)
    def routed(*args: Any, **kwargs: Any) -> Any:
        return in_front(*args, **kwargs)

    setattr(routed, _ROUTED, True)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("comfy.") and getattr(module, name, None) is core:
            setattr(module, name, routed)


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
