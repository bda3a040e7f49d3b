"""What the attention node does around a sampling run: a fresh start, the schedule, text masks, audio attention, a last check."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from comfy_execution.utils import get_executing_context

from ..attention.checks import is_finite

if TYPE_CHECKING:
    from .attention import AttentionOverride

log = logging.getLogger("lowbit.attention")

KEY = "lowbit_attention"
# Models that build an attention mask from a text mask in every block -> the argument of their forward that holds it.
TEXT_MASKS = {"QwenImageTransformer2DModel": "attention_mask"}
# Modules that call attention without transformer_options, which is how core's override passes them by.
BYPASSING_MODULES = ("comfy.ldm.wan.model_multitalk", "comfy.ldm.wan.model_animate")
# The transformer_options of the model call this thread is in.
_OPTIONS: ContextVar[dict[str, Any] | None] = ContextVar("lowbit_attention_options", default=None)


class _Routes:
    """Gives the attention function of the bypassing modules the current transformer_options while a model call runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._originals: dict[str, Callable[..., torch.Tensor]] = {}

    @contextlib.contextmanager
    def open(self, options: dict[str, Any] | None) -> Iterator[None]:
        """For the length of one model call in this thread."""
        token = _OPTIONS.set(options)
        with self._lock:
            self._users += 1
            for name in BYPASSING_MODULES:
                module: Any = sys.modules.get(name)
                if module is not None and name not in self._originals:
                    self._originals[name] = module.optimized_attention
                    module.optimized_attention = _with_options(module.optimized_attention)
        try:
            yield
        finally:
            _OPTIONS.reset(token)
            with self._lock:
                self._users -= 1
                if not self._users:
                    for name, original in self._originals.items():
                        setattr(sys.modules[name], "optimized_attention", original)  # noqa: B010
                    self._originals.clear()


def _with_options(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def optimized_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        options = _OPTIONS.get()
        if options is not None:
            kwargs.setdefault("transformer_options", options)
        return original(*args, **kwargs)

    return optimized_attention


_ROUTES = _Routes()


class SamplingHooks:
    """The wrappers of one override; ComfyUI calls them around its own functions."""

    def __init__(self, override: AttentionOverride):
        self.override = override
        self._prompt: str | None = None
        self._sigmas: list[float] = []
        self._trivial_text_masks: set[Any] = set()
        self._check_outputs = True

    def outer_sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One sampling run: counts start anew with each prompt, and no tensor outlives the run."""
        dispatcher = self.override.dispatcher
        context = get_executing_context()
        if context is not None and context.prompt_id != self._prompt:
            self._prompt = context.prompt_id
            dispatcher.report.clear()
        dispatcher.begin_run()
        self._check_outputs = True
        try:
            return executor(*args, **kwargs)
        finally:
            dispatcher.end_run()
            self._trivial_text_masks.clear()
            self._sigmas = []
            self.override.exact_model_call = False

    def sampler_sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Once a run: which conditionings have a text mask that masks nothing, and the run's sigmas."""
        guider, sigmas = args[0], args[1]
        for conds in getattr(guider, "conds", {}).values():
            for cond in conds or ():
                if _text_mask_masks_nothing(cond):
                    self._trivial_text_masks.add(cond.get("uuid"))
        if self.override.schedule.needs_sigma:
            self._sigmas = [float(sigma) for sigma in sigmas.tolist()]
        return executor(*args, **kwargs)

    def predict_noise(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Once a model call with a schedule: whether it is an exact one. Reads the sigma, which waits for the GPU."""
        if self.override.schedule.needs_sigma:
            sigma = float(args[1].max())
            self.override.exact_model_call = self.override.schedule.exact_at(sigma, self._sigmas)
        return executor(*args, **kwargs)

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward of the model: drops an idle text mask, routes the audio attention, and looks at the result.

        A result with NaN or Inf in it that lossy backends had a part in is thrown away: they are struck off and the
        forward is done again. The look waits for the GPU once a forward.
        """
        names = _parameters(getattr(executor.original, "__func__", executor.original))
        options = _argument(names, args, kwargs, "transformer_options")
        arguments = self._without_idle_text_mask(executor.class_obj, names, list(args), kwargs, options)
        dispatcher = self.override.dispatcher
        dispatcher.masks.new_model_call()
        with _ROUTES.open(options):
            before = dispatcher.lossy_calls
            out = executor(*arguments, **kwargs)
            if dispatcher.lossy_calls == before or not self._check_outputs or _finite(out):
                return out
            barred = dispatcher.bar_lossy("the model's output had NaN or Inf in it")
            log.warning("The model's output was not finite; doing the step again without %s.", ", ".join(barred))
            dispatcher.report.model_calls_repeated += 1
            out = executor(*arguments, **kwargs)
            if not _finite(out):
                dispatcher.unbar(barred)
                self._check_outputs = False
                dispatcher.report.note(
                    "The model's output is not finite with exact attention either: the cause lies elsewhere."
                )
            return out

    def _without_idle_text_mask(
        self, model: Any, names: tuple[str, ...], args: list[Any], kwargs: dict[str, Any], options: dict | None
    ) -> list[Any]:
        """The arguments with the text mask replaced by None, when every conditioning in the batch has an idle one."""
        name = TEXT_MASKS.get(type(model).__name__)
        uuids = options.get("uuids") if options else None
        if name is None or not uuids or not self._trivial_text_masks.issuperset(uuids):
            return args
        if _argument(names, args, kwargs, name) is None:
            return args
        self.override.dispatcher.report.masks_dropped += 1
        if name in kwargs:
            kwargs[name] = None
            return args
        index = names.index(name)
        return [*args[:index], None, *args[index + 1 :]]


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a function's parameters, without self."""
    names = tuple(inspect.signature(function).parameters)
    return names[1:] if names[:1] == ("self",) else names


def _argument(names: tuple[str, ...], args: Any, kwargs: dict[str, Any], name: str) -> Any:
    """The argument `name` of a call, by keyword or by position; None when it is not there."""
    if name in kwargs:
        return kwargs[name]
    index = names.index(name) if name in names else len(args)
    return args[index] if index < len(args) else None


def _text_mask_masks_nothing(cond: dict[str, Any]) -> bool:
    """Whether a conditioning's attention mask keeps every token: ones where it counts, zeros where it is added."""
    mask = getattr(cond.get("model_conds", {}).get("attention_mask"), "cond", None)
    if not isinstance(mask, torch.Tensor) or mask.numel() == 0:
        return False
    return bool((mask == 0).all()) if mask.is_floating_point() else bool((mask == 1).all())


def _finite(out: Any) -> bool:
    if not isinstance(out, torch.Tensor) or (out.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    return is_finite(out)
