"""What `auto` and `smallest` stand for: the best formats for a GPU, a model and the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from ..kernels.measured import Numbers
from .checkpoint import Checkpoint
from .device_info import DeviceInfo
from .formats import AS_STORED, AUTO, FORMATS, SMALLEST, find_format
from .keep_rules import Rule
from .mixed_plan import TwoPlans
from .plan import QuantizationPlan, make_plan

STREAMING_LIMIT = 1.5
"""Weights of up to this many times the device memory are streamed in 8 bits; of larger ones, layers are stored in 4.

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
        four_bits_faster: its product is faster than that of 8 bits, so that `auto` mixes none of those in.
    """

    capability: tuple[int, int]
    eight_bits: str
    four_bits: str
    reason: str
    four_bits_faster: bool = False


AUTO_ROWS: tuple[AutoRow, ...] = (
    AutoRow((12, 0), "int8_convrot_fast", "fp4_scaled_fast", "rotated INT8 is as fast as FP8 and more accurate", True),
    AutoRow((10, 0), "fp8_e4m3fn_scaled_fast", "fp4_scaled_fast", "FP8 is this GPU's fast 8-bit format", True),
    AutoRow((7, 5), "int8_convrot_fast", "int4_asym_fast", "rotated INT8 is as fast as FP8 and more accurate"),
    AutoRow((0, 0), "int8_convrot_fast", "int4_asym_fast", "8-bit integers run on any processor"),
)
"""Best first by capability. Measured on cc 9.0; the others follow from each generation's tensor-core rates."""

MeasureLayers = Callable[[Checkpoint, Mapping[str, Collection[str]]], Mapping[str, Numbers]]
"""`sampled_errors`, told where to quantize and where to keep what it finds."""

TEXT_ENCODER_FORMAT = "int8"
"""Text encoders run once a prompt on few tokens: a 16-bit product loses no time and no accuracy."""


@dataclass(frozen=True)
class Chosen:
    """What a format name comes to for a checkpoint.

    Attributes:
        plan: what happens to each layer.
        name: of the formats.
        reason: why those.
    """

    plan: QuantizationPlan
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def plan_format(
    checkpoint: Checkpoint,
    name: str,
    device: DeviceInfo,
    rules: tuple[Rule, ...] | None,
    measure: MeasureLayers,
    *,
    pinned: Mapping[str, str] | None = None,
) -> Chosen:
    """The plan of a checkpoint in the format called `name`.

    Args:
        checkpoint: the model.
        name: one of `FORMAT_CHOICES`.
        device: where it will run.
        rules: the user's keep rules, None for the family's.
        measure: tells errors of layers: asked only where formats have to be mixed.
        pinned: as `make_plan` takes it.

    Raises:
        CheckpointError, CapabilityError: as `make_plan` and `sampled_errors`.
        FormatError: there is no such format.
    """
    if name not in (AUTO, SMALLEST):
        weight_format = None if name == AS_STORED else find_format(name)
        return Chosen(make_plan(checkpoint, weight_format, rules, pinned=pinned), name, "asked for")
    make = partial(make_plan, checkpoint, user_rules=rules, named=False, pinned=pinned)
    plan = make(FORMATS[TEXT_ENCODER_FORMAT])
    if not plan.changes_weights:
        return Chosen(make(None), AS_STORED, "the file's weights are quantized already, or too small to be")
    row = _row(device)
    if name == SMALLEST:
        return _mixed(two_plans(checkpoint, device, rules, measure, pinned=pinned), 0, "asked for")
    if plan.family.kind == "text_encoder":
        return Chosen(plan, TEXT_ENCODER_FORMAT, "a text encoder runs once a prompt: 8-bit weights, 16-bit product")
    if not device.memory_bytes or plan.nbytes_after <= STREAMING_LIMIT * device.memory_bytes:
        return Chosen(make(FORMATS[row.eight_bits]), row.eight_bits, row.reason)
    reason = (
        f"8 bits would take {plan.nbytes_after / 2**30:.1f} GiB, over {STREAMING_LIMIT:g} times the "
        f"{device.memory_bytes / 2**30:.0f} GiB of {device.name}"
    )
    if row.four_bits_faster:
        return Chosen(make(FORMATS[row.four_bits]), row.four_bits, reason)
    return _mixed(two_plans(checkpoint, device, rules, measure, pinned=pinned), device.memory_bytes, reason)


def two_plans(
    checkpoint: Checkpoint,
    device: DeviceInfo,
    rules: tuple[Rule, ...] | None,
    measure: MeasureLayers,
    *,
    pinned: Mapping[str, str] | None = None,
) -> TwoPlans:
    """The checkpoint in the device's two formats, to mix: `plan_format`'s arguments.

    Raises:
        CheckpointError, CapabilityError: as `make_plan`.
    """
    row = _row(device)
    make = partial(make_plan, checkpoint, user_rules=rules, named=False, pinned=pinned)
    plan = make(FORMATS[TEXT_ENCODER_FORMAT])
    return TwoPlans(
        plan if plan.family.kind == "text_encoder" else make(FORMATS[row.eight_bits]),
        make(FORMATS[row.four_bits]),
        partial(measure, checkpoint),
        lambda mix: make(FORMATS[row.four_bits], mix=mix),
    )


def _mixed(plans: TwoPlans, room: int, reason: str) -> Chosen:
    """The mix that takes `room` bytes, or what 4 bits take where that is more."""
    plan = plans.within(max(room, plans.four_bits.nbytes_after))
    four_bits = plans.four_bits.format_name
    name = f"{four_bits} and {plans.eight_bits.format_name}" if plan.mix is not None else four_bits
    return Chosen(plan, name, reason)


def four_bit_format(device: DeviceInfo) -> str:
    """Name of the best 4-bit format for a device."""
    return _row(device).four_bits


def _row(device: DeviceInfo) -> AutoRow:
    capability = device.capability or (0, 0)
    return next(row for row in AUTO_ROWS if capability >= row.capability)
