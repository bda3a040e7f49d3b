"""The weight and bias of a quantized linear for one product: as they are where they are on the input's device already."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...versions import find

_fault = find("comfy_aimdo.model_vbar.vbar_fault")
_unpin = find("comfy_aimdo.model_vbar.vbar_unpin")
_same = find("comfy_aimdo.model_vbar.vbar_signature_compare")
_PAGES_KNOWN = None not in (_fault, _unpin, _same)


class _Resident:
    """A context with a weight that is where it has to be. pages: what dynamic VRAM is to hold until it ends."""

    __slots__ = ("bias", "pages", "weight")

    def __init__(self, weight: QuantizedTensor, bias: torch.Tensor | None, pages: Any = None) -> None:
        self.weight, self.bias, self.pages = weight, bias, pages

    def __enter__(self) -> tuple[QuantizedTensor, torch.Tensor | None]:
        return self.weight, self.bias

    def __exit__(self, *_: Any) -> None:
        if self.pages is not None:
            _unpin(self.pages)


def weight_for(module: Any, x: torch.Tensor) -> Any:
    """A context that gives `module`'s weight, still quantized, and its bias, for a product with x.

    Core casts a weight for every product; for one that is there, and that no function changes, all of that comes to
    nothing, and takes as long on the processor as the product's launches.

    Args:
        module: core's quantized Linear without weight or bias functions.
        x: on the device that they are wanted on; the bias is wanted in its dtype.
    """
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    device, attributes = x.device, vars(module)
    if weight._qdata.device == device and (bias is None or bias.device == device):
        return _Resident(weight, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))
    # Core's signature of what it put there last; the same as now where nothing has left since.
    signature, pages = attributes.get("_v_signature"), attributes.get("_v")
    if signature is not None and pages is not None and "_prefetch" not in attributes and _PAGES_KNOWN:
        found = _fault(pages)
        if _same(found, signature):
            weight, bias = attributes["_v_weight"], attributes["_v_bias"]
            return _Resident(weight, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype), pages)
        # Without room nothing is held, and to let go of it is an error to comfy-aimdo from 0.6 on.
        if found is not None:
            _unpin(pages)
    # The weight's own dtype is asked for: any other would make core dequantize it here.
    return comfy.ops.CastBiasWeightContext(
        module,
        input=None,
        dtype=weight.dtype,
        device=device,
        bias_dtype=x.dtype,
        offloadable=True,
        compute_dtype=x.dtype,
        want_requant=True,
    )
