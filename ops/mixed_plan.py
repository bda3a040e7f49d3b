"""Plans a model whose layers have the formats that fit their bytes and their errors, between a plan of 8 bits and one of 4."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ..kernels.measured import Numbers
from .formats import STORAGES, stored_nbytes
from .keep_rules import KEEP, QUANTIZE, Rule, first_match
from .layer_forms import Form, choose_forms, ladder_of
from .plan import LayerPlan, Mix, QuantizationPlan

BELOW_16_BITS = "int8"
"""Of layers that a family keeps in 16 bits, where bytes are short: only the weight is quantized, with a scale per row."""

Measure = Callable[[Mapping[str, Collection[str]]], Mapping[str, Numbers]]
"""Relative errors of a model's layers, by layer and format, for the formats named."""

_QUERIES_AND_KEYS = "q|k|k_img|wq|wk|to_q|to_k|to_query|to_key|q_proj|k_proj|add_q_proj|add_k_proj|linear_q|linear_k"
_LESS_SENSITIVE = (Rule(_QUERIES_AND_KEYS), Rule("*cross_attn*|attn2"))
_LESS = 0.5
"""Queries and keys only decide where attention looks, and cross-attention adds little to a token: for each of the rows that
matches, an error counts half. benchmarks/mixed.py measures it."""


@dataclass(frozen=True)
class TwoPlans:
    """A checkpoint in 8 bits, as where bytes are no matter, and in 4, and what tells errors.

    Attributes:
        eight_bits: the one.
        four_bits: the other: where it fits, no mix is less exact.
        measure: of the checkpoint.
        remake: `four_bits` with a mix.
    """

    eight_bits: QuantizationPlan
    four_bits: QuantizationPlan
    measure: Measure
    remake: Callable[[Mix], QuantizationPlan]

    def within(self, limit: int) -> QuantizationPlan:
        """The most exact plan that is found within `limit` bytes, or the smallest where there is none."""
        if self.eight_bits.nbytes_after <= limit:
            return self.eight_bits
        ladders = self._ladders()
        fixed = self.four_bits.nbytes_after - sum(self.four_bits.layers[name].nbytes_after for name in ladders)
        chosen = dict(zip(ladders, choose_forms(list(ladders.values()), limit - fixed), strict=True))
        formats = {
            name: form.weight_format
            for name, form in chosen.items()
            if form.weight_format != _format_of(self.four_bits.layers[name])
        }
        if not formats:
            return self.four_bits
        mixed = self.remake(Mix(limit, formats))
        fits = self.four_bits.nbytes_after <= limit
        return self.four_bits if fits and self.error(self.four_bits) <= self.error(mixed) else mixed

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that may be quantized."""
        return tuple(self._forms)

    def error(self, plan: QuantizationPlan) -> float:
        """The model's relative error with a plan's formats: that of its layers, each by its part of the weights."""
        errors, layers = self._errors, [plan.layers[name] for name in self._forms]
        loss = sum(_loss(layer, _format_of(layer), errors) for layer in layers)
        return math.sqrt(loss / max(sum(math.prod(layer.shape) for layer in layers), 1))

    @functools.cached_property
    def _errors(self) -> Mapping[str, Numbers]:
        formats = {name: [form for form in forms if form != KEEP] for name, forms in self._forms.items()}
        return self.measure({name: forms for name, forms in formats.items() if forms})

    @functools.cached_property
    def _forms(self) -> dict[str, dict[str, int]]:
        """Bytes by format of every layer that has one here, early blocks first: where all else is equal they get fewer bits."""
        forms = {}
        for name in sorted(self.eight_bits.layers, key=_block):
            layers = (self.eight_bits.layers[name], self.four_bits.layers[name])
            found = {_format_of(layer): layer.nbytes_after for layer in layers}
            if _may_be_lowered(self.eight_bits, layers[0]):
                rows, columns = layers[0].shape
                found[BELOW_16_BITS] = stored_nbytes(STORAGES[BELOW_16_BITS], rows, columns)
            if found.keys() != {KEEP}:
                forms[name] = found
        return forms

    def _ladders(self) -> dict[str, tuple[Form, ...]]:
        errors = self._errors
        return {
            name: ladder_of(
                [
                    Form(form, nbytes, _loss(self.eight_bits.layers[name], form, errors))
                    for form, nbytes in found.items()
                ]
            )
            for name, found in self._forms.items()
        }


def _format_of(layer: LayerPlan) -> str:
    return layer.weight_format if layer.action == QUANTIZE else KEEP


def _may_be_lowered(plan: QuantizationPlan, layer: LayerPlan) -> bool:
    """Whether it is in 16 bits only for its family's rules, which are for exactness."""
    rule = first_match(plan.rules, layer.name)
    kept = layer.action == KEEP and rule is not None and layer.reason == rule.reason
    return kept and rule in plan.family.rules and not (rule.structural or rule.always)


def _loss(layer: LayerPlan, format_name: str, errors: Mapping[str, Numbers]) -> float:
    if format_name == KEEP:
        return 0.0
    weight = math.prod(_LESS for rule in _LESS_SENSITIVE if rule.matches(layer.name))
    return math.prod(layer.shape) * (weight * errors[layer.name][format_name]) ** 2


def _block(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]
