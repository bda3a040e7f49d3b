"""Recognises weights that a file already holds quantized, in every naming people have, and gives them core's names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CheckpointError
from .quantize import core_config_tensor

FLOAT8_FORMATS: Mapping[torch.dtype, str] = {
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}

_CONFIG = ".comfy_quant"
_MARKER = "scaled_fp8"
_WEIGHT_SCALES = (".weight_scale", ".scale_weight")
_INPUT_SCALES = (".input_scale", ".scale_input")


@dataclass(frozen=True)
class StoredLayer:
    """A layer that is quantized in the file.

    Attributes:
        config: its `comfy_quant` entries.
        scale_names: names in the file of its scales, by core's suffix (`weight_scale`, `input_scale`).
        unit_scale: the file has no scale for it: a plain FP8 cast, whose scale is 1.0.
        origin: which naming it came in, for the report.
    """

    config: Mapping[str, Any]
    scale_names: Mapping[str, str] = field(default_factory=dict)
    unit_scale: bool = False
    origin: str = "core format"


@dataclass(frozen=True)
class ScaleTarget:
    """Where a scale of the file goes: core's name for it, and core's format of its layer."""

    name: str
    core_format: str

    def convert(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale as core wants it: FP8's per-tensor or per-row one in float32, any other untouched."""
        if not self.core_format.startswith("float8"):
            return scale
        scale = scale.to(torch.float32)
        if scale.numel() == 1:
            return scale.reshape(())
        return scale.unsqueeze(1) if scale.dim() == 1 else scale


@dataclass(frozen=True)
class StoredLayers:
    """All quantized layers of a file.

    Attributes:
        layers: by name.
        dropped: tensors that only described them and are not carried on.
        scale_targets: where each scale goes, by its name in the file.
    """

    layers: Mapping[str, StoredLayer]
    dropped: frozenset[str]
    scale_targets: Mapping[str, ScaleTarget]


def find_stored_layers(
    dtypes: Mapping[str, torch.dtype],
    dims: Mapping[str, int],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None,
) -> StoredLayers:
    """Find what is quantized already.

    Known are: core's `comfy_quant` tensors; the `_quantization_metadata` entry of the header; and FP8 weights with
    `.weight_scale` or `.scale_weight` beside them (Comfy-Org's and Kijai's `scaled` files), with or without the
    `scaled_fp8` marker, or with no scale at all. FP8 layers take the format of their own dtype, not of the marker.

    Args:
        dtypes: dtype by tensor name.
        dims: number of dimensions by tensor name.
        read: gives a (small) tensor's value.
        metadata: the header's text entries.

    Raises:
        CheckpointError: a description is not readable, or its scales are missing.
    """
    layers: dict[str, StoredLayer] = {}
    dropped = {name for name in dtypes if name == _MARKER or name.endswith(f".{_MARKER}")}
    full_precision = any(read(name).numel() == 2 for name in dropped)
    for layer, config in _metadata_layers(metadata).items():
        if f"{layer}.weight" in dtypes:
            layers[layer] = StoredLayer(config, _scales(layer, dtypes), origin="header metadata")
    for name in dtypes:
        if name.endswith(_CONFIG):
            layer = name.removesuffix(_CONFIG)
            layers[layer] = StoredLayer(_config(name, read), _scales(layer, dtypes))
            dropped.add(name)
    for name, dtype in dtypes.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer in layers or dtype not in FLOAT8_FORMATS or dims[name] != 2:
            continue
        config = {"format": FLOAT8_FORMATS[dtype]}
        if full_precision:
            config["full_precision_matrix_mult"] = True
        scales = _scales(layer, dtypes)
        unscaled = "weight_scale" not in scales
        layers[layer] = StoredLayer(config, scales, unscaled, "plain FP8 cast" if unscaled else "scaled FP8")
    _check_scales(layers, dtypes)
    targets = {
        source: ScaleTarget(f"{layer}.{suffix}", str(info.config["format"]))
        for layer, info in layers.items()
        for suffix, source in info.scale_names.items()
    }
    return StoredLayers(layers, frozenset(dropped), targets)


def normalize_state_dict(
    state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None, *, fast: bool | None = None
) -> dict[str, torch.Tensor]:
    """`state_dict` in core format: big tensors are passed on as they are (memory-mapped views stay views).

    Args:
        state_dict: tensors by name.
        metadata: the header's text entries.
        fast: whether activations may be quantized too; None keeps what the file says.

    Raises:
        CheckpointError: see `find_stored_layers`.
    """
    stored = find_stored_layers(
        {name: tensor.dtype for name, tensor in state_dict.items()},
        {name: tensor.dim() for name, tensor in state_dict.items()},
        lambda name: state_dict[name],
        metadata,
    )
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        if name in stored.dropped:
            continue
        target = stored.scale_targets.get(name)
        if target is None:
            result[name] = tensor
        else:
            result[target.name] = target.convert(tensor)
    for layer, info in stored.layers.items():
        if info.unit_scale:
            result[f"{layer}.weight_scale"] = torch.ones((), dtype=torch.float32)
        result[f"{layer}{_CONFIG}"] = core_config_tensor(with_speed(info.config, fast))
    return result


def with_speed(config: Mapping[str, Any], fast: bool | None) -> dict[str, Any]:
    """`config` with the 8- or 4-bit product allowed or not; None leaves it as it is.

    E5M2 is never multiplied by E5M2: cuBLAS refuses it.
    """
    result = dict(config)
    if result["format"] == "float8_e5m2":
        fast = False
    if fast is not None:
        result.pop("full_precision_matrix_mult", None)
        if not fast:
            result["full_precision_matrix_mult"] = True
    return result


def _metadata_layers(metadata: Mapping[str, str] | None) -> dict[str, dict[str, Any]]:
    text = (metadata or {}).get("_quantization_metadata")
    if text is None:
        return {}
    try:
        return {layer: dict(config) for layer, config in json.loads(text)["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The file's _quantization_metadata cannot be read ({error}): download it again."
        ) from None


def _config(name: str, read: Callable[[str], torch.Tensor]) -> dict[str, Any]:
    try:
        config = json.loads(read(name).numpy().tobytes())
        config["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{name}' does not describe a quantized layer ({error}): download the file again."
        ) from None
    return config


def _scales(layer: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    found = {}
    for suffix, spellings in (("weight_scale", _WEIGHT_SCALES), ("input_scale", _INPUT_SCALES)):
        name = next((layer + spelling for spelling in spellings if layer + spelling in dtypes), None)
        if name is not None:
            found[suffix] = name
    return found


def _check_scales(layers: Mapping[str, StoredLayer], dtypes: Mapping[str, torch.dtype]) -> None:
    for layer, info in layers.items():
        needed = "weight_s_rel" if info.config["format"] == "asym_w4a8_int8" else "weight_scale"
        float8 = str(info.config["format"]).startswith("float8")
        if needed not in info.scale_names and f"{layer}.{needed}" not in dtypes and not float8:
            raise CheckpointError(f"The quantized layer '{layer}' has no '{needed}': the file is incomplete.")
