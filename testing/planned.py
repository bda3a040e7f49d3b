"""Plans a model of ComfyUI's that lies in no file, and builds it with the weights that the plan makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lowbit.ops.checkpoint import Checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.header import TensorEntry
from lowbit.ops.keep_rules import QUANTIZE, Rule
from lowbit.ops.plan import QuantizationPlan, make_plan
from lowbit.ops.quantize import quantize_weight

from .tiny.architectures import DiffusionModel


def plan_of(
    model: torch.nn.Module,
    format_name: str,
    rules: Sequence[Rule] | None = None,
    pinned: Mapping[str, str] | None = None,
) -> QuantizationPlan:
    """What the loaders would plan for a file of `model`, which may be on the meta device.

    Args:
        model: one of ComfyUI's diffusion models.
        format_name: a weight format.
        rules: instead of the family's.
        pinned: as `make_plan` takes it; None for those that the model has as other modules than Linears.
    """
    checkpoint, found = checkpoint_of(model)
    return make_plan(checkpoint, FORMATS[format_name], rules, pinned=found if pinned is None else pinned)


def checkpoint_of(model: torch.nn.Module) -> tuple[Checkpoint, dict[str, str]]:
    """A file of `model`, as far as its header goes, and the layers in it that are no Linears of the model."""
    from lowbit.host.weights.core_build import no_linears

    tensors = model.state_dict()
    path = Path("model.safetensors")
    entries = {name: TensorEntry.of(name, tensor) for name, tensor in tensors.items()}
    layers = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    return Checkpoint(path, (path,), entries, {}, ()), no_linears(dict(model.named_modules()), layers)


def with_plan(of: DiffusionModel, weights: Mapping[str, torch.Tensor], plan: QuantizationPlan) -> torch.nn.Module:
    """The tiny model with `weights` as `plan` stores them, multiplied by the pack."""
    import comfy.ops

    from lowbit.host.weights.operations import adopt_quantized_linears

    stored = dict(weights)
    for layer in plan.layers.values():
        if layer.action == QUANTIZE:
            row = FORMATS[layer.weight_format]
            weight = stored.pop(f"{layer.name}.weight")
            parts = quantize_weight(weight, layer.storage, unit_scale=row.unit_scale, fast=row.fast)
            stored |= {f"{layer.name}.{suffix}": part for suffix, part in parts.items()}
    model = of.small(comfy.ops.mixed_precision_ops({}, torch.float32))
    model.load_state_dict(stored, strict=False)
    adopt_quantized_linears(model)
    return model
