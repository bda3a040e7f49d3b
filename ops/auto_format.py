"""What `auto` and `smallest` stand for: the best formats for a GPU, a model and the memory there is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from ..kernels.measured import Numbers
from .checkpoint import Checkpoint
from .device_info import DeviceInfo
from .formats import AS_STORED, AUTO, FORMATS, SMALLEST, find_format
from .keep_rules import Rule
from .mixed_plan import TwoPlans
from .plan import Mix, QuantizationPlan, make_plan

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


@dataclass(frozen=True)
class FormatChooser:
    """What formats come to for one model on one device.

    Attributes:
        checkpoint: the model.
        device: where it will run.
        rules: the user's keep rules, None for the family's.
        measure: tells errors of layers: asked once, and only where formats have to be mixed.
        pinned: as `make_plan` takes it.
    """

    checkpoint: Checkpoint
    device: DeviceInfo
    rules: tuple[Rule, ...] | None
    measure: MeasureLayers
    pinned: Mapping[str, str] | None = None

    def choose(self, name: str) -> Chosen:
        """The plan in the format called `name`, one of `FORMAT_CHOICES`.

        Raises:
            CheckpointError, CapabilityError: as `make_plan` and `sampled_errors`.
            FormatError: there is no such format.
        """
        if name not in (AUTO, SMALLEST):
            weight_format = None if name == AS_STORED else find_format(name)
            plan = make_plan(self.checkpoint, weight_format, self.rules, pinned=self.pinned)
            return Chosen(plan, name, "asked for")
        plan, row = self._make(TEXT_ENCODER_FORMAT), _row(self.device)
        if not plan.changes_weights:
            reason = "the file's weights are quantized already, too small to be, or kept by a rule"
            return Chosen(self._make(AS_STORED), AS_STORED, reason)
        if name == SMALLEST:
            return _mixed(self.two_plans, 0, "asked for")
        if plan.family.kind == "text_encoder":
            return Chosen(plan, TEXT_ENCODER_FORMAT, "a text encoder runs once a prompt: 8-bit weights, 16-bit product")
        room = self.device.memory_bytes
        if not room or plan.nbytes_after <= STREAMING_LIMIT * room:
            return Chosen(self._make(row.eight_bits), row.eight_bits, row.reason)
        reason = (
            f"8 bits would take {plan.nbytes_after / 2**30:.1f} GiB, over {STREAMING_LIMIT:g} times the "
            f"{room / 2**30:.0f} GiB of {self.device.name}"
        )
        if row.four_bits_faster:
            return Chosen(self._make(row.four_bits), row.four_bits, reason)
        return _mixed(self.two_plans, room, reason)

    @functools.cached_property
    def two_plans(self) -> TwoPlans:
        """The model in the device's two formats, to mix.

        Raises:
            CheckpointError, CapabilityError: as `make_plan`.
        """
        row, plan = _row(self.device), self._make(TEXT_ENCODER_FORMAT)
        return TwoPlans(
            plan if plan.family.kind == "text_encoder" else self._make(row.eight_bits),
            self._make(row.four_bits),
            partial(self.measure, self.checkpoint),
            partial(self._make, row.four_bits),
        )

    def _make(self, name: str, mix: Mix | None = None) -> QuantizationPlan:
        weight_format = None if name == AS_STORED else FORMATS[name]
        return make_plan(self.checkpoint, weight_format, self.rules, named=False, pinned=self.pinned, mix=mix)


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
