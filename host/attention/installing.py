"""Installs the attention dispatcher on a clone of a model, and finds the one that is on a model."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...attention.backends import by_name
from ...attention.candidates import AUTO, Policy
from ...attention.dispatch import Dispatcher
from ...attention.environment import Environment, detect
from ...attention.planning import TIMINGS_FILE, check_named
from ...attention.schedule import Schedule
from ...kernels.measured import MeasuredNumbers
from ..in_front import set_wrappers
from .override import OVERRIDE, AttentionOverride
from .sampling_hooks import KEY, AttentionHooks

log = logging.getLogger("lowbit.attention")

# Layout of quantized weights, by the beginning of its name -> the backends of the same precision.
EIGHT_BITS = ("lowbit_int8_fp8", "lowbit_int8_fp16", "sageattn_3_fp8")
PAIRS = (
    ("TensorCoreNVFP4", ("sageattn_3_fp4",)),
    ("TensorCoreFP8", EIGHT_BITS),
    ("TensorWiseINT8", EIGHT_BITS),
)


def paired_backends(model: torch.nn.Module, environment: Environment) -> tuple[str, ...]:
    """The backends of the precision most of the model's quantized weights have, as far as they run here."""
    elements: dict[tuple[str, ...], int] = {}
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        layout = getattr(weight, "_layout_cls", None)
        for prefix, backends in PAIRS:
            if isinstance(layout, str) and layout.startswith(prefix):
                elements[backends] = elements.get(backends, 0) + math.prod(weight.shape)
    table = by_name()
    most = max(elements, key=elements.__getitem__, default=())
    return tuple(name for name in most if table[name].why_not_here(environment) is None)


def find_override(model: Any) -> AttentionOverride | None:
    """The override a node of this pack has put on a model, also under patches that came later; None without one."""
    wrappers = model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    return wrappers[-1].__self__.override if wrappers else None


def install_override(
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
        paired = paired_backends(model.model, environment)
        policy = replace(policy, paired=paired)
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    previous = options.get(OVERRIDE)
    if isinstance(previous, AttentionOverride):
        previous = previous.previous
    override = AttentionOverride(Dispatcher(policy, MeasuredNumbers(timings_folder, TIMINGS_FILE)), schedule, previous)
    override.device = model.load_device
    options[OVERRIDE] = override
    hooks = AttentionHooks(override)
    wrappers = {
        WrappersMP.OUTER_SAMPLE: hooks.outer_sample,
        WrappersMP.SAMPLER_SAMPLE: hooks.sampler_sample,
        WrappersMP.PREDICT_NOISE: hooks.predict_noise,
        WrappersMP.APPLY_MODEL: hooks.apply_model,
        WrappersMP.DIFFUSION_MODEL: hooks.diffusion_model,
    }
    set_wrappers(clone, KEY, wrappers)
    if remark is not None:
        override.dispatcher.report.note(remark)
    return clone, remark
