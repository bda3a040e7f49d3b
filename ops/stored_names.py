"""What the names in a file and its header say of weights that are quantized in it.

Opening a file needs no more than this: nothing here knows how to multiply with them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import CheckpointError
from .diffusion_names import described_weight
from .header import load_json

_METADATA = "_quantization_metadata"

_FOREIGN_WEIGHTS = (
    ".qweight",
    ".q_weight",
    ".weight_packed",
    ".weight._data",
    ".W_q",
    ".trellis",
    "weight_qdata",
    "weight:qdata",
)
"""What other tools (GPTQ, EXL2, compressed-tensors, quanto, HQQ, EXL3, torchao) store in place of a weight, where it is not decoded."""

UNKNOWN_SCALINGS = (
    ".weight_scale_inv",
    ".weight_scale_2",
    ".weight_scales",
    ".weight_scale_1",
    ".weight_zero_point",
    ".weight_zeros",
    ".weight_shape",
    ".weight_format",
    ".weight.absmax",
    ".weight.nested_absmax",
    ".weight.quant_map",
    ".pre_quant_scale",
    ".smooth_scale",
    ".smooth_factor",
    ".scale",
    ".scales",
    ".scale_inv",
    ".zero_point",
    ".zeros",
    ".absmax",
    ".SCB",
    ".smooth",
    ".wscales",
    ".qzeros",
    ".g_idx",
    ".weight_g_idx",
    ".lora_down",
    ".proj_down",
    ".svd_down",
)
"""Beside a weight: block scales, zero points, bitsandbytes, smoothing, a part of low rank, and the like, where `foreign_layers` has not decoded it."""


def foreign_weight(names: Iterable[str]) -> str | None:
    """What is wrong with a file of these names: that it holds another tool's weights; None where nothing tells so."""
    name = next((name for name in names if name.endswith(_FOREIGN_WEIGHTS)), None)
    if name is None:
        return None
    return (
        f"it holds '{name}', a weight quantized by another tool in a way that ComfyUI cannot load: use the 16-bit file, or "
        "one in ComfyUI's own quantized format."
    )


def described_layers(metadata: Mapping[str, str], names: Collection[str]) -> frozenset[str] | None:
    """The layers of a file with tensors of these names that its header describes; None: some under names of no tensor.

    Raises:
        CheckpointError: the description is not readable.
    """
    weights = [described_weight(name, names) for name in metadata_layers(metadata)]
    found = frozenset(weight.removesuffix(".weight") for weight in weights if weight is not None)
    return found if None not in weights else None


def metadata_below(metadata: Mapping[str, str], prefix: str, names: Collection[str]) -> dict[str, str]:
    """Text entries whose description of quantized layers is that of the part of a file below `prefix`.

    Args:
        metadata: the file's.
        prefix: of the part; it is taken off the names that have it.
        names: every tensor of the file: what describes another part's layer is left out.

    Raises:
        CheckpointError: the description is not readable.
    """
    result = dict(metadata)
    if _METADATA not in result:
        return result
    layers = {}
    for name, config in metadata_layers(metadata).items():
        inside = name.startswith(prefix) or f"{prefix}{name}.weight" in names
        if inside or f"{name}.weight" not in names:
            layers[name.removeprefix(prefix)] = config
    result[_METADATA] = json.dumps({"layers": layers})
    return result


def metadata_layers(metadata: Mapping[str, str] | None) -> dict[str, dict[str, Any]]:
    """The `comfy_quant` entries of each layer that a header describes.

    Raises:
        CheckpointError: the description is not readable.
    """
    text = (metadata or {}).get(_METADATA)
    if text is None:
        return {}
    try:
        layers = load_json(text)["layers"].items()
        return {layer: with_format(config) for layer, config in layers}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the header's _quantization_metadata cannot be read ({error}): download it again."
        ) from None


def with_format(config: Any) -> dict[str, Any]:
    """`config`, the description of a layer.

    Raises:
        ValueError: it is no table, or names no format.
    """
    if not isinstance(config, dict) or not isinstance(config.get("format"), str):
        raise ValueError("a layer's description names no format")
    return config
