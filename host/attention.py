"""Puts the attention dispatcher on a model: the override that core calls, and how it is installed on a clone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as core_attention
import torch
from comfy.patcher_extension import WrappersMP

from ..attention.backends import by_name
from ..attention.dispatch import Dispatcher
from ..attention.environment import Environment, detect
from ..attention.plan import AUTO, Policy
from ..attention.planning import check_named
from ..attention.report import as_text
from ..attention.schedule import Schedule
from ..attention.timing_cache import TimingCache
from . import attention_compiled
from .attention_hooks import KEY, SamplingHooks

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
# Layout of quantized weights, by the beginning of its name -> the backend of the same precision.
PAIRS = (("TensorCoreNVFP4", "sageattn_3_fp4"), ("TensorCoreFP8", "sageattn_3_fp8"))

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
        self._chooser = previous if _only_chooses(previous) else None
        self._wrapped = None if self._chooser is not None else previous
        self._handle = attention_compiled.register(self)

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
        if not 3 <= count <= len(POSITIONAL) or not kwargs.keys() <= KEYWORDS:
            return self._core(func, args, kwargs, False)
        get = kwargs.get
        heads = args[3] if count > 3 else get("heads")
        mask = args[4] if count > 4 else get("mask")
        precision = args[5] if count > 5 else get("attn_precision")
        skip_reshape = args[6] if count > 6 else get("skip_reshape", False)
        heads_first = args[7] if count > 7 else get("skip_output_reshape", False)
        options = get("transformer_options")
        block = options.get("block_index") if options else None
        exact = (
            self.exact_model_call
            or get("low_precision_attention", True) is False
            or precision is torch.float32
            or (bool(self.schedule.blocks) and self.schedule.exact_block(block))
        )
        qkv = split_heads(args[0], args[1], args[2], heads, skip_reshape, get("enable_gqa", False)) if heads else None
        if qkv is None:
            return self._core(func, args, kwargs, False)
        if torch.compiler.is_compiling():
            return attention_compiled.attention(*qkv, mask, self._handle, get("scale"), exact, bool(heads_first))
        return self.dispatcher.run(
            *qkv,
            mask,
            get("scale"),
            exact,
            lambda drop_mask: self._core(func, args, kwargs, drop_mask),
            heads_first,
        )

    def _core(self, func: Attention, args: tuple, kwargs: dict[str, Any], drop_mask: bool) -> torch.Tensor:
        """Core's own attention, or the kernel chosen on the model before, on the arguments as they came."""
        if drop_mask:
            if len(args) > 4:
                args = (*args[:4], None, *args[5:])
            else:
                kwargs = {**kwargs, "mask": None}
        return func(*args, **kwargs) if self._chooser is None else self._chooser(func, *args, **kwargs)

    def run_compiled(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        exact: bool,
        heads_first: bool,
    ) -> torch.Tensor:
        """The call of a compiled model: the same dispatcher, with core's default as the last resort."""

        def core(drop_mask: bool) -> torch.Tensor:
            args = (q, k, v, q.shape[1], None if drop_mask else mask)
            kwargs: dict[str, Any] = {
                "skip_reshape": True,
                "skip_output_reshape": heads_first,
                "_inside_attn_wrapper": True,
            }
            kwargs |= {} if scale is None else {"scale": scale}
            kwargs |= {} if k.shape[1] == q.shape[1] else {"enable_gqa": True}
            return self._core(core_attention.optimized_attention, args, kwargs, False)

        return self.dispatcher.run(q, k, v, mask, scale, exact, core, heads_first)

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

    skip_reshape: the inputs have that shape already; otherwise they are (batch, length, heads * head_dim).
    """
    if skip_reshape:
        if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[1] != heads:
            return None
        return (q, k, v) if enable_gqa or k.shape[1] == heads else None
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        return None
    width = q.shape[2]
    head_dim = width // heads
    kv_heads = k.shape[2] // head_dim if enable_gqa else heads
    if width != heads * head_dim or k.shape[2] != kv_heads * head_dim or v.shape[2] != k.shape[2]:
        return None
    return (
        _heads_in_front(q, heads, head_dim),
        _heads_in_front(k, kv_heads, head_dim),
        _heads_in_front(v, kv_heads, head_dim),
    )


def _heads_in_front(x: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """(batch, length, heads * head_dim) as (batch, heads, length, head_dim); one view, half the price of two."""
    if torch.compiler.is_compiling():  # as_strided of a slice loses its storage offset in inductor
        return x.unflatten(-1, (heads, head_dim)).transpose(1, 2)
    batch, length, _ = x.shape
    strides = x.stride()
    if strides[2] != 1:
        return x.reshape(batch, length, heads, head_dim).transpose(1, 2)
    return x.as_strided((batch, heads, length, head_dim), (strides[0], head_dim, strides[1], 1))


def _only_chooses(override: Attention | None) -> bool:
    """Whether an override is core's own choice of a kernel (set_model_optimized_attention), which calls no function given."""
    return getattr(override, "__qualname__", "") == _CORE_CHOOSER


def paired_backend(model: torch.nn.Module, environment: Environment) -> str | None:
    """The backend of the precision most of the model's quantized weights have, None where there is none that runs here."""
    elements = dict.fromkeys((backend for _, backend in PAIRS), 0)
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        layout = getattr(weight, "_layout_cls", None)
        for prefix, backend in PAIRS:
            if isinstance(layout, str) and layout.startswith(prefix):
                elements[backend] += math.prod(weight.shape)
    backend = max(elements, key=elements.__getitem__)
    if not elements[backend]:
        return None
    return backend if by_name()[backend].why_not_here(environment) is None else None


def find(model: Any) -> AttentionOverride | None:
    """The override a node of this pack has put on a model, also under patches that came later; None without one."""
    wrappers = model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    return wrappers[-1].__self__.override if wrappers else None


def install(
    model: Any, policy: Policy, schedule: Schedule, pair_with_weights: bool, timings_folder: Path | None
) -> tuple[Any, str | None]:
    """A clone of the model whose attention goes through the dispatcher, and a remark for the user or None.

    An override of this pack that is on the model already is replaced, any other one kept (see AttentionOverride).
    Raises CapabilityError when the policy names a backend that cannot run here and says stop.
    """
    environment = detect(model.load_device)
    remark = check_named(policy, environment)
    if remark is not None:
        log.warning(remark)
    if pair_with_weights and policy.backend == AUTO and policy.budget != "exact":
        paired = paired_backend(model.model, environment)
        policy = Policy(policy.backend, policy.budget, policy.stop, paired)
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    previous = options.get(OVERRIDE)
    if isinstance(previous, AttentionOverride):
        previous = previous.previous
    override = AttentionOverride(Dispatcher(policy, TimingCache(timings_folder)), schedule, previous)
    override.device = model.load_device
    options[OVERRIDE] = override
    hooks = SamplingHooks(override)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, hooks.outer_sample),
        (WrappersMP.SAMPLER_SAMPLE, hooks.sampler_sample),
        (WrappersMP.PREDICT_NOISE, hooks.predict_noise),
        (WrappersMP.DIFFUSION_MODEL, hooks.diffusion_model),
    ):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    if remark is not None:
        override.dispatcher.report.note(remark)
    return clone, remark
