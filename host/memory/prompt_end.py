"""Tells when a prompt is over: core tells its cache providers, of which this makes one that caches nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...versions import find

register = find("comfy_execution.cache_provider.register_cache_provider")
unregister = find("comfy_execution.cache_provider.unregister_cache_provider")


class _PromptEnd:
    """Calls once, at the end of the running prompt, and is gone. Its methods are those of core's `CacheProvider`."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    async def on_lookup(self, context: Any) -> None:
        """Nothing is cached here."""

    async def on_store(self, context: Any, value: Any) -> None:
        """Nothing is cached here."""

    def should_cache(self, context: Any, value: Any = None) -> bool:
        """Whether core should ask at all."""
        return False

    def on_prompt_start(self, prompt_id: str) -> None:
        """Only ends matter."""

    def on_prompt_end(self, prompt_id: str) -> None:
        """Of every prompt, one that failed or was interrupted included."""
        unregister(self)
        self._call()


def at_prompt_end(call: Callable[[], None]) -> bool:
    """Call `call` when the running prompt ends, however it ends; False where this ComfyUI does not say when."""
    if register is None or unregister is None:
        return False
    register(_PromptEnd(call))
    return True
