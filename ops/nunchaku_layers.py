"""Recognises nunchaku's layers: `svdquant` in INT4 and NVFP4, and AWQ in rows of four."""

from __future__ import annotations

import math
import re

import torch

from ..kernels.runtime import FLOATS
from .layer_tensors import Decoded, Found, LayerTensors, Shape
from .nunchaku_decode import RANKS, ROWS, awq_four_rows, svdquant, svdquant_bias

_BEHIND_GELU = re.compile(r"(^|\.)((ff|ff_context|img_mlp|txt_mlp)\.net\.2|mlp_(context_)?fc2)$")
"""Layers of nunchaku's whose input is a GELU's output."""


def find_svdquant(layer: LayerTensors) -> Found | None:
    """A layer of `svdquant`, or None where the integers are others.

    Raises:
        CheckpointError: a tensor of it is missing, or has a shape that does not fit.
    """
    if not layer.is_matrix("qweight", torch.int8, torch.uint8):
        return None
    rows, half = layer.shape("qweight")
    columns, fp4 = half * 2, layer.dtype("wscales") == torch.float8_e4m3fn
    what = f"svdquant of nunchaku in {'NVFP4' if fp4 else 'INT4'}"
    if rows % ROWS or columns % ROWS:
        raise layer.unfit(what, "qweight")
    parts = {"qweight": "qweight", "wscales": "wscales", **layer.there(wcscales="wcscales", wtscale="wtscale")}
    parts |= layer.there(smooth="smooth") | layer.there(smooth="smooth_factor")
    sizes: dict[str, Shape | int | None] = {
        "wscales": (columns // (16 if fp4 else 64), rows),
        "wcscales": rows,
        "wtscale": 1,
        "smooth": columns,
    }
    layer.need(what, {parts[ours]: size for ours, size in sizes.items() if ours in parts})
    low_rank: dict[str, str] = {}
    for down, up in (("lora_down", "lora_up"), ("proj_down", "proj_up")):
        if found := layer.there(down=down, up=up):
            rank = math.prod(layer.shape(next(iter(found.values())))[1:])
            layer.need(what, {down: (columns, rank), up: (rows, rank)})
            if rank % RANKS:
                raise layer.unfit(what, down)
            low_rank = found
    bias = None
    if "bias" in layer:
        layer.need(what, {"bias": rows})
        shifted = not fp4 and _BEHIND_GELU.search(layer.name)
        bias = Decoded((rows,), {"bias": "bias", **(parts if shifted else {})}, svdquant_bias)
    return Found(what, Decoded((rows, columns), {**parts, **low_rank}, svdquant), bias, renamed=True)


def find_four_rows(layer: LayerTensors, scales: str, zeros: str, *, renamed: bool) -> Found | None:
    """A layer of W4A16, or None where the integers are others.

    Args:
        layer: its tensors.
        scales, zeros: suffixes of the tensors that are called so here.
        renamed: the model's layers have nunchaku's names.

    Raises:
        CheckpointError: a tensor has a shape that does not fit.
    """
    if not layer.is_matrix("qweight", torch.int16, torch.int32) or not layer.is_matrix(scales, *FLOATS):
        return None
    what = "AWQ of nunchaku"
    quarter, width = layer.shape("qweight")
    rows, columns = quarter * 4, width * (2 if layer.dtype("qweight") == torch.int32 else 1)
    groups = layer.shape(scales)[0]
    if columns % 64 or not groups or columns % groups:
        raise layer.unfit(what, scales)
    layer.need(what, {scales: (groups, rows), zeros: (groups, rows)})
    parts = {"packed": "qweight", "scales": scales, "zeros": zeros}
    return Found(what, Decoded((rows, columns), parts, awq_four_rows), renamed=renamed)
