"""Already quantized forms of a checkpoint, as people have them: scaled FP8 of several origins, plain casts, shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .tensors import Tensors, linear_names, write


def _quantize(weight: torch.Tensor, dtype: torch.dtype, rows: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values and their float32 absmax scale: 0-dimensional, or (out, 1) with `rows`."""
    weight = weight.float()
    amax = weight.abs().amax(dim=1, keepdim=True) if rows else weight.abs().amax()
    scale = (amax / torch.finfo(dtype).max).clamp_min(1e-12)
    return (weight / scale).to(dtype), scale


def cast(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Tensors:
    """A file saved with a plain cast: every tensor of two dimensions or more is `dtype`, and there are no scales."""
    return {key: tensor.to(dtype) if tensor.dim() > 1 else tensor for key, tensor in tensors.items()}


def scaled_fp8(
    tensors: Mapping[str, torch.Tensor],
    layers: tuple[str, ...] = ("blocks.",),
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_input: float | None = None,
    full_precision: bool = False,
) -> Tensors:
    """The `scaled_fp8` form: an empty marker tensor, and `.scale_weight` beside each FP8 weight.

    Kijai's files have no `scale_input`. Comfy-Org's have it; a marker of two elements asks for full-precision products.
    """
    out = dict(tensors)
    for name in linear_names(tensors, layers):
        out[f"{name}.weight"], out[f"{name}.scale_weight"] = _quantize(tensors[f"{name}.weight"], dtype)
        if scale_input is not None:
            out[f"{name}.scale_input"] = torch.tensor(scale_input)
    out["scaled_fp8"] = torch.zeros(2 if full_precision else 0).to(dtype)
    return out


def weight_scale(tensors: Mapping[str, torch.Tensor], rows: bool) -> Tensors:
    """FP8 weights with `.weight_scale` beside them and neither marker nor metadata, per tensor or per row."""
    out = dict(tensors)
    for name in linear_names(tensors):
        key = f"{name}.weight"
        out[key], out[f"{name}.weight_scale"] = _quantize(tensors[key], torch.float8_e4m3fn, rows)
    return out


def quantization_metadata(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, str]]:
    """FP8 weights with `.weight_scale`, the format of each layer in the file's `_quantization_metadata`."""
    layers = {name: {"format": "float8_e4m3fn"} for name in linear_names(tensors)}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return weight_scale(tensors, rows=False), metadata


def comfy_quant(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """FP8 weights with `.weight_scale` and the format of each layer in its own `.comfy_quant` tensor."""
    out = weight_scale(tensors, rows=False)
    marker = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return out | {f"{name}.comfy_quant": marker.clone() for name in linear_names(tensors)}


def write_sharded(
    folder: Path, stem: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], shards: int = 3
) -> Path:
    """Writes `shards` files and `{stem}.safetensors.index.json`; returns the index's path."""
    keys = sorted(tensors)
    size = -(-len(keys) // shards)
    weight_map = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[number * size : (number + 1) * size]
        write(folder / name, {key: tensors[key] for key in part}, metadata)
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    return index
