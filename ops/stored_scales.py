"""The scales beside a stored weight: which a format needs, what size they can have, and what numbers they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

Shape = tuple[int, ...]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class ScaleRule:
    """A scale of a format.

    Attributes:
        suffix: its key below the layer's name.
        fits: whether a scale of this shape goes with a weight stored in that one.
        needed: the format cannot do without.
    """

    suffix: str
    fits: Callable[[Shape, Shape, Config], bool]
    needed: bool = True


def _tensor_or_rows(scale: Shape, weight: Shape, config: Config) -> bool:
    return math.prod(scale) == 1 or scale in ((weight[0],), (weight[0], 1))


def _single(scale: Shape, weight: Shape, config: Config) -> bool:
    return math.prod(scale) == 1


def _blocks(per_column: int, group: int) -> Callable[[Shape, Shape, Config], bool]:
    """Block scales in cuBLAS's tiles of 128 x 4; `per_column`: weights in one stored column."""

    def fits(scale: Shape, weight: Shape, config: Config) -> bool:
        columns = math.ceil(weight[1] * per_column / group)
        return math.prod(scale) == math.ceil(weight[0] / 128) * 128 * math.ceil(columns / 4) * 4

    return fits


def _groups(scale: Shape, weight: Shape, config: Config) -> bool:
    """Some groups a row: how many depends on how the weight is packed, which is comfy-kitchen's to know."""
    return math.prod(scale) > 0 and math.prod(scale) % max(weight[0], 1) == 0


def _rows(scale: Shape, weight: Shape, config: Config) -> bool:
    return math.prod(scale) == weight[0]


SCALE_RULES: Mapping[str, tuple[ScaleRule, ...]] = MappingProxyType(
    {
        "float8_e4m3fn": (ScaleRule("weight_scale", _tensor_or_rows, needed=False),),
        "float8_e5m2": (ScaleRule("weight_scale", _tensor_or_rows, needed=False),),
        "int8_tensorwise": (ScaleRule("weight_scale", _tensor_or_rows),),
        "mxfp8": (ScaleRule("weight_scale", _blocks(1, 32)),),
        "nvfp4": (ScaleRule("weight_scale", _blocks(2, 16)), ScaleRule("weight_scale_2", _single)),
        "convrot_w4a4": (ScaleRule("weight_scale", _tensor_or_rows),),
        "asym_w4a8_int8": (ScaleRule("weight_s_rel", _groups), ScaleRule("weight_s_channel", _rows)),
    }
)
"""By core's format name; scales of any other format are not looked at."""

BLOCK_SCALE_DTYPES: Mapping[str, Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "mxfp8": {"weight_scale": torch.float8_e8m0fnu},
        "nvfp4": {"weight_scale": torch.float8_e4m3fn},
        "asym_w4a8_int8": {"weight_s_rel": torch.float8_e4m3fn},
    }
)
"""By core's format name and the scale's suffix: what block scales are that may lie in a file as bytes."""


def as_numbers(suffix: str, tensor: torch.Tensor, core_format: str | None) -> torch.Tensor:
    """A tensor of a layer as the numbers that it stands for: block scales kept as bytes in their own dtype."""
    dtype = BLOCK_SCALE_DTYPES.get(core_format or "", {}).get(suffix)
    return tensor.view(dtype) if dtype is not None and tensor.dtype == torch.uint8 else tensor
