"""Measures each quantized layer of a file against the original it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .plan import find_stored
from .quantize import storage_name_of
from .read_layer import read_layer


@dataclass(frozen=True)
class LayerError:
    """How far a quantized layer is from its original.

    Attributes:
        layer: its name.
        stored_as: key into `STORAGES`, or how another tool stored it.
        relative_error: Frobenius norm of the difference over that of the original.
        sqnr_decibels: the same as a signal-to-noise ratio.
    """

    layer: str
    stored_as: str
    relative_error: float
    sqnr_decibels: float


def layer_errors(quantized: Checkpoint, original: Checkpoint) -> Iterator[LayerError]:
    """Compare layer by layer, one in memory at a time, but for those that the original has quantized as well.

    Raises:
        CheckpointError: a layer is missing in the original, or has another shape there; or all are quantized there, or none
            here.
    """
    stored, before = find_stored(quantized).layers, find_stored(original).layers
    if stored and stored.keys() <= before.keys():
        raise CheckpointError(f"{original.path.name} is quantized itself: name the file that it was made from.")
    decoded = {name: entry for name, entry in quantized.entries.items() if entry.decoded_from}
    if not stored and not decoded:
        raise CheckpointError(
            f"{quantized.path.name} is not quantized: name the file that was made from {original.path.name}."
        )
    for layer, info in stored.items():
        if layer in before:
            continue
        reference = _original(original, layer)
        shape = (reference.shape[0], reference.shape[1])
        weight = read_layer(quantized, layer, info, shape, torch.float32).dequantize()
        yield _error(layer, storage_name_of(info.config), weight, reference, original)
    for name, entry in decoded.items():
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            reference = _original(original, layer)
            yield _error(layer, entry.decoded_from, quantized.read(name).float(), reference, original)


def _original(original: Checkpoint, layer: str) -> torch.Tensor:
    name = f"{layer}.weight"
    if name not in original.entries:
        raise CheckpointError(f"{original.path.name} has no '{name}': it is not the original of this file.")
    return original.read(name).float()


def _error(
    layer: str, stored_as: str, weight: torch.Tensor, reference: torch.Tensor, original: Checkpoint
) -> LayerError:
    if weight.shape != reference.shape:
        raise CheckpointError(f"'{layer}.weight' has another shape in {original.path.name}: it is not the original.")
    error = (torch.linalg.vector_norm(weight - reference) / torch.linalg.vector_norm(reference)).item()
    return LayerError(layer, stored_as, error, -20 * math.log10(error) if error else math.inf)
