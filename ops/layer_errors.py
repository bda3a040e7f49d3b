"""Measures each quantized layer of a file against the original it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .formats import STORAGES
from .plan import find_stored
from .quantize import assemble, storage_name_of
from .stored import ScaleTarget
from .stored_scales import as_numbers

_SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "weight_s_rel", "weight_s_channel", "weight_codebook")


@dataclass(frozen=True)
class LayerError:
    """How far a quantized layer is from its original.

    Attributes:
        layer: its name.
        core_format: core's name of its format.
        relative_error: Frobenius norm of the difference over that of the original.
        sqnr_decibels: the same as a signal-to-noise ratio.
    """

    layer: str
    core_format: str
    relative_error: float
    sqnr_decibels: float


def layer_errors(quantized: Checkpoint, original: Checkpoint) -> Iterator[LayerError]:
    """Compare layer by layer, one in memory at a time.

    Raises:
        CheckpointError: a layer is missing in the original, or has another shape there.
    """
    stored = find_stored(quantized)
    for layer, info in stored.layers.items():
        name = f"{layer}.weight"
        if name not in original.entries:
            raise CheckpointError(f"{original.path.name} has no '{name}': it is not the original of this file.")
        reference = original.read(name).float()
        storage_name = storage_name_of(info.config)
        weight = _dequantized(quantized, layer, storage_name, tuple(reference.shape), dict(info.scale_names))
        if weight.shape != reference.shape:
            raise CheckpointError(f"'{name}' has another shape in {original.path.name}: it is not the original.")
        error = (torch.linalg.vector_norm(weight - reference) / torch.linalg.vector_norm(reference)).item()
        yield LayerError(layer, str(info.config["format"]), error, -20 * math.log10(error) if error else math.inf)


def _dequantized(
    checkpoint: Checkpoint, layer: str, storage_name: str, shape: tuple[int, ...], scale_names: dict[str, str]
) -> torch.Tensor:
    names = {suffix: f"{layer}.{suffix}" for suffix in _SUFFIXES} | scale_names
    parts = {suffix: checkpoint.read(name) for suffix, name in names.items() if name in checkpoint.entries}
    target = ScaleTarget("weight_scale", STORAGES[storage_name].core_format)
    parts["weight_scale"] = target.convert(parts.get("weight_scale", torch.ones(())))
    core_format = STORAGES[storage_name].core_format
    parts = {suffix: as_numbers(suffix, part, core_format) for suffix, part in parts.items()}
    return assemble(parts, storage_name, (shape[0], shape[1]), torch.float32).dequantize()
