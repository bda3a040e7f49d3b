"""Recognises weights that a file already holds quantized, in every naming people have, and gives them core's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CheckpointError
from ..kernels.runtime import dtype_name
from .diffusion_names import described_weight
from .formats import STORAGES
from .header import load_json
from .multiplied_out import ScaledWeight, multiplied_out
from .quantize import core_config_tensor
from .stored_names import UNKNOWN_SCALINGS, foreign_weight, metadata_layers, with_format
from .stored_scales import SCALE_RULES

FLOAT8_FORMATS: Mapping[torch.dtype, str] = {
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}

_CONFIG = ".comfy_quant"
_MARKER = "scaled_fp8"
_WEIGHT_SCALES = (".weight_scale", ".scale_weight")
_INPUT_SCALES = (".input_scale", ".scale_input")
_INTEGERS = frozenset(
    {torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64}
)
_AS_INTEGERS: Mapping[str, bool] = {storage.core_format: storage.dtype in _INTEGERS for storage in STORAGES.values()}
"""Whether a core format's weights are stored as integers."""
_SMOOTHING = ".pre_quant_scale"
_SMOOTHED = "nvfp4"
"""What a layer's input is multiplied by, and the one format for which core does it."""
_INTEGER_FORMATS = frozenset({"int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"})


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

    @property
    def core_format(self) -> str:
        """`format` of `config`."""
        return str(self.config["format"])


@dataclass(frozen=True)
class ScaleTarget:
    """Where a scale of the file goes: core's name for it, and core's format of its layer."""

    name: str
    core_format: str

    def convert(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale as core wants it: FP8's and INT8's in float32, per tensor or a column; any other untouched."""
        if not self.core_format.startswith("float8") and self.core_format != "int8_tensorwise":
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
        scaled_weights: weights of convolutions and the like, whose scale nothing would apply later, by tensor name.
    """

    layers: Mapping[str, StoredLayer]
    dropped: frozenset[str]
    scale_targets: Mapping[str, ScaleTarget]
    scaled_weights: Mapping[str, ScaledWeight] = field(default_factory=dict)


def find_stored_layers(
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None,
) -> StoredLayers:
    """Find what is quantized already.

    Known are: core's `comfy_quant` tensors; the `_quantization_metadata` entry of the header; FP8 weights with
    `.weight_scale` or `.scale_weight` beside them (Comfy-Org's and Kijai's `scaled` files), with or without the
    `scaled_fp8` marker, or with no scale at all; and INT8 weights with such a scale. FP8 layers take the format of
    their own dtype, whatever a marker or a description says.

    Args:
        dtypes: dtype by tensor name.
        shapes: shape by tensor name.
        read: gives a (small) tensor's value.
        metadata: the header's text entries.

    Raises:
        CheckpointError: a description is not readable, scales are missing or fit no scaling that core knows, or a
            weight is quantized in a way that nothing describes.
    """
    foreign = foreign_weight(dtypes)
    if foreign is not None:
        raise CheckpointError(foreign)
    layers: dict[str, StoredLayer] = {}
    dropped = {name for name in dtypes if name == _MARKER or name.endswith(f".{_MARKER}")}
    # Two elements in a part's marker: its products are to stay in 16 bits.
    full_precision = tuple(name.removesuffix(_MARKER) for name in dropped if math.prod(shapes[name]) == 2)
    nameless: list[str] = []
    for described, config in metadata_layers(metadata).items():
        weight = described_weight(described, dtypes)
        if weight is None:
            nameless.append(described)
        else:
            layer = weight.removesuffix(".weight")
            layers[layer] = _described(layer, config, dtypes, "header metadata")
    for name in dtypes:
        if name.endswith(_CONFIG):
            layer, config = name.removesuffix(_CONFIG), _config(name, read)
            dropped.add(name)
            # What was left behind of a layer that was taken out describes nothing.
            if f"{layer}.weight" in dtypes or _scales(layer, dtypes):
                layers[layer] = _described(layer, config, dtypes, "core format")
    for name, dtype in dtypes.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer in layers or len(shapes[name]) != 2:
            continue
        if dtype in FLOAT8_FORMATS:
            layers[layer] = _float8(layer, dtype, layer.startswith(full_precision), dtypes)
        elif dtype in _INTEGERS:
            _refuse_nameless(layer, nameless)
            layers[layer] = _int8(layer, dtype, dtypes)
    scaled_weights = {}
    for name in [name for name in dtypes if name.endswith(".weight") and len(shapes[name]) != 2]:
        scales = _scales_of_no_linear(name, layers, dtypes, shapes, full_precision)
        if scales is not None and "weight_scale" in scales.scale_names:
            scaled_weights[name] = ScaledWeight(scales.scale_names["weight_scale"], scales.config)
            dropped |= set(scales.scale_names.values())
    _check_scales(layers, shapes)
    targets = {
        source: ScaleTarget(f"{layer}.{suffix}", info.core_format)
        for layer, info in layers.items()
        for suffix, source in info.scale_names.items()
    }
    # Core's integer formats always measure their input, and know no such parameter.
    of_integers = {source: to.name for source, to in targets.items() if to.core_format in _INTEGER_FORMATS}
    dropped |= {source for source, name in of_integers.items() if name.endswith(".input_scale")}
    return StoredLayers(layers, frozenset(dropped), targets, scaled_weights)


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
        {name: tuple(tensor.shape) for name, tensor in state_dict.items()},
        lambda name: state_dict[name],
        metadata,
    )
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        if name in stored.dropped:
            continue
        target = stored.scale_targets.get(name)
        scaled = stored.scaled_weights.get(name)
        if scaled is not None:
            result[name] = multiplied_out(name, tensor, state_dict[scaled.scale_name], scaled.config)
        elif target is None:
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


def _config(name: str, read: Callable[[str], torch.Tensor]) -> dict[str, Any]:
    try:
        return with_format(load_json(read(name).numpy().tobytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{name}' does not describe a quantized layer ({error}): download the file again."
        ) from None


def _described(layer: str, config: dict[str, Any], dtypes: Mapping[str, torch.dtype], origin: str) -> StoredLayer:
    scales, dtype = _scales(layer, dtypes), dtypes.get(f"{layer}.weight")
    _refuse_contradiction(layer, config["format"], dtypes)
    if not config["format"].startswith("float8"):
        return StoredLayer(config, scales, origin=origin)
    if dtype is not None:
        config = {**config, "format": FLOAT8_FORMATS.get(dtype, config["format"])}
    unscaled = "weight_scale" not in scales
    if unscaled:
        _refuse_unknown_scaling(layer, dtypes)
    return StoredLayer(config, scales, unscaled, origin)


def _refuse_contradiction(layer: str, core_format: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse a description that its layer's tensors contradict: core would turn numbers into codes, or pass a scale over."""
    dtype = dtypes.get(f"{layer}.weight")
    if dtype is not None and (dtype in _INTEGERS) != _AS_INTEGERS.get(core_format, dtype in _INTEGERS):
        raise CheckpointError(
            f"the layer '{layer}' is described as {core_format}, and its weight is stored as {dtype_name(dtype)}: use a file whose "
            "description is that of its weights."
        )
    if core_format != _SMOOTHED and f"{layer}{_SMOOTHING}" in dtypes:
        _refuse_scaling(layer, _SMOOTHING)


def _float8(layer: str, dtype: torch.dtype, full_precision: bool, dtypes: Mapping[str, torch.dtype]) -> StoredLayer:
    _refuse_unknown_scaling(layer, dtypes)
    config: dict[str, Any] = {"format": FLOAT8_FORMATS[dtype]}
    if full_precision:
        config["full_precision_matrix_mult"] = True
    scales = _scales(layer, dtypes)
    unscaled = "weight_scale" not in scales
    return StoredLayer(config, scales, unscaled, "plain FP8 cast" if unscaled else "scaled FP8")


def _int8(layer: str, dtype: torch.dtype, dtypes: Mapping[str, torch.dtype]) -> StoredLayer:
    _refuse_unknown_scaling(layer, dtypes)
    scales = _scales(layer, dtypes)
    if dtype != torch.int8 or "weight_scale" not in scales:
        raise CheckpointError(
            f"the layer '{layer}' is stored as {dtype_name(dtype)}, and nothing in the file says how it "
            "is scaled: use the 16-bit file, or one in ComfyUI's own quantized format."
        )
    return StoredLayer({"format": "int8_tensorwise"}, scales, origin="scaled INT8")


def _check_scales(layers: Mapping[str, StoredLayer], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a layer with a scale that is missing, or of a size that its format cannot have."""
    for name, layer in layers.items():
        weight = shapes.get(f"{name}.weight")
        for rule in SCALE_RULES.get(layer.core_format, ()):
            source = layer.scale_names.get(rule.suffix, f"{name}.{rule.suffix}")
            if source not in shapes:
                if rule.needed:
                    raise CheckpointError(
                        f"the quantized layer '{name}' has no '{rule.suffix}': the file is incomplete."
                    )
            elif weight is not None and len(weight) == 2 and not rule.fits(shapes[source], weight, layer.config):
                raise CheckpointError(
                    f"the scale '{source}' of shape {shapes[source]} does not fit a weight of shape {weight} stored as "
                    f"{layer.config['format']}: use the 16-bit file, or one in ComfyUI's own quantized format."
                )


def _refuse_nameless(layer: str, nameless: Sequence[str]) -> None:
    """What describes no tensor of the file may be this layer's description, under a name that nobody knows."""
    if nameless:
        raise CheckpointError(
            f"the layer '{layer}' is stored as integers that nothing describes, and the header describes "
            f"'{nameless[0]}', which the file does not hold: use the 16-bit file, or one whose names agree."
        )


def _scales_of_no_linear(
    name: str,
    layers: dict[str, StoredLayer],
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, tuple[int, ...]],
    full_precision: tuple[str, ...],
) -> StoredLayer | None:
    """How the weight `name`, which is no matrix, is scaled; taken out of `layers`. None: it is not, or core does it."""
    layer, dtype = name.removesuffix(".weight"), dtypes[name]
    if layer in layers:
        # Core's banks of experts are quantized matrices side by side.
        return None if len(shapes[name]) == 3 else layers.pop(layer)
    if dtype in FLOAT8_FORMATS:
        return _float8(layer, dtype, layer.startswith(full_precision), dtypes)
    return _int8(layer, dtype, dtypes) if dtype in _INTEGERS else None


def _scales(layer: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    found = {}
    for suffix, spellings in (("weight_scale", _WEIGHT_SCALES), ("input_scale", _INPUT_SCALES)):
        name = next((layer + spelling for spelling in spellings if layer + spelling in dtypes), None)
        if name is not None:
            found[suffix] = name
    return found


def _refuse_unknown_scaling(layer: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """An unknown scale beside a weight is not to be passed over: the weight would be taken for what it is not."""
    for suffix in UNKNOWN_SCALINGS:
        if layer + suffix in dtypes:
            _refuse_scaling(layer, suffix)


def _refuse_scaling(layer: str, suffix: str) -> None:
    raise CheckpointError(
        f"the quantized layer '{layer}' is scaled by '{layer + suffix}', a scaling that ComfyUI cannot multiply "
        "with: use the 16-bit file, or one in ComfyUI's own quantized format."
    )
