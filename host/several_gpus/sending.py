"""What of a run can go to other GPUs, and what keeps it on one: never a different picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from . import plain_data
from .forward import OVERRIDE
from .split_families import CoreFamily, family_of

_PACK = __name__.split(".host.")[0]
_LOOKS_ON = ("comfy.", "comfy_extras.", _PACK + ".")
"""Where code comes from that every process has, and wrappers and callbacks that leave it alone, so that they work at the first."""

_IN_FORWARD = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
_OWN_FORWARD = ("forward", "_forward", "forward_orig")
_SAMPLING_OBJECTS = frozenset({"model_sampling"})
"""Object patches that are outside the diffusion model."""

STAY_HERE = frozenset(
    {
        "callbacks",
        "context_window",
        "easycache",
        "patches",
        "prefetch_dynamic_vbars",
        "uuids",
        "wrappers",
        OVERRIDE,
    }
)
"""Transformer options that the other processes have of their own, or that only what is around the forward reads."""


class NotSentError(Exception):
    """Something cannot be sent; the message names it."""


def check_model(patcher: Any, options: Mapping[str, Any]) -> CoreFamily:
    """The model's row, where nothing on the model is bound to this process.

    Args:
        patcher: the model as it is about to sample.
        options: the run's model options.

    Raises:
        NotSentError: names what is.
    """
    network = patcher.model.diffusion_model
    family = family_of(network)
    if family is None:
        raise NotSentError(
            f"a model of the kind {type(network).__name__}, of which only Wan and Qwen-Image can be split"
        )
    found = next(_bound(patcher, options, network), None)
    if found is not None:
        raise NotSentError(found)
    return family


def call_inputs(family: CoreFamily, named: Mapping[str, Any]) -> dict[str, Any]:
    """A forward's inputs without the transformer options. Raises NotSentError for one that the row does not name."""
    inputs = {name: value for name, value in named.items() if value is not None and name != "transformer_options"}
    unknown = [name for name in inputs if name not in family.call]
    if unknown:
        raise NotSentError(f"the model's input {unknown[0]}")
    return inputs


def call_options(options: Mapping[str, Any], patches: Mapping[str, list[Any]]) -> dict[str, Any]:
    """What of a call's transformer options goes with it.

    Args:
        options: the call's.
        patches: those that the workers have; others would be from a conditioning.

    Raises:
        NotSentError: there are patches that the workers do not have.
    """
    replaced = [name for name, entries in options.get("patches_replace", {}).items() if entries]
    if replaced:
        raise NotSentError(f"the patch that replaces {replaced[0]} blocks")
    present = {name: listed for name, listed in options.get("patches", {}).items() if listed}
    if present != {name: listed for name, listed in patches.items() if listed}:
        raise NotSentError(f"the patches of a conditioning ({', '.join(present)})")
    return {name: value for name, value in options.items() if name not in STAY_HERE}


def encoded(call: Any) -> tuple[Any, list[torch.Tensor]]:
    """The call as plain data and tensors. Raises NotSentError for what is neither."""
    try:
        return plain_data.take_apart(call)
    except plain_data.NotPlainError as error:
        raise NotSentError(str(error)) from None


def _bound(patcher: Any, options: Mapping[str, Any], network: Any) -> Iterator[str]:
    """What of the model or the run only this process has, by name."""
    yield from (f"the object patch on {name}" for name in patcher.object_patches if name not in _SAMPLING_OBJECTS)
    yield from (f"the weight wrapper on {name}" for name in patcher.weight_wrapper_patches)
    yield from (f"the injection {name}" for name, listed in patcher.injections.items() if listed)
    yield from (f"the additional model {name}" for name, listed in patcher.additional_models.items() if listed)
    if patcher.hook_patches or patcher.forced_hooks:
        yield "a LoRA that a conditioning switches on"
    yield from _foreign_code(network)
    wrapper = options.get("model_function_wrapper")
    if wrapper is not None and not _looks_on(wrapper):
        yield f"the model function wrapper {full_name(wrapper)}"
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    for listed in (entries for kind in _IN_FORWARD for entries in wrappers.get(kind, {}).values()):
        yield from (f"the wrapper {full_name(wrapper)}" for wrapper in listed if not _looks_on(wrapper))
    for listed in (entries for kind in patcher.callbacks.values() for entries in kind.values()):
        yield from (f"the callback {full_name(callback)}" for callback in listed if not _looks_on(callback))


def _foreign_code(network: torch.nn.Module) -> Iterator[str]:
    """What another node put around a layer, or in the place of one or of its class's code: a worker has none of it."""
    for name, module in network.named_modules():
        place = name or "the model"
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            yield f"the hook {full_name(hook)} on {place}"
        for method in _OWN_FORWARD:
            code = getattr(module, method, None)
            # `functools.wraps` gives a function the name of another, but not its globals.
            source = getattr(getattr(code, "__func__", code), "__globals__", {}).get("__name__", full_name(code))
            if code is not None and not f"{source}.".startswith((*_LOOKS_ON, "torch.")):
                yield f"the {method} of {place}, which is from {source},"


def full_name(thing: Any) -> str:
    """Full name of a function, or of an object's class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _looks_on(thing: Any) -> bool:
    return full_name(getattr(thing, "func", thing)).startswith(_LOOKS_ON)
