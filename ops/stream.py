"""Streams a checkpoint through the quantizer into a new file: one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path

import torch

from .checkpoint import Checkpoint, buffer_nbytes, decoded
from .finite import first_not_finite
from .formats import FORMATS
from .header import TensorEntry
from .keep_rules import QUANTIZE
from .multiplied_out import multiplied_out
from .overlap import read_ahead
from .plan import QuantizationPlan
from .quantize import core_config_tensor, not_finite, quantize_weight
from .stored import with_speed
from .stored_scales import as_numbers
from .writer import CheckpointWriter, check_free_space, names_nbytes

logger = logging.getLogger("lowbit.ops")

QUANTIZER_VERSION = 2
"""Raised whenever the same input gives other bytes, so that cached files are made anew."""

METADATA_KEY = "lowbit"
"""Header entry that says, as JSON, how a file was made."""

RECIPE_KEY = "lowbit_recipe"
"""Header entry of cached files alone: which source, format and rules they are of (see ops/cache.py)."""

_OF_ONE_FILE = frozenset({"_quantization_metadata", "quantization_config", RECIPE_KEY, METADATA_KEY})

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all and the tensor just done; may raise to cancel."""

_SUFFIX_BYTES = len(".weight_s_channel")
_PARTS = 6


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

    Peak host memory over the idle process is about twice the largest tensor (in float32 where it is decoded on the CPU) plus
    some 100 MiB. Where another device quantizes, tensors are read into its memory and written out of it; it holds one that
    is read, and those that are written, beside the one it works on.

    Args:
        checkpoint: the source.
        plan: what `make_plan` decided for it.
        target: the file to write; the folder is made.
        device: where weights are quantized.
        progress: see `Progress`.
        metadata: further entries for the header.

    Raises:
        CheckpointError: the source is damaged, holds NaN or Inf (the tensor is named), or changed after it was opened.
        StorageError: the target cannot be written, the disk is too small, or the file reads back differently.
    """
    checkpoint.check_unchanged()
    check_free_space(target.parent, plan.nbytes_after, f"The quantized {checkpoint.path.name}")
    header = {**carried_metadata(checkpoint.metadata), **(metadata or {})}
    header[METADATA_KEY] = json.dumps(_origin(checkpoint, plan))
    report = _Report(max(checkpoint.nbytes, 1), progress)
    device = torch.device(device)
    writer = CheckpointWriter(
        target,
        name_bytes=_PARTS * (names_nbytes(checkpoint.entries) + len(checkpoint.entries) * _SUFFIX_BYTES),
        name_count=_PARTS * len(checkpoint.entries),
        metadata=header,
        behind=_overlaps(device),
    )
    with writer, contextlib.closing(_tensors(checkpoint, plan, device)) as tensors:
        for name in checkpoint.entries.keys() & plan.stored.dropped:
            report.written(checkpoint.entries[name])
        for name, take in tensors:
            entry = checkpoint.entries[name]
            _write_entry(writer, checkpoint, entry, take, plan)
            report.written(entry)
        _write_configs(writer, plan)
        # What was read of another state of the file must not get a name.
        checkpoint.check_unchanged()


def _overlaps(device: torch.device) -> bool:
    """Whether reading and writing leave the device alone that quantizes."""
    return device.type != "cpu"


def _tensors(
    checkpoint: Checkpoint, plan: QuantizationPlan, device: torch.device
) -> Generator[tuple[str, Callable[[], torch.Tensor]], None, None]:
    """Every tensor's name, and what reads it: what is to be quantized to the device that does it."""

    def read(name: str) -> torch.Tensor:
        return checkpoint.read_stored(name, device if _is_quantized(plan, name) else "cpu")

    names = [name for name in checkpoint.entries if name not in plan.stored.dropped]
    if _overlaps(device):
        return read_ahead(names, lambda name: buffer_nbytes(checkpoint.entries[name]), read)
    return ((name, partial(read, name)) for name in names)


def _is_quantized(plan: QuantizationPlan, name: str) -> bool:
    """Whether a tensor is a weight that the plan quantizes."""
    layer, _, suffix = name.rpartition(".")
    return suffix == "weight" and layer in plan.layers and plan.layers[layer].action == QUANTIZE


class _Report:
    """Progress over the source's bytes."""

    def __init__(self, nbytes: int, progress: Progress | None) -> None:
        self._total, self._done = nbytes, 0
        self._progress = progress

    def written(self, entry: TensorEntry) -> None:
        self._done += entry.nbytes
        if self._progress is not None:
            self._progress(self._done, self._total, entry.name)


def carried_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The text entries that a new file takes over from the one it is made of: all but what is true of that one alone."""
    return {key: value for key, value in metadata.items() if key not in _OF_ONE_FILE}


def read_origin(metadata: Mapping[str, str]) -> dict[str, object] | None:
    """How Lowbit made a file (format, rules, source, version), or None when it did not."""
    try:
        origin = json.loads(metadata.get(METADATA_KEY, ""))
    except ValueError:
        return None
    return origin if isinstance(origin, dict) else None


def _origin(checkpoint: Checkpoint, plan: QuantizationPlan) -> dict[str, object]:
    return {
        "format": plan.format_name if plan.weight_format else "none",
        "quantizer_version": QUANTIZER_VERSION,
        "source": checkpoint.path.name.encode("utf-8", "replace").decode(),
        "family": plan.family.name,
        "kept": {layer.name: layer.reason for layer in plan.layers.values() if layer.action == "keep"},
    }


def _write_entry(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    entry: TensorEntry,
    take: Callable[[], torch.Tensor],
    plan: QuantizationPlan,
) -> None:
    if _is_quantized(plan, entry.name):
        _write_quantized(writer, take, entry, _called(checkpoint, entry.name), plan)
        return
    layer_name, _, suffix = entry.name.rpartition(".")
    tensor = decoded(entry, take()).to(entry.dtype)
    stored = plan.stored.layers.get(layer_name)
    numbers = as_numbers(suffix, tensor, stored.core_format if stored is not None else None)
    if first_not_finite([(entry.name, numbers)]) is not None:
        raise not_finite(_called(checkpoint, entry.name))
    target = plan.stored.scale_targets.get(entry.name)
    scaled = plan.stored.scaled_weights.get(entry.name)
    if scaled is not None:
        tensor = multiplied_out(entry.name, tensor, checkpoint.read(scaled.scale_name), scaled.config)
    writer.add(*((entry.name, tensor) if target is None else (target.name, target.convert(tensor))))


def _write_quantized(
    writer: CheckpointWriter,
    take: Callable[[], torch.Tensor],
    entry: TensorEntry,
    called: str,
    plan: QuantizationPlan,
) -> None:
    layer = plan.layers[entry.name.removesuffix(".weight")]
    row = FORMATS[layer.weight_format]
    weight = decoded(entry, take())
    parts = quantize_weight(weight, layer.storage, unit_scale=row.unit_scale, fast=row.fast, name=called)
    del weight
    for suffix in list(parts):
        writer.add(f"{layer.name}.{suffix}", parts.pop(suffix))


def _called(checkpoint: Checkpoint, name: str) -> str:
    """What an error calls a tensor."""
    return f"{checkpoint.path.name}: {name}"


def _write_configs(writer: CheckpointWriter, plan: QuantizationPlan) -> None:
    for name, layer in plan.stored.layers.items():
        if layer.unit_scale:
            writer.add(f"{name}.weight_scale", torch.ones((), dtype=torch.float32))
        writer.add(f"{name}.comfy_quant", core_config_tensor(with_speed(layer.config, plan.stored_fast)))
