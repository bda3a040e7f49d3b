"""What the dispatcher knows and is asked: the user's policy, one call's request, the candidates for one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .backends import AttentionCall, Backend
from .calls import Kernel
from .checks import prepared
from .report import Struck, Tally

AUTO, MEASURED = "auto", "measured"

# The last resort: ComfyUI's own attention on its own arguments. True leaves the mask out.
Core = Callable[[bool], torch.Tensor]


@dataclass(frozen=True)
class Policy:
    """What the user chose. backend: auto, measured or a name. budget: exact, balanced or fast.

    stop: raise CapabilityError when a backend asked for by name cannot run here, instead of falling back.
    paired: the backend that suits the model's quantized weights, None for none.
    """

    backend: str = AUTO
    budget: str = "balanced"
    stop: bool = False
    paired: str | None = None

    @property
    def effective_budget(self) -> str:
        """Weights in 8 or 4 bits with pairing on make `balanced` into `fast`: the model has already paid that error."""
        return "fast" if self.paired and self.budget == "balanced" else self.budget


class Request(NamedTuple):
    """One call as it came: (batch, heads, length, head_dim) tensors, the mask as it was given, and the last resort.

    drop_mask: a mask was given, and left out because it masks nothing. heads_first: the output keeps the heads in front.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    exact: bool
    core: Core
    drop_mask: bool
    heads_first: bool


class Candidate:
    """A backend ready for one shape. kernel is None for ComfyUI's own attention."""

    __slots__ = ("backend", "kernel", "contiguous", "limit", "lossy", "tally", "struck")

    def __init__(self, name: str, kernel: Kernel | None, backend: Backend | None, limit: float, tally: Tally):
        self.backend = name
        self.kernel = kernel
        self.contiguous = backend is not None and backend.contiguous
        self.lossy = backend is not None and backend.error_class != "exact"
        self.limit = limit
        self.tally = tally
        self.struck: Struck | None = None

    def on(self, request: Request) -> torch.Tensor:
        """The output for a request whose mask has four dimensions, unchecked."""
        assert self.kernel is not None
        q, k, v = (prepared(x, self.contiguous) for x in request[:3])
        return self.kernel(q, k, v, request.mask, request.scale)


class Plan:
    """What is done with calls of one shape: candidates in order, and how far the first usable one is known."""

    __slots__ = ("call", "candidates", "current", "checked", "settled", "out_shape", "flat_shape", "reference")

    def __init__(self, call: AttentionCall, candidates: list[Candidate], reference: Kernel | None):
        self.call = call
        self.candidates = candidates
        self.reference = reference
        self.out_shape = torch.Size((call.batch, call.heads, call.q_len, call.value_dim))
        self.flat_shape = (call.batch, call.q_len, call.heads * call.value_dim)
        self.current = candidates[0]
        self.advance()

    def advance(self) -> None:
        """Makes the first candidate that is not struck off the current one."""
        self.current = next(candidate for candidate in self.candidates if candidate.struck is None)
        self.checked = 0
        self.settled = False
