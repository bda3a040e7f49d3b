"""Measures each quantized layer of a file against the original it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .plan import find_stored
from .read_layer import read_layer


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
        shape = (reference.shape[0], reference.shape[1])
        weight = read_layer(quantized, layer, info, shape, torch.float32).dequantize()
        if weight.shape != reference.shape:
            raise CheckpointError(f"'{name}' has another shape in {original.path.name}: it is not the original.")
        error = (torch.linalg.vector_norm(weight - reference) / torch.linalg.vector_norm(reference)).item()
        yield LayerError(layer, str(info.config["format"]), error, -20 * math.log10(error) if error else math.inf)
