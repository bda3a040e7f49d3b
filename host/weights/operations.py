"""Gives core's quantized Linear modules our multiply, leaving their loading, casting and patching to core."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...ops.linear import quantized_linear
from ...ops.linear_weight import LAYOUT_KINDS
from ...ops.side_product import SideProduct
from ...versions import find
from ..in_front import class_in_front
from .opaque_layer import OpaqueHandle, OpaqueWhilePaged, is_opaque_while_paged, opaque_layer, ticket_for
from .resident import weight_for

run_every_op = find("comfy.ops.run_every_op") or (lambda: None)
"""Core's look at whether the user interrupts."""

INPUT_ACTIVATIONS = {
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
"""What `QuantizedLinear.forward` can apply to its input on the way, in plain torch."""


class _Stored:
    """What `state_dict` lists beside the weight: no attribute of core's module, which core looks up when models are merged."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: torch.nn.Module, owner: type) -> torch.Tensor:
        stored = module.state_dict()
        if self.name not in stored:
            raise AttributeError(f"'{type(module).__name__}' object has no attribute '{self.name}'")
        return stored[self.name]


class QuantizedEmbedding(torch.nn.Module):
    """Mixin over core's `mixed_precision_ops(...).Embedding` with a quantized table: patches, merges and hooks find a Linear's ways.

    Core has none of them there, and loses what it adds to a copy of the decoded table.
    """

    comfy_quant = _Stored()
    weight_scale = _Stored()
    weight: Any

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: Any) -> torch.Tensor:
        """The table's numbers."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(
        self, weight: torch.Tensor, seed: int | None = None, return_weight: bool = False, **kwargs: Any
    ) -> torch.Tensor | None:
        """Quantize a patched table as this one is, and put it in its place, or return it."""
        patched = self.weight.requantize_from_float(weight, scale="recalculate", stochastic_rounding=seed)
        patched = patched.to(self.weight.dtype)
        if return_weight:
            return patched
        self.weight = torch.nn.Parameter(patched, requires_grad=False)
        return None


class KeptLinear(torch.nn.Module):
    """Mixin over core's `mixed_precision_ops(...).Linear` in 16 bits: hooks write to its weight as to any other layer's."""

    weight: torch.nn.Parameter

    def set_weight(
        self, weight: torch.Tensor, inplace_update: bool = False, return_weight: bool = False, **kwargs: Any
    ) -> torch.Tensor | None:
        """Core's; where it asserts that nothing is updated in place, as hooks do, the values are copied."""
        if return_weight or not inplace_update:
            core: Any = super()
            return core.set_weight(weight, return_weight=return_weight, **kwargs)
        self.weight.data.copy_(weight)
        return None


class QuantizedLinear(torch.nn.Module):
    """Mixin over core's `mixed_precision_ops(...).Linear`: only the multiply differs.

    The weight reaches `quantized_linear` still quantized, whether it is resident, streamed by the legacy patcher or
    faulted in by dynamic VRAM. Calls that core must see whole (training, a LoRA applied as a weight function, an input
    that is quantized already) go to core unchanged, for as long as they last.
    """

    comfy_quant = _Stored()
    weight_scale = _Stored()
    weight_scale_2 = _Stored()
    weight_s_rel = _Stored()
    weight_s_channel = _Stored()
    weight_codebook = _Stored()
    weight_correction = _Stored()

    side_product: SideProduct | None = None
    input_group: str = ""
    output_class: type[torch.Tensor] | None = None
    handle: OpaqueHandle
    out_features: int
    comfy_patched_weights: bool
    # Where core has not set them.
    comfy_force_cast_weights: bool = False
    quant_format: str | None = None
    weight: Any
    weight_function: list[Any]
    bias_function: list[Any]
    _full_precision_mm: bool
    _full_precision_mm_config: bool
    _disabled_formats: Collection[str]

    def forward(
        self,
        input: torch.Tensor,
        *args: Any,
        activation: str | None = None,
        input_group: str | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """act(input) @ weight.T + bias, and what LoRAs add.

        Args:
            activation: None, "gelu_tanh" or "silu".
            input_group: as `quantized_linear` takes it; None: this linear's own.
        """
        compiling = torch.compiler.is_compiling()
        if compiling and type(input) is torch.Tensor and not (args or kwargs or torch.is_grad_enabled()):
            ticket = ticket_for(input, self.input_group)
            return opaque_layer(input, self.handle, self.out_features, activation, ticket)
        group = self.input_group if input_group is None else input_group
        side_product = self.side_product
        if side_product is None:
            out = self._product(input, activation, group, *args, **kwargs)
        else:
            if activation is not None:
                input = INPUT_ACTIVATIONS[activation](input)
            out = self._product(input, None, group, *args, **kwargs)
            out = side_product.added_to(out, input.dequantize() if isinstance(input, QuantizedTensor) else input)
        if self.output_class is None or compiling or torch.is_grad_enabled() or not _reads_alone(self):
            return out
        return out.as_subclass(self.output_class)

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Core's; where it asserts that nothing is updated in place, as hooks do, the weight is exchanged."""
        core: Any = super()
        if return_weight or not inplace_update:
            return core.set_weight(weight, seed=seed, return_weight=return_weight, **kwargs)
        patched = core.set_weight(weight, seed=seed, return_weight=True, **kwargs)
        self.weight = torch.nn.Parameter(patched, requires_grad=False)
        return None

    def _product(
        self, input: torch.Tensor, activation: str | None, group: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        parameters = self._parameters
        if not self._multiplies_here(parameters.get("weight"), input):
            if activation is not None:
                input = INPUT_ACTIVATIONS[activation](input)
            return super().forward(input, *args, **kwargs)
        run_every_op()
        pre_quant_scale = parameters.get("pre_quant_scale")
        if pre_quant_scale is not None:
            if activation is not None:
                input, activation = INPUT_ACTIVATIONS[activation](input), None
            input = input * comfy.model_management.cast_to_device(pre_quant_scale, input.device, input.dtype)
        if group and not _reads_alone(self):
            group = ""
        weight, bias, release = weight_for(self, input)
        try:
            if not isinstance(weight, QuantizedTensor):
                weight = weight.to(input.dtype)
            return quantized_linear(input, weight, bias, fast=self.fast, activation=activation, input_group=group)
        finally:
            if release is not None:
                release()

    @property
    def fast(self) -> bool:
        """Whether activations may be quantized too: what the file says, not what core can emulate.

        Never where core asks for a 16-bit product whatever the GPU: it builds every text encoder so, and the legacy
        patcher says it once more by forcing the compute dtype. A format that core only emulates on this GPU sets the
        same flag; that one says nothing about what we may do.
        """
        if self._full_precision_mm_config or self.comfy_force_cast_weights:
            return False
        return not self._full_precision_mm or self.quant_format in self._disabled_formats

    def _multiplies_here(self, weight: Any, input: torch.Tensor) -> bool:
        return (
            isinstance(weight, QuantizedTensor)
            and not isinstance(input, QuantizedTensor)
            and not input.requires_grad
            and input.is_floating_point()
            and weight._layout_cls in LAYOUT_KINDS
            and not self.weight_function
            and not self.bias_function
        )


def takes_activation(module: Any) -> bool:
    """Whether `module` can be handed the activation before it: a linear of ours whose input nobody else looks at.

    A LoRA by bypass replaces the forward of a module, and adds what it makes of the input; hooks see the input too.
    Both were made for what comes after the activation.
    """
    return isinstance(module, QuantizedLinear) and _reads_alone(module)


def _reads_alone(linear: QuantizedLinear) -> bool:
    """Whether nobody stands around its forward, who might look at its input or change it in place, or keep its output."""
    replaced = "forward" in linear.__dict__ or type(linear).forward is not QuantizedLinear.forward
    return not (replaced or linear._forward_pre_hooks or linear._forward_hooks)


def adopt_quantized_linears(model: torch.nn.Module) -> int:
    """Make every Linear of `model` that holds a quantized weight multiply through this pack, and patches work beside it.

    Returns:
        How many modules multiply here now, those of an earlier call included.
    """
    adopted = 0
    module: Any
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            adopted += 1
        elif isinstance(getattr(module, "weight", None), QuantizedTensor) and is_core_linear(module):
            _put_in_front(QuantizedLinear, module)
            adopted += 1
        elif isinstance(module, torch.nn.Embedding) and isinstance(module.weight, QuantizedTensor):
            module.__class__ = class_in_front(type(module), QuantizedEmbedding)
    for module in model.modules() if holds_quantized(model) else ():
        if isinstance(module, (QuantizedLinear, OpaqueWhilePaged)):
            continue
        if is_core_linear(module):
            module.__class__ = class_in_front(type(module), KeptLinear)
        if is_opaque_while_paged(module):
            _put_in_front(OpaqueWhilePaged, module)
    return adopted


def holds_quantized(model: torch.nn.Module) -> bool:
    """Whether a layer of `model` that holds a quantized weight has been adopted."""
    return any(isinstance(module, (QuantizedLinear, QuantizedEmbedding)) for module in model.modules())


def is_core_linear(module: torch.nn.Module) -> bool:
    """Core's quantized Linear: its banks of experts have the same attributes, but no forward of their own."""
    return hasattr(module, "_full_precision_mm_config") and hasattr(module, "forward_comfy_cast_weights")


def _put_in_front(mixin: type, module: Any) -> None:
    module.__class__ = class_in_front(type(module), mixin)
    module.handle = OpaqueHandle(module)
