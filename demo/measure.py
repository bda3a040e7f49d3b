"""Errors and sizes, as the demo and the tests report them."""

from __future__ import annotations

import torch


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64."""
    difference = value.double() - reference.double()
    return float(difference.norm() / reference.double().norm())
