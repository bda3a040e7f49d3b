"""Streams a checkpoint through the quantizer into a new file: one tensor in memory at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .checkpoint import Checkpoint, TensorEntry, read_tensor
from .formats import FORMATS
from .keep_rules import QUANTIZE
from .plan import QuantizationPlan
from .quantize import absolute_maximum, core_config_tensor, quantize_weight
from .stored import with_speed
from .writer import CheckpointWriter, check_free_space

logger = logging.getLogger("lowbit.ops")

QUANTIZER_VERSION = 1
"""Raised whenever the same input gives other bytes, so that cached files are made anew."""

METADATA_KEY = "lowbit"
"""Header entry that says, as JSON, how a file was made."""

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all and the tensor just written; may raise to cancel."""

_SUFFIX_BYTES = len(".weight_s_channel")
_PARTS = 6
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def quantize_checkpoint(
    checkpoint: Checkpoint,
    plan: QuantizationPlan,
    target: Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the file that `plan` describes to `target`; nothing is left there when it fails or is cancelled.

    Peak host memory over the idle process is about twice the largest tensor plus some 100 MiB.

    Args:
        checkpoint: the source.
        plan: what `make_plan` decided for it.
        target: the file to write; the folder is made.
        device: where weights are quantized.
        progress: see `Progress`.
        metadata: further entries for the header.

    Raises:
        CheckpointError: the source is damaged or holds NaN or Inf (the tensor is named).
        StorageError: the target cannot be written, the disk is too small, or the file reads back differently.
    """
    check_free_space(target.parent, plan.nbytes_after, f"The quantized {checkpoint.path.name}")
    header = {key: value for key, value in checkpoint.metadata.items() if key != "_quantization_metadata"}
    header.update(metadata or {})
    header[METADATA_KEY] = json.dumps(_origin(checkpoint, plan))
    names = list(checkpoint.entries)
    writer = CheckpointWriter(
        target,
        name_bytes=_PARTS * sum(len(json.dumps(name)) + _SUFFIX_BYTES for name in names),
        name_count=_PARTS * len(names),
        metadata=header,
    )
    total, done = max(checkpoint.nbytes, 1), 0
    with writer:
        for entry in checkpoint.entries.values():
            _write_entry(writer, entry, plan, torch.device(device))
            done += entry.nbytes
            if progress is not None:
                progress(done, total, entry.name)
        _write_configs(writer, plan)


def read_origin(metadata: Mapping[str, str]) -> dict[str, object] | None:
    """How Lowbit made a file (format, rules, source, version), or None when it did not."""
    try:
        origin = json.loads(metadata.get(METADATA_KEY, ""))
    except ValueError:
        return None
    return origin if isinstance(origin, dict) else None


def _origin(checkpoint: Checkpoint, plan: QuantizationPlan) -> dict[str, object]:
    return {
        "format": plan.weight_format.name if plan.weight_format else "none",
        "quantizer_version": QUANTIZER_VERSION,
        "source": checkpoint.path.name,
        "family": plan.family.name,
        "kept": {layer.name: layer.reason for layer in plan.layers.values() if layer.action == "keep"},
    }


def _write_entry(writer: CheckpointWriter, entry: TensorEntry, plan: QuantizationPlan, device: torch.device) -> None:
    if entry.name in plan.stored.dropped:
        return
    layer_name, _, suffix = entry.name.rpartition(".")
    layer = plan.layers.get(layer_name)
    if layer is not None and layer.action == QUANTIZE and suffix == "weight":
        _write_quantized(writer, entry, plan, device)
        return
    target = plan.stored.scale_targets.get(entry.name)
    tensor = read_tensor(entry)
    if target is not None:
        writer.add(target.name, target.convert(tensor))
        return
    if tensor.dtype in _FLOATS and tensor.numel():
        absolute_maximum(tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1), entry.name)
    writer.add(entry.name, tensor)


def _write_quantized(
    writer: CheckpointWriter, entry: TensorEntry, plan: QuantizationPlan, device: torch.device
) -> None:
    layer = plan.layers[entry.name.removesuffix(".weight")]
    row = FORMATS[layer.weight_format]
    weight = read_tensor(entry).to(device)
    parts = quantize_weight(weight, layer.storage, unit_scale=row.unit_scale, fast=row.fast, name=entry.name)
    del weight
    for suffix in list(parts):
        writer.add(f"{layer.name}.{suffix}", parts.pop(suffix))


def _write_configs(writer: CheckpointWriter, plan: QuantizationPlan) -> None:
    fast = plan.weight_format.fast if plan.weight_format is not None else None
    for name, layer in plan.stored.layers.items():
        if layer.unit_scale:
            writer.add(f"{name}.weight_scale", torch.ones((), dtype=torch.float32))
        writer.add(f"{name}.comfy_quant", core_config_tensor(with_speed(layer.config, fast)))
