"""What the attention node does around a sampling run: a fresh start, the schedule, text masks, audio attention, a last check."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from ...attention.checks import is_finite
from ...attention.schedule import CALLS_AHEAD, StepCounter
from ...versions import find
from ..sampling_state import restorer
from .override import AttentionOverride
from .routes import ROUTES

log = logging.getLogger("lowbit.attention")
get_executing_context = find("comfy_execution.utils.get_executing_context") or (lambda: None)

KEY = "lowbit_attention"
# Models that build an attention mask from a text mask in every block -> the name of that mask among the model's inputs.
TEXT_MASKS = {"QwenImageTransformer2DModel": "attention_mask"}


class AttentionHooks:
    """The wrappers of one override; ComfyUI calls them around its own functions."""

    def __init__(self, override: AttentionOverride):
        self.override = override
        self._prompt: str | None = None
        self._steps = StepCounter(())
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
        before = dispatcher.report.calls
        try:
            out = executor(*args, **kwargs)
        finally:
            dispatcher.end_run()
            self._trivial_text_masks.clear()
            self._steps = StepCounter(())
            self.override.exact_model_call = False
        if dispatcher.report.calls == before:
            self.override.say_unreached(getattr(getattr(executor, "class_obj", None), "model_options", {}))
        return out

    def sampler_sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Once a run: which conditionings have a text mask that masks nothing, and the run's steps."""
        guider, sigmas = args[0], args[1]
        for conds in getattr(guider, "conds", {}).values():
            for cond in conds or ():
                if _text_mask_masks_nothing(cond):
                    self._trivial_text_masks.add(cond.get("uuid"))
        if self.override.schedule.needs_sigma:
            sampler = getattr(executor, "class_obj", None)
            name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
            churns = (getattr(sampler, "extra_options", None) or {}).get("s_churn", 0) > 0
            self._steps = StepCounter(sigmas.tolist(), CALLS_AHEAD.get(name, 0), churns)
            if len(args) > 3:
                args = (*args[:3], self._reporting(args[3]), *args[4:])
        return executor(*args, **kwargs)

    def _reporting(self, callback: Callable[..., Any] | None) -> Callable[..., Any]:
        """The sampler's callback, which also tells the counter of steps."""
        steps = self._steps

        def report(step: int, *args: Any, **kwargs: Any) -> Any:
            steps.reported(step)
            return None if callback is None else callback(step, *args, **kwargs)

        return report

    def predict_noise(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Once a model call with a schedule: whether it is an exact one. Reads the sigma, which waits for the GPU."""
        if self.override.schedule.needs_sigma:
            sigma = float(args[1].max())
            self.override.exact_model_call = self.override.schedule.exact_at(sigma, self._steps)
        return executor(*args, **kwargs)

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward: the options it works on, which say the block, go to the attention calls that pass none.

        A compiled forward is left alone: it uses the options of `apply_model`, and is traced in one piece.
        """
        if torch.compiler.is_compiling():
            return executor(*args, **kwargs)
        with ROUTES.open(_argument(_bound(executor, args, kwargs), "transformer_options")):
            return executor(*args, **kwargs)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One model call, of every kind of model: drops an idle text mask, routes the audio attention, checks the result.

        A result with NaN or Inf in it that lossy backends had a part in is thrown away: they are struck off and the
        call is made again, with what the first one used up put back. The look waits for the GPU once a model call.
        """
        options = _argument(_bound(executor, args, kwargs), "transformer_options")
        self._drop_idle_text_mask(executor.class_obj, kwargs, options)
        again = _bound(executor, args, kwargs)
        if "control" in again.arguments:
            again.arguments["control"] = _copied_lists(again.arguments["control"])
        restore = restorer(options)
        dispatcher = self.override.dispatcher
        dispatcher.begin_model_call()
        with ROUTES.open(options):
            before = dispatcher.lossy_calls
            out = executor(*args, **kwargs)
            if dispatcher.lossy_calls == before or not self._check_outputs or _finite(out):
                return out
            barred = dispatcher.bar_lossy("the model's output had NaN or Inf in it")
            log.warning("The model's output was not finite; doing the step again without %s.", ", ".join(barred))
            dispatcher.report.model_calls_repeated += 1
            restore()
            out = executor(*again.args, **again.kwargs)
            if not _finite(out):
                dispatcher.unbar(barred)
                self._check_outputs = False
                dispatcher.report.note(
                    "The model's output is not finite with exact attention either: the cause lies elsewhere."
                )
            return out

    def _drop_idle_text_mask(self, model: Any, kwargs: dict[str, Any], options: dict[str, Any] | None) -> None:
        """Takes the text mask out of the inputs, when every conditioning in the batch has an idle one."""
        network = getattr(model, "diffusion_model", None)
        name = TEXT_MASKS.get(type(getattr(network, "_orig_mod", network)).__name__)
        uuids = options.get("uuids") if options else None
        if name is None or not uuids or not self._trivial_text_masks.issuperset(uuids) or kwargs.get(name) is None:
            return
        del kwargs[name]
        self.override.dispatcher.report.text_masks_dropped += 1


def _bound(executor: Any, args: Any, kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call by the names of the function that core's executor runs."""
    return inspect.signature(executor.original).bind_partial(*args, **kwargs)


def _argument(bound: inspect.BoundArguments, name: str) -> Any:
    """One of them, whether or not the function names it; None when it is not there."""
    return bound.arguments.get(name, bound.kwargs.get(name))


def _copied_lists(control: Any) -> Any:
    """ControlNet's outputs as they are now: UNet models pop them from their lists as they go."""
    if not isinstance(control, dict):
        return control
    return {name: list(value) if isinstance(value, list) else value for name, value in control.items()}


def _text_mask_masks_nothing(cond: dict[str, Any]) -> bool:
    """Whether a conditioning's attention mask keeps every token: ones where it counts, zeros where it is added."""
    mask = getattr(cond.get("model_conds", {}).get("attention_mask"), "cond", None)
    if not isinstance(mask, torch.Tensor) or mask.numel() == 0:
        return False
    return bool((mask == 0).all()) if mask.is_floating_point() else bool((mask == 1).all())


def _finite(out: Any) -> bool:
    """Whether a model's output, a tensor or a list of them (one a modality), is finite."""
    if isinstance(out, (list, tuple)):
        return all(map(_finite, out))
    if not isinstance(out, torch.Tensor) or (out.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    return is_finite(out)
