"""Streaming of weights, seen from outside: parts of a running model released, transfers that were cut short forgotten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy_aimdo.model_vbar

from ...versions import find

_PARAMETERS = ("weight", "bias")


def release_pages(patcher: Any, nbytes: int) -> int:
    """Free pages of a running model's weights; returns the bytes. Those layers stream from then on.

    Not by core's `partially_unload`: where the pages are fewer than asked for, which is the rule after the driver has
    refused memory, it also takes the parameters away that core moves as a whole and whose layers cannot stream.
    """
    pages = patcher._vbar_get()
    return 0 if pages is None else int(pages.free_memory(nbytes))


@contextlib.contextmanager
def only_what_can_stream(patcher: Any) -> Iterator[None]:
    """For the length of a legacy patcher's unload: layers that do not cast their weights for each call are left alone.

    Core moves them too, which is right for a model that is loaded again before its next call, and not for a running one.
    """
    held = [
        module
        for module in patcher.model.modules()
        if getattr(module, "comfy_patched_weights", False) and not hasattr(module, "comfy_cast_weights")
    ]
    for module in held:
        module.comfy_patched_weights = False
    try:
        yield
    finally:
        for module in held:
            module.comfy_patched_weights = True


def forget_transfers(patcher: Any) -> None:
    """Forget what a call that ran out of memory left half done, so that the next one transfers each weight anew.

    A layer takes a transfer that was begun for it for a finished one. By then other layers have been through the same
    buffer, or its page lacks the LoRA that was to be applied, and the picture is wrong without an error.
    """
    if not patcher.is_dynamic():
        return
    for module in patcher.model.modules():
        begun = vars(module).pop("_prefetch", None)
        if begun is not None and begun["signature"] is not None:
            _unpin(module._v)
        if getattr(module, "_v_signature", None) is not None:
            module._v_signature = None
        for name in _PARAMETERS:
            patch = getattr(module, f"{name}_lowvram_function", None)
            if patch is not None:
                patch.clear_prepared()


def _unpin(page: Any) -> None:
    """Free a page to be moved; one that is free already is an error to comfy-aimdo from 0.6 on."""
    with contextlib.suppress(RuntimeError):
        comfy_aimdo.model_vbar.vbar_unpin(page)


def forget_leftovers(patcher: Any) -> None:
    """`forget_transfers` if there is a transfer that was begun and not used, as there never is between two calls."""
    if patcher.is_dynamic() and any("_prefetch" in vars(module) for module in patcher.model.modules()):
        forget_transfers(patcher)


def forget_queues() -> None:
    """Forget what was fetched ahead for layers that did not get their turn."""
    forget = find("comfy.model_prefetch.cleanup_prefetch_queues")
    if forget is not None:
        forget()
