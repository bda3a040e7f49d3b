"""Measures, on a few rows of each layer, what every format would cost it; kept on disk for the next start."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from ..kernels.measured import MeasuredNumbers, Numbers
from .checkpoint import Checkpoint
from .formats import FORMATS
from .quantize import quantize_to_tensor
from .stream import QUANTIZER_VERSION
from .writer import short_stem

SAMPLED_NUMBERS = 1 << 16
LEAST_ROWS = 16
"""How much of a matrix is measured, and at least how many rows: what whole rows give is the matrix's error within percents."""

_SMALLEST_ERROR = 1e-9


def sampled_errors(
    checkpoint: Checkpoint, formats: Mapping[str, Collection[str]], *, device: torch.device | str, folder: Path | None
) -> dict[str, Numbers]:
    """Relative error (Frobenius norm) of layers' weights by format, to two digits: more would be the sample's noise.

    That is the relative error of a layer's output too, for activations that are independent of each other.

    Args:
        checkpoint: an opened checkpoint; some rows of each layer are read.
        formats: names of formats to measure, by layer.
        device: where to quantize.
        folder: of quantized files, where what was measured is kept; None keeps nothing.

    Raises:
        CheckpointError: a layer holds NaN or Inf, or the file can no longer be read.
    """
    place = hashlib.sha256(checkpoint.place.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    kept = MeasuredNumbers(folder, f"{short_stem(checkpoint.path.stem)}.{place}.errors.json")
    state = f"quantizer {QUANTIZER_VERSION}; {checkpoint.identity()}"
    known = {layer: kept.get(state, layer) or {} for layer in formats}
    new = {}
    for layer, names in formats.items():
        missing = [name for name in names if name not in known[layer]]
        if missing:
            count = max(SAMPLED_NUMBERS // checkpoint.entries[f"{layer}.weight"].shape[1], LEAST_ROWS)
            rows = checkpoint.read_rows(f"{layer}.weight", count).to(device)
            new[layer] = known[layer] | {
                name: _error(rows, name, f"{checkpoint.path.name}: {layer}") for name in missing
            }
    if new:
        kept.put(state, new)
    return known | new


def _error(rows: torch.Tensor, format_name: str, called: str) -> float:
    stored = quantize_to_tensor(rows, FORMATS[format_name], called).dequantize().float()
    exact = rows.float()
    size = torch.linalg.vector_norm(exact)
    error = (torch.linalg.vector_norm(stored - exact) / size).item() if size else 0.0
    return max(float(f"{error:.2g}"), _SMALLEST_ERROR)
