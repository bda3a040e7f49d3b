"""The weight and bias of a quantized linear for one product: as they are where they are on the input's device already."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import comfy.ops
import torch

from ...versions import find

_fault = find("comfy_aimdo.model_vbar.vbar_fault")
_unpin = find("comfy_aimdo.model_vbar.vbar_unpin")
_same = find("comfy_aimdo.model_vbar.vbar_signature_compare")
_PAGES_KNOWN = None not in (_fault, _unpin, _same)


def weight_for(module: Any, x: torch.Tensor) -> tuple[Any, torch.Tensor | None, Callable[[], object] | None]:
    """`module`'s weight, still quantized, its bias, and what is to be called after the product with x, if anything.

    Core casts a weight for every product; for one that is there, and that no function changes, all of that comes to
    nothing, and takes as long on the processor as the product's launches.

    Args:
        module: core's quantized Linear without weight or bias functions.
        x: on the device that they are wanted on; the bias is wanted in its dtype.
    """
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    device, attributes = x.device, module.__dict__
    if weight._qdata.device == device and (bias is None or bias.device == device):
        return weight, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype), None
    # Core's signature of what it put there last; the same as now where nothing has left since.
    signature, pages = attributes.get("_v_signature"), attributes.get("_v")
    if signature is not None and pages is not None and "_prefetch" not in attributes and _PAGES_KNOWN:
        found = _fault(pages)
        if _same(found, signature):
            weight, bias = attributes["_v_weight"], attributes["_v_bias"]
            bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
            return weight, bias, functools.partial(_unpin, pages)
        # Without room nothing is held, and to let go of it is an error to comfy-aimdo from 0.6 on.
        if found is not None:
            _unpin(pages)
    # The weight's own dtype is asked for: any other would make core dequantize it here.
    context = comfy.ops.CastBiasWeightContext(
        module,
        input=None,
        dtype=weight.dtype,
        device=device,
        bias_dtype=x.dtype,
        offloadable=True,
        compute_dtype=x.dtype,
        want_requant=True,
    )
    weight, bias = context.__enter__()
    return weight, bias, functools.partial(context.__exit__, None, None, None)
