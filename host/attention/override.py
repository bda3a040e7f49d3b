"""The override that core calls for every attention of a patched model: hands the call to the dispatcher, or back to core."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as core_attention
import torch

from ...attention.backends import CORE
from ...attention.candidates import AttentionInputs
from ...attention.dispatch import Dispatcher
from ...attention.report import as_text
from ...attention.schedule import Schedule
from . import compiled

log = logging.getLogger("lowbit.attention")

OVERRIDE = "optimized_attention_override"
# What core's attention functions take, in order, and by name. A call with anything else goes to core as it is.
POSITIONAL = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
KEYWORDS = frozenset(
    {
        *POSITIONAL[3:],
        "transformer_options",
        "scale",
        "enable_gqa",
        "low_precision_attention",
        "_inside_attn_wrapper",
    }
)
_CORE_CHOOSER = "ModelPatcher.set_model_optimized_attention.<locals>.optimized_attention_override"
# Core's attention functions that do what SDPA does in 16 bits: the rest (sage, INT8, other packs') is held to the budget.
EXACT_NAMES = ("basic", "sub_quad", "split", "pytorch", "xformers", "flash")
_EXACT = [function for name in EXACT_NAMES if (function := getattr(core_attention, f"attention_{name}", None))]
EXACT_FUNCTIONS = frozenset((*_EXACT, *(inspect.unwrap(function) for function in _EXACT)))
UNKNOWN_ARGUMENTS = "arguments that core's attention does not have"
UNKNOWN_SHAPES = "shapes that are not those of attention"

Attention = Callable[..., torch.Tensor]


class AttentionOverride:
    """What core calls instead of its attention function, for one patched model and its clones.

    previous: an override that was on the model before. Core's own choice of a kernel becomes the last resort; any other
    is taken to change what attention computes, so it stays in front and gets this dispatcher as its function.
    """

    def __init__(self, dispatcher: Dispatcher, schedule: Schedule, previous: Attention | None):
        self.dispatcher = dispatcher
        self.schedule = schedule
        self.previous = previous
        self.device: torch.device | None = None
        self.exact_model_call = False
        self._chosen = chosen_kernel(previous)
        self._chooser = previous if self._chosen is not None else None
        self._wrapped = None if self._chooser is not None else previous
        self._handle = compiled.register(self)

    def __deepcopy__(self, memo: dict) -> AttentionOverride:
        """Clones for other GPUs share the counts and what was struck off."""
        return self

    def __call__(self, func: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Core's protocol: func is the attention function core would call, args and kwargs its arguments."""
        if self._wrapped is None:
            return self._attend(func, args, kwargs)

        def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
            return self._attend(func, args, kwargs)

        return self._wrapped(attend, *args, **kwargs)

    def _attend(self, func: Attention, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        count = len(args)
        get = kwargs.get
        precision = args[5] if count > 5 else get("attn_precision")
        exact = get("low_precision_attention", True) is False or precision is torch.float32
        options = get("transformer_options")
        block = options.get("block_index") if options and self.schedule.blocks else None
        if not 3 <= count <= len(POSITIONAL) or not kwargs.keys() <= KEYWORDS:
            return self._unhandled(func, args, kwargs, exact, block, UNKNOWN_ARGUMENTS)
        heads = args[3] if count > 3 else get("heads")
        mask = args[4] if count > 4 else get("mask")
        skip_reshape = args[6] if count > 6 else get("skip_reshape", False)
        heads_first = args[7] if count > 7 else get("skip_output_reshape", False)
        qkv = split_heads(args[0], args[1], args[2], heads, skip_reshape, get("enable_gqa", False)) if heads else None
        if qkv is None:
            return self._unhandled(func, args, kwargs, exact, block, UNKNOWN_SHAPES)
        if torch.compiler.is_compiling():
            return compiled.attention(
                *qkv, mask, self._handle, get("scale"), exact, precision, block, bool(heads_first)
            )
        return self._dispatch(func, args, kwargs, qkv, mask, self._exact(exact, block), bool(heads_first))

    def _exact(self, exact: bool, block: int | None) -> bool:
        """Whether a call is exact by its own arguments, or by the schedule at this step and block."""
        return exact or self.exact_model_call or (block is not None and self.schedule.exact_block(block))

    def _dispatch(
        self,
        func: Attention,
        args: tuple,
        kwargs: dict[str, Any],
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        exact: bool,
        heads_first: bool,
    ) -> torch.Tensor:
        """The dispatcher's pick, with core's attention on the arguments as they came for the last resort."""
        kernel = self._chosen or func
        core_exact = None if kernel in EXACT_FUNCTIONS else lambda drop_mask: _core_exact(args, kwargs, drop_mask)
        inputs = AttentionInputs(
            *qkv,
            mask,
            kwargs.get("scale"),
            exact,
            lambda drop_mask: self._core(func, args, kwargs, drop_mask),
            heads_first,
            core_exact,
            getattr(kernel, "__name__", CORE),
        )
        return self.dispatcher.run(inputs)

    def _unhandled(
        self, func: Attention, args: tuple, kwargs: dict[str, Any], exact: bool, block: int | None, reason: str
    ) -> torch.Tensor:
        """A call the dispatcher cannot take goes to core as it came: to its exact kernel when it must be exact."""
        if not torch.compiler.is_compiling():  # counting would compile the model anew at every count
            self.dispatcher.report.hand_on(reason)
        if (self._chosen or func) not in EXACT_FUNCTIONS and self._exact(exact, block):
            return _core_exact(args, kwargs, False)
        return self._core(func, args, kwargs, False)

    def _core(self, func: Attention, args: tuple, kwargs: dict[str, Any], drop_mask: bool) -> torch.Tensor:
        """Core's own attention, or the kernel chosen on the model before, on the arguments as they came."""
        args, kwargs = _without_mask(args, kwargs) if drop_mask else (args, kwargs)
        return func(*args, **kwargs) if self._chooser is None else self._chooser(func, *args, **kwargs)

    def run_compiled(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, told: compiled.Told
    ) -> torch.Tensor:
        """The call of a compiled model: the same dispatcher, with core's default as the last resort.

        The schedule is asked here, at run time: a model compiled block by block would else be compiled for each block.
        """
        exact = self._exact(told.exact, told.block)
        args = (q, k, v, q.shape[1], mask, told.precision, True, told.heads_first)
        kwargs: dict[str, Any] = {"_inside_attn_wrapper": True}
        kwargs |= {"low_precision_attention": False} if exact else {}
        kwargs |= {} if told.scale is None else {"scale": told.scale}
        kwargs |= {} if k.shape[1] == q.shape[1] else {"enable_gqa": True}
        return self._dispatch(
            core_attention.optimized_attention, args, kwargs, (q, k, v), mask, exact, told.heads_first
        )

    def say_unreached(self, model_options: dict[str, Any]) -> None:
        """After a sampling run without a single call: who keeps the calls from this node."""
        current = model_options.get("transformer_options", {}).get(OVERRIDE)
        if current is not None and current is not self:
            text = f"{_name(current)}, put on the model after this node, takes every attention call: this node does nothing."
        elif self._wrapped is not None:
            text = (
                f"{_name(self._wrapped)}, on the model before this node, takes every attention call and passes none on: "
                "this node does nothing. Take one of the two out."
            )
        else:
            return
        self.dispatcher.report.note(text)
        log.warning(text)

    def report(self) -> dict[str, Any]:
        """What the dispatcher has counted, as plain data."""
        return self.dispatcher.report.as_dict(self.dispatcher.settings(self.device or torch.device("cpu")))

    def text(self) -> str:
        """The same for people."""
        return as_text(self.report())


def split_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, skip_reshape: bool, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Views shaped (batch, heads, length, head_dim), or None where the shapes are not what core's functions take.

    skip_reshape: the inputs have that shape already; otherwise they are (batch, length, heads * head_dim), or k and v
    (batch, length, heads, head_dim), as Wan-Animate passes them.
    """
    if skip_reshape:
        if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[1] != heads:
            return None
        return (q, k, v) if enable_gqa or k.shape[1] == heads else None
    if q.ndim != 3 or k.ndim != v.ndim:
        return None
    width = q.shape[2]
    head_dim = width // heads
    if width != heads * head_dim:
        return None
    if k.ndim == 4:
        if k.shape[3] != head_dim or v.shape[2:] != k.shape[2:] or not (enable_gqa or k.shape[2] == heads):
            return None
        return _heads_in_front(q, heads, head_dim), k.transpose(1, 2), v.transpose(1, 2)
    kv_heads = k.shape[2] // head_dim if enable_gqa else heads
    if k.ndim != 3 or k.shape[2] != kv_heads * head_dim or v.shape[2] != k.shape[2]:
        return None
    return (
        _heads_in_front(q, heads, head_dim),
        _heads_in_front(k, kv_heads, head_dim),
        _heads_in_front(v, kv_heads, head_dim),
    )


def _heads_in_front(x: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """(batch, length, heads * head_dim) as (batch, heads, length, head_dim); one view, half the price of two."""
    if torch.compiler.is_compiling():  # inductor reads as_strided of a slice from the start of its memory
        return x.unflatten(-1, (heads, head_dim)).transpose(1, 2)
    batch, length, _ = x.shape
    strides = x.stride()
    if strides[2] != 1:
        return x.reshape(batch, length, heads, head_dim).transpose(1, 2)
    return x.as_strided((batch, heads, length, head_dim), (strides[0], head_dim, strides[1], 1))


def _without_mask(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of core's attention with no mask."""
    return ((*args[:4], None, *args[5:]), kwargs) if len(args) > 4 else (args, {**kwargs, "mask": None})


def _core_exact(args: tuple, kwargs: dict[str, Any], drop_mask: bool) -> torch.Tensor:
    """Core's attention_pytorch, whatever kernel core would pick."""
    args, kwargs = _without_mask(args, kwargs) if drop_mask else (args, kwargs)
    return core_attention.attention_pytorch(*args, **(kwargs | {"_inside_attn_wrapper": True}))


def chosen_kernel(override: Attention | None) -> Attention | None:
    """The kernel of core's own choice (set_model_optimized_attention), which calls no function given; else None."""
    if override is None or getattr(override, "__qualname__", "") != _CORE_CHOOSER:
        return None
    return inspect.getclosurevars(override).nonlocals["optimized_attention"]


def _name(override: Any) -> str:
    """What to call another pack's override."""
    function = override if hasattr(override, "__qualname__") else type(override)
    return f"{getattr(function, '__module__', '?')}.{function.__qualname__}"
