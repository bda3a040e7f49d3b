"""A LoRA's low-rank update kept beside a quantized weight: x @ down.T @ up.T, added to the product in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """One LoRA on one weight, its tensors those of the LoRA's file.

    Attributes:
        up: (rows, rank).
        down: (rank, columns).
        scale: what their product is multiplied by.
        first_row: where its rows begin in the weight: a fused qkv has a LoRA for each of its three parts.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    first_row: int

    @property
    def identity(self) -> tuple[int, int, float, int]:
        """Equal for equal updates, as long as one of them lives: its tensors are not compared."""
        return (self.up.data_ptr(), self.down.data_ptr(), self.scale, self.first_row)

    @property
    def rows(self) -> slice:
        """The weight's rows that it changes."""
        return slice(self.first_row, self.first_row + self.up.shape[0])


@dataclass(frozen=True)
class Factors:
    """Updates ready to be multiplied: every `down` in one matrix, so that the input is read once.

    Attributes:
        down: (sum of ranks, columns).
        ups: for each span of rows the columns of `down`'s product that it takes, and (rows, their ranks), scaled.
    """

    down: torch.Tensor
    ups: tuple[tuple[slice, slice, torch.Tensor], ...]

    def covers(self, rows: int) -> bool:
        """Whether there is one span only, of all rows."""
        return len(self.ups) == 1 and self.ups[0][2].shape[0] == rows

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return self.down.nbytes + sum(up.nbytes for _, _, up in self.ups)


class SideProduct:
    """What the LoRAs on one quantized linear add to its output.

    Resident, it holds `Factors` on the weight's device; else they are made for each call, as a streamed weight is.
    """

    def __init__(self, updates: Sequence[LowRankUpdate]) -> None:
        self._updates = tuple(sorted(updates, key=lambda update: (update.first_row, update.up.shape[0])))
        self._resident: Factors | None = None

    def is_of(self, updates: Sequence[LowRankUpdate]) -> bool:
        """Whether it was made of just these."""
        return sorted(update.identity for update in updates) == sorted(update.identity for update in self._updates)

    def factors_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that `keep` takes."""
        return sum(update.up.numel() + update.down.numel() for update in self._updates) * dtype.itemsize

    @property
    def resident_nbytes(self) -> int:
        """Bytes that are kept now."""
        return self._resident.nbytes if self._resident is not None else 0

    def keep(self, device: torch.device, dtype: torch.dtype) -> None:
        """Hold the factors on `device` from now on."""
        self._resident = self._factors(device, dtype)

    def release(self) -> None:
        """Hold nothing but the LoRA's own tensors."""
        self._resident = None

    def added_to(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """out + x @ (up @ down).T, written into `out` where no gradient is asked for.

        Args:
            out: (..., rows), the product without the LoRAs.
            x: (..., columns), its input.
        """
        factors = self._resident
        if factors is None or factors.down.device != x.device or factors.down.dtype != x.dtype:
            factors = self._factors(x.device, x.dtype)
        flat = out.reshape(-1, out.shape[-1])
        if flat.requires_grad or (torch.is_grad_enabled() and x.requires_grad):
            flat = flat.clone()
        hidden = F.linear(x.reshape(-1, x.shape[-1]), factors.down)
        if factors.covers(flat.shape[1]):
            flat.addmm_(hidden, factors.ups[0][2].t())
        else:
            for rows, ranks, up in factors.ups:
                flat[:, rows].addmm_(hidden[:, ranks], up.t())
        return flat.view(out.shape)

    def _factors(self, device: torch.device, dtype: torch.dtype) -> Factors:
        down = torch.cat([update.down.to(device, dtype) for update in self._updates])
        spans: list[tuple[slice, slice, list[torch.Tensor]]] = []
        rank = 0
        for update in self._updates:
            up = (update.up.to(device, torch.float32) * update.scale).to(dtype)
            end = rank + up.shape[1]
            if spans and spans[-1][0] == update.rows:
                rows, ranks, ups = spans.pop()
                spans.append((rows, slice(ranks.start, end), [*ups, up]))
            else:
                spans.append((update.rows, slice(rank, end), [up]))
            rank = end
        return Factors(down, tuple((rows, ranks, torch.cat(ups, dim=1)) for rows, ranks, ups in spans))
