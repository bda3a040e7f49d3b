"""The one node's work: quantizes a model and puts attention and the memory manager on it, as a preset says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..attention.backends import BACKENDS, ERROR_LIMITS
from ..attention.candidates import AUTO as AUTO_BACKEND
from ..attention.candidates import Policy
from ..attention.environment import detect
from ..attention.schedule import Schedule
from ..memory.components import size_text
from ..memory.policies import POLICIES, Settings
from ..ops.formats import AS_STORED, AUTO, SMALLEST
from .attention.installing import find_override, install_override
from .memory.manager import manage
from .weights.folders import cache_folder
from .weights.loading import load_diffusion_model
from .weights.main_memory import check_load
from .weights.preparing import Planned, Request, check_disk
from .weights.quantizing import plan_model, quantize_model


@dataclass(frozen=True)
class Preset:
    """One row of the table.

    Attributes:
        name: as the node shows it.
        weight_format: a name of `FORMAT_CHOICES`.
        error_budget: a name of attention's `BUDGETS`.
        memory_policy: a name of memory's `POLICIES`.
    """

    name: str
    weight_format: str
    error_budget: str
    memory_policy: str


_ROWS = (
    Preset("balanced", AUTO, "balanced", "auto"),
    Preset("fastest", AUTO, "fast", "speed"),
    Preset("most exact", AS_STORED, "exact", "auto"),
    Preset("smallest", SMALLEST, "balanced", "balanced"),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({row.name: row for row in _ROWS})
"""Preset name -> its row."""


@dataclass(frozen=True)
class Optimized:
    """What came of it.

    Attributes:
        model, clip, vae: clones with everything on them; None where none came in.
        text: three lines on weights, attention and memory.
        report: every layer of the model.
    """

    model: Any
    clip: Any | None
    vae: Any | None
    text: str
    report: str


def optimize(model: Any, clip: Any | None, vae: Any | None, preset: Preset, node_id: str | None) -> Optimized:
    """Quantize `model`, unless this pack loaded it quantized, and put attention and the memory manager on it.

    Args:
        model: a ModelPatcher from any loader, with whatever LoRAs and patches are on it.
        clip: a CLIP to keep within the memory budget too, or None.
        vae: a VAE, likewise.
        preset: a row of `PRESETS`.
        node_id: of the node, for the meter.

    Raises:
        CheckpointError, FormatError, CapabilityError, StorageError, MemoryBudgetError: as the single nodes.
    """
    planned = _planned(model, preset)
    if planned.plan.changes_weights or not (_made_here(model) or preset.weight_format == AS_STORED):
        check_disk(planned)
        check_load(planned)
        model = quantize_model(model, planned)
    model, _ = install_override(model, Policy(AUTO_BACKEND, preset.error_budget), Schedule(), True, cache_folder())
    text = "\n".join((_weights_line(planned), _attention_line(model), _memory_line(planned, preset)))
    managed = manage(model, clip, vae, Settings(preset.memory_policy), node_id)
    return Optimized(*managed, text, planned.report)


def _planned(model: Any, preset: Preset) -> Planned:
    planned = plan_model(model, Request(preset.weight_format))
    if planned.plan.changes_weights and planned.plan.stored.layers and _made_here(model):
        return plan_model(model, Request(AS_STORED))  # what its loader kept in 16 bits was kept on purpose
    return planned


def _made_here(model: Any) -> bool:
    """Whether this pack's own loader made the model."""
    return (model.cached_patcher_init or (None,))[0] is load_diffusion_model


def _weights_line(planned: Planned) -> str:
    plan = planned.plan
    before, after = plan.nbytes_before, plan.nbytes_after
    if plan.changes_weights:
        name = planned.choice.partition(":")[0]
        return f"Weights: {size_text(before)} -> {size_text(after)} as {name}; {size_text(before - after)} less to hold and to move."
    stored = len(plan.stored.layers)
    why = f"{stored} layers were quantized already" if stored else "16 bits or more, as the file has them"
    return f"Weights: {size_text(after)}, left as they are ({why})."


def _attention_line(model: Any) -> str:
    environment = detect(model.load_device)
    if environment.device_type != "cuda":
        return "Attention: ComfyUI's own, as there is no GPU to choose a backend for."
    override = find_override(model)
    budget = override.dispatcher.policy.effective_budget if override is not None else "exact"
    limit = ERROR_LIMITS[budget]
    usable = [
        row.name for row in BACKENDS if ERROR_LIMITS[row.error_class] <= limit and not row.why_not_here(environment)
    ]
    names = ", ".join((*usable, "ComfyUI's own"))
    return f"Attention: budget {budget} (errors up to {limit:.1%}); the fastest of {names}, timed here when a shape first appears."


def _memory_line(planned: Planned, preset: Preset) -> str:
    total = planned.chooser.device.memory_bytes
    head = f"Memory: policy {preset.memory_policy}"
    if not total:
        return f"{head}; there is no GPU to keep within, steps are measured."
    after = planned.plan.nbytes_after
    over = after - int(POLICIES[preset.memory_policy].resident_fraction * total)
    if over > 0:
        fit = f"at least {size_text(over)} of the weights stream from main memory at each step"
    else:
        fit = f"the weights leave {size_text(total - after)} of it for the rest"
    return f"{head}, limit the whole card ({size_text(total)}); {fit}."
