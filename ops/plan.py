"""Decides, from a checkpoint's header alone, what happens to each of its layers and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..kernels.runtime import dtype_name
from .checkpoint import Checkpoint
from .diffusion_names import part_prefix, tables
from .formats import FORMATS, STORAGES, WeightFormat, storage_for, stored_nbytes
from .header import TensorEntry
from .keep_rules import (
    EIGHT_BITS,
    KEEP,
    QUANTIZE,
    ModelFamily,
    Rule,
    affordable,
    detect_family,
    expand_rules,
    first_match,
    unmatched_rules,
)
from .quantize import require_layout
from .stored import StoredLayer, StoredLayers, find_stored_layers

SMALLEST_SIDE = 16
"""A matrix with fewer rows or columns than this stays as it is: nothing to gain."""

_EIGHT_BIT_FORMAT = "int8"
"""Of layers that shall have 8 bits where the model's format has 4: the most exact one."""

_STORED_BITS = {row.core_format: row.bits for row in STORAGES.values()}
_WIDE = frozenset({torch.float32, torch.float64})
_QUANTIZABLE = frozenset({torch.bfloat16, torch.float16}) | _WIDE


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one matrix.

    Attributes:
        name: the layer (its weight's name without `.weight`).
        shape: (out_features, in_features), as far as the file tells.
        dtype: dtype in the file.
        action: `quantize`, `keep` (16 bits) or `stored` (quantized in the file already).
        storage: key into `STORAGES` when quantized here, core's format name when stored, else empty.
        weight_format: name of the format when quantized here.
        reason: why.
        nbytes_before: bytes in the source.
        nbytes_after: bytes in the result.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    action: str
    storage: str
    weight_format: str
    reason: str
    nbytes_before: int
    nbytes_after: int


@dataclass(frozen=True)
class Mix:
    """Formats chosen layer by layer.

    Attributes:
        limit: bytes that the quantized model was to keep within.
        formats: a format's name, or `keep`, by layer; a layer that is not named has the plan's own format.
    """

    limit: int
    formats: Mapping[str, str]


@dataclass(frozen=True)
class QuantizationPlan:
    """The whole of it: every matrix, what else the file holds, and what the rules missed.

    `stored_fast` says whether layers that are quantized in the file may have their activations quantized too; None
    leaves that to the file. `mix` is None where all layers have one format, but for what the rules say.
    """

    family: ModelFamily
    weight_format: WeightFormat | None
    stored_fast: bool | None
    rules: tuple[Rule, ...]
    layers: Mapping[str, LayerPlan]
    stored: StoredLayers
    unmatched: tuple[str, ...]
    other_nbytes: int
    mix: Mix | None

    @property
    def format_name(self) -> str:
        """What the quantized file is called after."""
        if self.mix is not None:
            return "mixed"
        return self.weight_format.name if self.weight_format is not None else "merged"

    @property
    def nbytes_before(self) -> int:
        """Bytes of all tensors in the source."""
        return self.other_nbytes + sum(layer.nbytes_before for layer in self.layers.values())

    @property
    def nbytes_after(self) -> int:
        """Bytes of all tensors in the result, `comfy_quant` texts not counted."""
        return self.other_nbytes + sum(layer.nbytes_after for layer in self.layers.values())

    @property
    def changes_weights(self) -> bool:
        """Whether anything is quantized here, so that a new file is needed."""
        return any(layer.action == QUANTIZE for layer in self.layers.values())


def find_stored(checkpoint: Checkpoint) -> StoredLayers:
    """`find_stored_layers` on a checkpoint's header.

    Raises:
        CheckpointError: as there, with the file's name.
    """
    try:
        return find_stored_layers(
            {name: entry.dtype for name, entry in checkpoint.entries.items()},
            {name: entry.shape for name, entry in checkpoint.entries.items()},
            checkpoint.read,
            checkpoint.metadata,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path.name}: {error}") from None


def make_plan(
    checkpoint: Checkpoint,
    weight_format: WeightFormat | None,
    user_rules: Sequence[Rule] | None,
    *,
    named: bool = True,
    pinned: Mapping[str, str] | None = None,
    mix: Mix | None = None,
) -> QuantizationPlan:
    """Plan the quantization of `checkpoint`.

    Args:
        checkpoint: an opened checkpoint.
        weight_format: the format asked for; None leaves everything as stored.
        user_rules: what `parse_rules` made of the user's text; None for the family's rules.
        named: the user named the format, so that it also decides the product of layers that the file holds quantized.
        pinned: layers that stay as they are whatever the rules say, since ComfyUI does more with them than multiply,
            and why; None for those whose names say so.
        mix: formats that go before the rules.

    Raises:
        CheckpointError: what the file says of its own quantized layers cannot be believed.
        CapabilityError: the installed comfy-kitchen does not have the format.
    """
    stored = find_stored(checkpoint)
    matrices = {
        name.removesuffix(".weight"): entry
        for name, entry in checkpoint.entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    }
    every_layer = {name.rpartition(".")[0] for name in checkpoint.entries}
    family = detect_family(every_layer)
    prefix = part_prefix(checkpoint.entries)
    part = {name: entry for name, entry in matrices.items() if name.startswith(prefix)}
    elements = {name: _elements(entry.shape, stored.layers.get(name)) for name, entry in part.items()}
    pinned = {**_wide(part, elements, user_rules), **(tables(matrices) if pinned is None else pinned)}
    sizes = {name: count for name, count in elements.items() if name not in pinned}
    bits = 16 if weight_format is None else STORAGES[weight_format.storage].bits
    rules = affordable(expand_rules(user_rules, family), sizes, bits)
    layers: dict[str, LayerPlan] = {}
    for name, entry in matrices.items():
        if name in stored.layers:
            core_format = stored.layers[name].core_format
            decision = ("stored", core_format, "", f"quantized in the file already ({stored.layers[name].origin})")
        elif weight_format is None:
            decision = (KEEP, "", "", "not quantized")
        elif not name.startswith(prefix):
            decision = (KEEP, "", "", "not part of the diffusion model")
        elif name in pinned:
            decision = (KEEP, "", "", pinned[name])
        else:
            decision = _decide(name, entry.shape, entry.dtype, weight_format, rules, mix)
        layers[name] = _layer_plan(name, entry, *decision)
    total, of_matrices = (sum(entry.nbytes for entry in some.values()) for some in (checkpoint.entries, matrices))
    unmatched = unmatched_rules(rules if user_rules is None else user_rules, every_layer, user_written=bool(user_rules))
    return QuantizationPlan(
        family,
        weight_format,
        weight_format.fast if weight_format is not None and named else None,
        rules,
        layers,
        stored,
        tuple(rule for rule in unmatched if rule != "auto"),
        total - of_matrices,
        mix,
    )


def _layer_plan(name: str, entry: TensorEntry, action: str, storage: str, format_name: str, reason: str) -> LayerPlan:
    """A layer with what was decided of it. Raises CapabilityError as `make_plan`."""
    if action == QUANTIZE:
        require_layout(storage)
    after = stored_nbytes(STORAGES[storage], *entry.shape) if action == QUANTIZE else entry.plain_nbytes
    return LayerPlan(name, entry.shape, entry.dtype, action, storage, format_name, reason, entry.nbytes, after)


def _elements(shape: tuple[int, ...], stored: StoredLayer | None) -> int:
    """Of a matrix before it was packed: a file that is quantized already is planned by the sizes that it was by then."""
    bits = 8 if stored is None else _STORED_BITS.get(stored.core_format, 8)
    return math.prod(shape) * 8 // bits


def _wide(
    matrices: Mapping[str, TensorEntry], elements: Mapping[str, int], user_rules: Sequence[Rule] | None
) -> dict[str, str]:
    """The matrices in 32 bits of a file that is mostly in fewer, but for those that the user wants quantized; and why."""
    wide = [name for name, entry in matrices.items() if entry.dtype in _WIDE]
    if 2 * sum(elements[name] for name in wide) > sum(elements.values()):
        return {}
    asked = {name: first_match(user_rules or (), name) for name in wide}
    return {
        name: "in 32 bits, where the rest of the file is in fewer"
        for name, rule in asked.items()
        if rule is None or rule.action == KEEP
    }


def _decide(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_format: WeightFormat,
    rules: Sequence[Rule],
    mix: Mix | None,
) -> tuple[str, str, str, str]:
    if dtype not in _QUANTIZABLE:
        return KEEP, "", "", f"stored as {dtype_name(dtype)}"
    if min(shape) < SMALLEST_SIDE:
        return KEEP, "", "", f"smaller than {SMALLEST_SIDE} on a side"
    rule = first_match(rules, name)
    if mix is not None and name in mix.formats:
        rule = _chosen(mix.formats[name], rule)
    if rule is not None and rule.action == KEEP:
        return KEEP, "", "", rule.reason
    row = weight_format if rule is None else _asked_for(rule, weight_format)
    storage = storage_for(row, shape[1])
    reason = rule.reason if rule is not None else f"a linear layer of the {row.name} model"
    if storage != row.storage:
        reason = f"{shape[1]} columns are no multiple of {STORAGES[row.storage].column_multiple}: stored as {storage}"
    return QUANTIZE, storage, row.name, reason


def _chosen(format_name: str, rule: Rule | None) -> Rule:
    """The rule that a mix is for a layer, which `rule` would have decided."""
    if rule is not None and rule.action == KEEP:
        return Rule("*", format_name, reason=f"in fewer bits, which buy more elsewhere ({rule.reason})")
    return Rule("*", format_name, reason="in more bits: here they take away the most error for their bytes")


def _asked_for(rule: Rule, weight_format: WeightFormat) -> WeightFormat:
    if rule.action == EIGHT_BITS:
        return FORMATS[_EIGHT_BIT_FORMAT] if STORAGES[weight_format.storage].bits < 8 else weight_format
    return weight_format if rule.action == QUANTIZE else FORMATS[rule.action]
