"""Draws a checkpoint's tensors from a table of shapes: seeded per key, at a scale that keeps activations near one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]


def linear(name: str, out_features: int, in_features: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """The shapes of one Linear layer: `{name}.weight` (out, in) and, on request, `{name}.bias` (out,)."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out_features, in_features)}
    if bias:
        shapes[f"{name}.bias"] = (out_features,)
    return shapes


def norm(name: str, width: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of one normalization layer of `width` channels."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (width,)}
    if bias:
        shapes[f"{name}.bias"] = (width,)
    return shapes


def draw(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Random tensors for `shapes`.

    A tensor depends on its key, its shape and `seed` only, so that two models that share a layer share its weights.
    Matrices and convolutions: Gaussian with variance 1 / fan-in. One-dimensional `.weight` and `.gamma` (norms): 1 +
    Gaussian / 10. Biases: Gaussian / 50. Modulation tables: Gaussian / sqrt(width). Embeddings: Gaussian.
    """
    return {key: _draw_one(key, shape, seed).to(dtype) for key, shape in shapes.items()}


def _draw_one(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) * 1009 + seed)
    scale, shift = scale_and_shift(key, shape)
    return torch.randn(shape, generator=generator) * scale + shift


def scale_and_shift(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """What a tensor's Gaussian values are multiplied by, and what is added: see `draw`."""
    if key.endswith("modulation"):
        return shape[-1] ** -0.5, 0.0
    if key.endswith("bias"):
        return 0.02, 0.0
    if key.endswith("gamma") or len(shape) == 1:
        return 0.1, 1.0
    if key.endswith(("embed_tokens.weight", "shared.weight", "relative_attention_bias.weight")):
        return 1.0, 0.0
    return math.prod(shape[1:]) ** -0.5, 0.0


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a safetensors file, making its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, dict(metadata) if metadata else None)
    return path


def linear_names(tensors: Mapping[str, torch.Tensor], inside: Iterable[str] = ("blocks.",)) -> list[str]:
    """Names of the layers with a two-dimensional weight whose key contains one of `inside`."""
    parts = tuple(inside)
    return [
        key.removesuffix(".weight")
        for key, tensor in tensors.items()
        if key.endswith(".weight") and tensor.dim() == 2 and any(part in key for part in parts)
    ]
