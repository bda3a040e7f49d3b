"""Any torch model from a safetensors file in any format, its linears multiplied through the pack's ops: no ComfyUI needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from lowbit.ops.auto_format import FormatChooser
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import device_info
from lowbit.ops.formats import AS_STORED, FORMATS
from lowbit.ops.linear import quantized_linear
from lowbit.ops.plan import QuantizationPlan
from lowbit.ops.quantize import assemble
from lowbit.ops.sampled_errors import sampled_errors
from lowbit.ops.stream import quantize_checkpoint

from .progress import ProgressLine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


class QuantizedLinear(torch.nn.Module):
    """A Linear whose weight is quantized, multiplied by `lowbit.ops.linear.quantized_linear`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, fast: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.fast = fast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) to (..., N)."""
        return quantized_linear(x, self.weight, self.bias, fast=self.fast)


def load(
    source: Path, make: Callable[[], torch.nn.Module], name: str, folder: Path, progress: ProgressLine
) -> tuple[Path, torch.nn.Module]:
    """The file that holds the model of `source` in format `name`, and the model loaded from it.

    Args:
        source: a safetensors file with the names that `make`'s class gives its weights.
        make: builds the model.
        name: a format's name, `auto`, or `AS_STORED` for the file as it is.
        folder: where quantized files go.
        progress: is told of each weight.

    Raises:
        LowbitError: the format cannot be made.
    """
    model = make()
    if name == AS_STORED:
        model.load_state_dict(_moved(load_file(source)), assign=True)
        return source, model.to(DEVICE).eval()
    checkpoint = open_checkpoint(source)
    measure = partial(sampled_errors, device=DEVICE, folder=None)
    plan = FormatChooser(checkpoint, device_info(DEVICE), None, measure).choose(name).plan
    target = folder / f"{source.stem}.{name}.safetensors"
    quantize_checkpoint(
        checkpoint, plan, target, device=DEVICE, progress=lambda done, total, key: progress.step(key, done, total)
    )
    tensors = load_file(target)
    _replace_linears(model, plan, tensors)
    model.load_state_dict(_moved(tensors), assign=True, strict=False)
    return target, model.to(DEVICE).eval()


def _moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(DEVICE, DTYPE) for key, value in tensors.items() if value.is_floating_point()}


def _replace_linears(model: torch.nn.Module, plan: QuantizationPlan, tensors: dict[str, torch.Tensor]) -> None:
    """Takes the quantized layers' tensors out of `tensors` and puts QuantizedLinear modules in their place."""
    for layer in plan.layers.values():
        if layer.action != "quantize":
            continue
        prefix = f"{layer.name}."
        parts = {
            key.removeprefix(prefix): tensors.pop(key).to(DEVICE) for key in list(tensors) if key.startswith(prefix)
        }
        bias = parts.pop("bias", None)
        weight = assemble(parts, layer.storage, layer.shape, DTYPE)
        module = QuantizedLinear(weight, None if bias is None else bias.to(DTYPE), FORMATS[layer.weight_format].fast)
        parent, _, child = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
