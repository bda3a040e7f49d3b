"""What `auto` stands for: the best format for a GPU, a model and the memory there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .checkpoint import Checkpoint
from .device_info import DeviceInfo
from .formats import AS_STORED, FORMATS
from .keep_rules import Rule
from .plan import QUANTIZE, make_plan

STREAMING_LIMIT = 1.5
"""Weights of up to this many times the device memory are streamed in 8 bits; larger ones are stored in 4.

A diffusion step at video sizes takes seconds, in which the missing part of an 8-bit model crosses PCIe several times.
"""


@dataclass(frozen=True)
class AutoRow:
    """The choice for GPUs from one compute capability on.

    Attributes:
        capability: lowest compute capability, (0, 0) for anything else and the CPU.
        eight_bits: format when 8 bits fit (or stream).
        four_bits: format when they do not.
        reason: why the 8-bit one.
    """

    capability: tuple[int, int]
    eight_bits: str
    four_bits: str
    reason: str


AUTO_ROWS: tuple[AutoRow, ...] = (
    AutoRow((12, 0), "int8_convrot_fast", "fp4_scaled_fast", "rotated INT8 is as fast as FP8 and more accurate"),
    AutoRow((10, 0), "fp8_e4m3fn_scaled_fast", "fp4_scaled_fast", "FP8 is this GPU's fast 8-bit format"),
    AutoRow((7, 5), "int8_convrot_fast", "int4_asym_fast", "rotated INT8 is as fast as FP8 and more accurate"),
    AutoRow((0, 0), "int8_convrot_fast", "int4_asym_fast", "8-bit integers run on any processor"),
)
"""Best first by capability. Measured on cc 9.0; the others follow from each generation's tensor-core rates."""

TEXT_ENCODER_FORMAT = "int8"
"""Text encoders run once a prompt on few tokens: a 16-bit product loses no time and no accuracy."""


def choose_format(
    checkpoint: Checkpoint,
    device: DeviceInfo,
    rules: tuple[Rule, ...] | None,
    *,
    pinned: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """Format name and the reason for it.

    Args:
        checkpoint: the model.
        device: where it will run.
        rules: the user's keep rules, None for the family's.
        pinned: as `make_plan` takes it.
    """
    plan = make_plan(checkpoint, FORMATS[TEXT_ENCODER_FORMAT], rules, pinned=pinned)
    if not any(layer.action == QUANTIZE for layer in plan.layers.values()):
        return AS_STORED, "the file's weights are quantized already, or too small to be"
    if plan.family.kind == "text_encoder":
        return TEXT_ENCODER_FORMAT, "a text encoder runs once a prompt: 8-bit weights, 16-bit product"
    row = _row(device)
    if device.memory_bytes and plan.nbytes_after > STREAMING_LIMIT * device.memory_bytes:
        return row.four_bits, (
            f"8 bits would take {plan.nbytes_after / 2**30:.1f} GiB, over {STREAMING_LIMIT:g} times the "
            f"{device.memory_bytes / 2**30:.0f} GiB of {device.name}"
        )
    return row.eight_bits, row.reason


def four_bit_format(device: DeviceInfo) -> str:
    """Name of the best 4-bit format for a device."""
    return _row(device).four_bits


def _row(device: DeviceInfo) -> AutoRow:
    capability = device.capability or (0, 0)
    return next(row for row in AUTO_ROWS if capability >= row.capability)
