"""Chooses a form for each layer: as exact as a limit of bytes allows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """One way to store a layer.

    Attributes:
        weight_format: a format's name, or `KEEP` for 16 bits.
        nbytes: that the layer takes.
        loss: what it adds to the model's squared error.
    """

    weight_format: str
    nbytes: int
    loss: float


def ladder_of(forms: Sequence[Form]) -> tuple[Form, ...]:
    """The forms that save bytes at the price of exactness, the largest first: what another one beats in both is left out."""
    ladder: list[Form] = []
    for form in sorted(forms, key=lambda form: (-form.nbytes, -form.loss)):
        while ladder and ladder[-1].loss >= form.loss:
            ladder.pop()
        ladder.append(form)
    return tuple(ladder)


def choose_forms(ladders: Sequence[Sequence[Form]], limit: int) -> tuple[Form, ...]:
    """A form of each ladder, of no more than `limit` bytes together where that can be.

    All begin at their largest form. Steps down are taken in the order of error added for a byte saved, until they fit. The order does not
    depend on the limit, so that more bytes never make a layer less exact. Of equal steps the earlier ladder's is first.

    Args:
        ladders: of each layer, as `ladder_of` gives them.
        limit: bytes.
    """
    steps = []
    for place, ladder in enumerate(ladders):
        price = 0.0
        for rung, (above, below) in enumerate(itertools.pairwise(ladder), 1):
            # A cheap step behind a dear one has to wait for that.
            price = max(price, (below.loss - above.loss) / (above.nbytes - below.nbytes))
            steps.append((price, place, rung))
    chosen = [ladder[0] for ladder in ladders]
    total = sum(form.nbytes for form in chosen)
    for _, place, rung in sorted(steps):
        if total <= limit:
            break
        form = ladders[place][rung]
        total -= chosen[place].nbytes - form.nbytes
        chosen[place] = form
    return tuple(chosen)
