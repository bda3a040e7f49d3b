"""What a model call moves on besides its output, put back before the call is made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def restorer(options: dict[str, Any] | None) -> Callable[[], None]:
    """A function that puts back what a call of the model uses up; take it before the call.

    A forward of autoregressive Wan moves the ends of its key and value caches on, in place: made twice, it would see
    its own frames as earlier ones.

    Args:
        options: the transformer options of the call.
    """
    state = (options or {}).get("ar_state") or {}
    caches = [cache for name in ("kv_caches", "crossattn_caches") for cache in state.get(name) or ()]
    before = [(cache, dict(cache)) for cache in caches if isinstance(cache, dict)]

    def restore() -> None:
        for cache, entries in before:
            cache.clear()
            cache.update(entries)

    return restore
