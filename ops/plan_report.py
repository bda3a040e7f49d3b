"""The dry run in words: per layer what happens and why, bytes before and after, and how this device will run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .device_info import DeviceInfo
from .foreign_layers import foreign_sentences
from .formats import FORMATS, STORAGES
from .linear_describe import describe_linear
from .linear_kitchen import kitchen_cuda_available
from .plan import LayerPlan, QuantizationPlan
from .quantize import storage_name_of
from .stored import with_speed

_ACTIONS = {"quantize": "quantized", "keep": "kept", "stored": "as stored"}
_PRODUCTS = {False: "", True: ", fast"}
_MIB = 2**20


def plan_summary(plan: QuantizationPlan) -> str:
    """One line: family, counts and bytes."""
    counts = Counter(layer.action for layer in plan.layers.values())
    parts = ", ".join(f"{counts[action]} {word}" for action, word in _ACTIONS.items() if counts[action])
    return (
        f"{plan.family.name}: {parts or 'no matrices'}; "
        f"{plan.nbytes_before / _MIB:,.1f} MiB before, {plan.nbytes_after / _MIB:,.1f} MiB after"
    )


def plan_report(
    checkpoint: Checkpoint, plan: QuantizationPlan, device: DeviceInfo, choice: str, trade: Sequence[str] = ()
) -> str:
    """The whole report as text.

    Args:
        checkpoint: the source.
        plan: what was decided.
        device: where it will run.
        choice: the format and why it was taken.
        trade: the lines of `trade_table`.
    """
    lines = [checkpoint.path.name, plan_summary(plan), *foreign_sentences(checkpoint.entries.values())]
    lines += [f"Format {choice}", f"On {device.label}:"]
    lines += [f"  {line}" for line in _verdicts(plan, device)]
    lines += trade
    lines += unmatched_sentences(plan)
    lines += _groups(plan)
    return "\n".join(lines)


def unmatched_sentences(plan: QuantizationPlan) -> list[str]:
    """One for each rule that decides nothing, as one with a slip of the pen does."""
    return [f"The rule '{pattern}' matches no layer of this file." for pattern in plan.unmatched]


def _verdicts(plan: QuantizationPlan, device: DeviceInfo) -> list[str]:
    """For each storage in the plan, how this device multiplies with it."""
    lines = []
    for storage_name, fast in sorted(_storages(plan)):
        verdict = describe_linear(
            STORAGES[storage_name].layout, fast=fast, cc=device.capability, kitchen_cuda=kitchen_cuda_available()
        )
        lines.append(f"{storage_name}{_PRODUCTS[fast]}: {verdict}")
    return lines or ["16-bit products only"]


def _storages(plan: QuantizationPlan) -> set[tuple[str, bool]]:
    """Storages in the plan, each with whether activations are quantized too: never in a text encoder."""
    found = set()
    for layer in plan.layers.values():
        if layer.action == "quantize":
            found.add((layer.storage, FORMATS[layer.weight_format].fast))
        elif layer.action == "stored" and _storage(plan, layer) in STORAGES:
            config = with_speed(plan.stored.layers[layer.name].config, plan.stored_fast)
            found.add((_storage(plan, layer), not config.get("full_precision_matrix_mult", False)))
    return {(name, fast and plan.family.kind != "text_encoder") for name, fast in found}


def _storage(plan: QuantizationPlan, layer: LayerPlan) -> str:
    """This pack's name of a layer's storage; core's, where the file holds what is none of these; empty in 16 bits."""
    if layer.action != "stored":
        return layer.storage
    try:
        return storage_name_of(plan.stored.layers[layer.name].config)
    except CheckpointError:
        return layer.storage


def _groups(plan: QuantizationPlan) -> list[str]:
    """A line a layer; the same layer of many blocks is one line."""
    groups: dict[tuple[str, ...], list[LayerPlan]] = {}
    for layer in plan.layers.values():
        pattern = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
        key = (pattern, "x".join(map(str, layer.shape)), layer.action, _storage(plan, layer), layer.reason)
        groups.setdefault(key, []).append(layer)
    lines = []
    for (pattern, shape, action, storage, reason), members in groups.items():
        name = members[0].name if len(members) == 1 else f"{pattern} ({len(members)} layers)"
        before = sum(layer.nbytes_before for layer in members) / _MIB
        after = sum(layer.nbytes_after for layer in members) / _MIB
        what = f"{_ACTIONS[action]} {storage}".strip()
        lines.append(f"{name}  {shape}  {what}: {reason}  [{before:.2f} -> {after:.2f} MiB]")
    return lines
