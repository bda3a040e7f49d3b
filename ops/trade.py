"""The dry run's table: bytes, time and error of a model as small as it gets, as `auto` makes it, and as the file has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import CapabilityError
from .auto_format import FormatChooser
from .formats import AS_STORED, AUTO, SMALLEST
from .keep_rules import KEEP, MODULATION_LAYERS, QUANTIZE, Rule
from .plan import LayerPlan, QuantizationPlan

TOKENS = 4096
"""Of the step whose time is told: an image of 1024 x 1024, or a short clip."""

ROWS: Mapping[str, str] = {"smallest": SMALLEST, "balanced": AUTO, "most exact": AS_STORED}
"""What the table and the presets of Optimize call it -> the format."""

_NOT_AT_EVERY_TOKEN = (Rule(MODULATION_LAYERS), Rule("*", outside_blocks=True))


@dataclass(frozen=True)
class StepProduct:
    """What a layer multiplies in a step, as far as its time goes.

    Attributes:
        rows: of its input.
        shape: (out_features, in_features).
        weight_format: a format's name, or `keep` for 16 bits.
    """

    rows: int
    shape: tuple[int, ...]
    weight_format: str


Milliseconds = Callable[[QuantizationPlan, list[StepProduct]], float | None]
"""Time of a step of a plan's products; None where it cannot be told."""


def product_of(layer: LayerPlan, tokens: int = TOKENS) -> StepProduct:
    """What a layer multiplies in a step: modulation and what stands outside the blocks see one row, as good as none."""
    rows = 1 if any(rule.matches(layer.name) for rule in _NOT_AT_EVERY_TOKEN) else tokens
    return StepProduct(rows, layer.shape, layer.weight_format if layer.action == QUANTIZE else KEEP)


def trade_table(chooser: FormatChooser, milliseconds: Milliseconds | None = None) -> list[str]:
    """The lines of the table, none where nothing can be quantized or mixed.

    Args:
        chooser: of the model.
        milliseconds: tells the time of a step; None where nothing is measured.

    Raises:
        CheckpointError: as `FormatChooser.choose`.
    """
    try:
        plans = chooser.two_plans
        if not plans.eight_bits.changes_weights:
            return []
        chosen = {title: chooser.choose(name) for title, name in ROWS.items()}
    except CapabilityError:
        return []
    lines = [f"{'':<10} {'GiB':>7} {'ms a step':>9} {'error':>7}"]
    for title, choice in chosen.items():
        products = [product_of(choice.plan.layers[name]) for name in plans.names]
        time = None if milliseconds is None else milliseconds(choice.plan, products)
        shown = "-" if time is None else f"{time:.1f}"
        size = choice.plan.nbytes_after / 2**30
        lines.append(f"{title:<10} {size:>7.3g} {shown:>9} {100 * plans.error(choice.plan):>6.2f}%  {choice.name}")
    about = f"ms a step: what may be quantized, at {TOKENS:,} tokens; error: of the weights, as they bear on the output"
    return [*lines, about]
