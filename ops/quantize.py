"""Quantizes one weight matrix into the tensors that a core-format checkpoint stores for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import comfy_kitchen
import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.base import LAYOUTS, get_layout_class

from ..errors import CapabilityError, CheckpointError, FormatError
from .formats import STORAGES, Storage, WeightFormat, storage_for
from .layouts import register_layouts
from .nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, quantize_nvfp4, tiled_scales

_CPU_CHUNK = 512 * 1024
_GPU_CHUNK = 32 * 1024 * 1024
"""Weights worked on at a time: on a CPU so few that temporaries stay in the cache and need no fresh pages."""

_CODEBOOK_ROWS = 512
_BLOCK_ROWS = 128

QuantizedParts = dict[str, torch.Tensor]
"""Tensors of one layer by key suffix: `weight`, `weight_scale`, ..., `comfy_quant`."""


def quantize_weight(
    weight: torch.Tensor, storage_name: str, *, unit_scale: bool = False, fast: bool = False, name: str = "weight"
) -> QuantizedParts:
    """Quantize a Linear's weight, a few rows at a time on the device it is on.

    Args:
        weight: (out_features, in_features), any float dtype; not written to.
        storage_name: key into `STORAGES`.
        unit_scale: use a tensor-wide scale of 1.0 instead of the absolute maximum, unless the weight would be clipped.
        fast: whether core may quantize activations too (absent: `full_precision_matrix_mult`).
        name: the layer, for errors.

    Returns:
        The stored tensors, on the weight's device; temporaries stay under about 64 MiB on a CPU whatever the size.

    Raises:
        CheckpointError: the weight holds NaN or Inf.
        FormatError: the storage cannot hold this shape.
    """
    storage = STORAGES[storage_name]
    if weight.dim() != 2 or weight.shape[1] % storage.column_multiple:
        raise FormatError(
            f"'{name}' of shape {tuple(weight.shape)} cannot be stored as {storage_name}, which takes matrices with "
            f"a multiple of {storage.column_multiple} columns: keep it in 16 bits."
        )
    largest = absolute_maximum(weight, name)
    if storage.core_format.startswith("float8"):
        parts = _quantize_float8(weight, storage, largest, unit_scale)
    elif storage.core_format == "nvfp4":
        parts = _quantize_nvfp4(weight, largest, unit_scale)
    else:
        parts = _quantize_by_layout(weight, storage)
    parts["comfy_quant"] = core_config_tensor(core_config(storage, fast=fast))
    return parts


def require_layout(storage_name: str) -> None:
    """Make sure that the installed comfy-kitchen has the layout of a storage.

    Raises:
        CapabilityError: it is too old for it.
    """
    register_layouts()
    if STORAGES[storage_name].layout not in LAYOUTS:
        raise CapabilityError(
            f"The installed comfy-kitchen cannot store weights as {storage_name}: update it (pip install -U comfy-kitchen) "
            "or choose another format."
        )


def core_config(storage: Storage, *, fast: bool) -> dict[str, Any]:
    """The `comfy_quant` entries of a layer in `storage`."""
    config: dict[str, Any] = {"format": storage.core_format, **storage.core_config}
    if not fast:
        config["full_precision_matrix_mult"] = True
    return config


def core_config_tensor(config: dict[str, Any]) -> torch.Tensor:
    """`config` as ComfyUI stores it: UTF-8 JSON in a uint8 tensor, padded with spaces to a multiple of 8 bytes."""
    encoded = json.dumps(config).encode()
    return torch.tensor(list(encoded.ljust(-(-len(encoded) // 8) * 8)), dtype=torch.uint8)


def absolute_maximum(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Largest absolute value as a float32 scalar on the weight's device.

    Raises:
        CheckpointError: the weight holds NaN or Inf.
    """
    largest = torch.zeros((), dtype=torch.float32, device=weight.device)
    for chunk in _row_chunks(weight):
        # amax propagates NaN, so one test at the end sees every element.
        largest = torch.maximum(largest, chunk.abs().amax().float())
    if not torch.isfinite(largest):
        raise not_finite(name)
    return largest


def not_finite(name: str) -> CheckpointError:
    """The error that a tensor, here `name`, holds what is no number."""
    return CheckpointError(
        f"{name} holds NaN or Inf, so the file is damaged or of a broken model: download it again, or take another."
    )


def storage_name_of(config: Mapping[str, Any]) -> str:
    """Key into `STORAGES` of a layer with these `comfy_quant` entries.

    Raises:
        CheckpointError: this version does not know them.
    """
    params = config.get("params")
    rotated = config.get("convrot") or (isinstance(params, dict) and params.get("convrot"))
    for name, storage in STORAGES.items():
        if storage.core_format == config["format"] and bool(storage.core_config.get("convrot")) == bool(rotated):
            return name
    raise CheckpointError(f"The format {json.dumps(dict(config))} is unknown to this version of Lowbit: update it.")


def assemble(parts: QuantizedParts, storage_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
    """The comfy-kitchen tensor of what `quantize_weight` returned, e.g. to multiply with outside ComfyUI.

    Args:
        parts: tensors by suffix, on one device.
        storage_name: key into `STORAGES`.
        shape: (out_features, in_features) before padding.
        dtype: dtype that the weight dequantizes to.
    """
    register_layouts()
    storage = STORAGES[storage_name]
    if storage.core_format == "nvfp4":
        scales: dict[str, Any] = {"scale": parts["weight_scale_2"], "block_scale": parts["weight_scale"]}
    elif storage.core_format == "asym_w4a8_int8":
        scales = {
            "scale": parts["weight_s_rel"],
            "s_channel": parts["weight_s_channel"],
            "codebook": parts.get("weight_codebook"),
            **storage.core_config,
        }
    else:
        scales = {"scale": parts["weight_scale"], **storage.core_config}
    params = get_layout_class(storage.layout).Params(**scales, orig_dtype=dtype, orig_shape=tuple(shape))
    return QuantizedTensor(parts["weight"], storage.layout, params)


def quantize_to_tensor(weight: torch.Tensor, weight_format: WeightFormat, name: str = "weight") -> QuantizedTensor:
    """Quantize in memory, on the weight's device: `quantize_weight` and `assemble` in one."""
    storage_name = storage_for(weight_format, weight.shape[1])
    parts = quantize_weight(weight, storage_name, unit_scale=weight_format.unit_scale, name=name)
    dtype = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16
    return assemble(parts, storage_name, tuple(weight.shape), dtype)


def _row_chunks(weight: torch.Tensor, multiple: int = 1) -> Iterator[torch.Tensor]:
    elements = _CPU_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK
    rows = max(1, elements // max(1, weight.shape[-1]))
    rows = max(multiple, rows // multiple * multiple)
    for start in range(0, weight.shape[0], rows):
        yield weight[start : start + rows]


def _quantize_float8(weight: torch.Tensor, storage: Storage, largest: torch.Tensor, unit_scale: bool) -> QuantizedParts:
    limit = torch.finfo(storage.dtype).max
    scale = _tensor_scale(largest / limit, unit_scale)
    qdata = torch.empty(weight.shape, dtype=storage.dtype, device=weight.device)
    start = 0
    for chunk in _row_chunks(weight):
        # Divided in float32: a reciprocal in 16 bits costs 2% more error.
        scaled = (chunk.float() / scale).clamp_(-limit, limit)
        qdata[start : start + len(chunk)].copy_(scaled.to(storage.dtype))
        start += len(chunk)
    return {"weight": qdata, "weight_scale": scale}


def _quantize_nvfp4(weight: torch.Tensor, largest: torch.Tensor, unit_scale: bool) -> QuantizedParts:
    scale = _tensor_scale(largest / (E2M1_MAX * E4M3_MAX), unit_scale)
    pieces = [quantize_nvfp4(_padded(chunk, BLOCK), scale) for chunk in _row_chunks(weight, BLOCK)]
    return {
        "weight": torch.cat([qdata for qdata, _ in pieces]),
        "weight_scale": tiled_scales(torch.cat([block_scale for _, block_scale in pieces])),
        "weight_scale_2": scale,
    }


def _quantize_by_layout(weight: torch.Tensor, storage: Storage) -> QuantizedParts:
    """Row chunks through comfy-kitchen's own quantizer: each row (or 128 rows) is independent of the others.

    Its eager backend is used on every device: it takes float32 (the CUDA one of mxfp8 does not), and the file comes out
    the same whatever GPU made it.
    """
    register_layouts()
    layout, pieces = get_layout_class(storage.layout), []
    options = {**storage.core_config, **storage.quantize_options}
    with comfy_kitchen.use_backend("eager"):
        if storage.core_format == "asym_w4a8_int8":
            options.update(_codebook_options(weight, layout, options))
        for chunk in _row_chunks(weight, _BLOCK_ROWS):
            qdata, params = layout.quantize(chunk.float().contiguous(), **options)
            stored = layout.state_dict_tensors(qdata, params)
            pieces.append({f"weight{suffix}": tensor for suffix, tensor in stored.items()})
    shared = {"weight_codebook"}
    return {
        suffix: first if suffix in shared else torch.cat([piece[suffix] for piece in pieces])
        for suffix, first in pieces[0].items()
    }


def _codebook_options(weight: torch.Tensor, layout: Any, options: dict[str, Any]) -> dict[str, Any]:
    """One codebook for the whole matrix, chosen from rows spread over it, so that chunks can share it."""
    step = max(1, weight.shape[0] // _CODEBOOK_ROWS)
    _, params = layout.quantize(weight[::step].float().contiguous(), **options)
    return {"codebook": params.codebook is not None, "codebook_tensor": params.codebook}


def _padded(chunk: torch.Tensor, multiple: int) -> torch.Tensor:
    rows, columns = (-size % multiple for size in chunk.shape)
    return torch.nn.functional.pad(chunk.float(), (0, columns, 0, rows))


def _tensor_scale(fitting: torch.Tensor, unit_scale: bool) -> torch.Tensor:
    """The scale by which a weight just fits, or 1.0: for a plain cast unless it would clip, and for zeros, whose scale would be 0/0."""
    return fitting.clamp(min=1.0) if unit_scale else torch.where(fitting > 0, fitting, torch.ones_like(fitting))
