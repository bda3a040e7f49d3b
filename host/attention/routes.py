"""Gives attention calls that pass no transformer_options those of the model call they are in, so that overrides see them."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

# Modules that call attention without transformer_options, which is how core's override passes them by.
BYPASSING_MODULES = (
    "comfy.ldm.wan.model_multitalk",
    "comfy.ldm.wan.model_animate",
    "comfy.ldm.wan.model_wandancer",
    "comfy.ldm.wan.ar_model",
)
# The transformer_options of the model call this thread is in.
_OPTIONS: ContextVar[dict[str, Any] | None] = ContextVar("lowbit_attention_options", default=None)


class Routes:
    """Gives the attention function of the bypassing modules the current transformer_options while a model call runs.

    options: of the model call opened last, in whichever thread: what a compiled model reads, since tracing breaks off
    at a context variable. Clones on other GPUs, the only models that run at once, have the same override.
    """

    def __init__(self) -> None:
        self.options: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._users = 0
        self._originals: dict[str, Callable[..., torch.Tensor]] = {}

    @contextlib.contextmanager
    def open(self, options: dict[str, Any] | None) -> Iterator[None]:
        """For the length of one model call in this thread."""
        token = _OPTIONS.set(options)
        with self._lock:
            outer, self.options = self.options, options
            self._users += 1
            for name in BYPASSING_MODULES:
                module: Any = sys.modules.get(name)
                if hasattr(module, "optimized_attention") and name not in self._originals:
                    self._originals[name] = module.optimized_attention
                    module.optimized_attention = _with_options(module.optimized_attention)
        try:
            yield
        finally:
            _OPTIONS.reset(token)
            with self._lock:
                self._users -= 1
                self.options = outer if self._users else None
                if not self._users:
                    for name, original in self._originals.items():
                        setattr(sys.modules[name], "optimized_attention", original)  # noqa: B010
                    self._originals.clear()


ROUTES = Routes()


@functools.cache
def _with_options(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """One function per original, so that a compiled model finds the same one at every model call."""

    def optimized_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        options = ROUTES.options if torch.compiler.is_compiling() else _OPTIONS.get()
        if options is not None:
            kwargs.setdefault("transformer_options", options)
        return original(*args, **kwargs)

    return optimized_attention
