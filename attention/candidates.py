"""What the dispatcher knows and is asked: the user's policy, one call's inputs, the candidates for one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .backends import CORE, CORE_EXACT, AttentionCall
from .calls import Kernel
from .checks import prepared
from .report import Struck, Tally

AUTO = "auto"
NEVER = 0

# The last resort: ComfyUI's own attention on its own arguments. True leaves the mask out.
Core = Callable[[bool], torch.Tensor]


@dataclass(frozen=True)
class Policy:
    """What the user chose. backend: auto or a name. budget: exact, balanced or fast.

    stop: raise CapabilityError when a backend asked for by name cannot run here, instead of falling back.
    paired: the backends that suit the model's quantized weights.
    """

    backend: str = AUTO
    budget: str = "balanced"
    stop: bool = False
    paired: tuple[str, ...] = ()

    @property
    def effective_budget(self) -> str:
        """Weights in 8 or 4 bits with pairing on make `balanced` into `fast`: the model has already paid that error."""
        return "fast" if self.paired and self.budget == "balanced" else self.budget


class AttentionInputs(NamedTuple):
    """One call as it came.

    q: (batch, heads, q_len, head_dim); k, v: (batch, kv_heads, kv_len, head_dim); any strides. mask: 2 to 4 dimensions,
    bool or added. scale: None for head_dim ** -0.5. exact: only backends of the exact class. core: the last resort.
    heads_first: the output keeps the heads in front. core_exact: an exact last resort, given when `core` is a lossy kernel.
    core_name: which function `core` is, for the timing file. drop_mask: a mask was given, and left out because it masks
    nothing; the dispatcher says so.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    exact: bool
    core: Core
    heads_first: bool = False
    core_exact: Core | None = None
    core_name: str = CORE
    drop_mask: bool = False

    def own(self, name: str) -> torch.Tensor:
        """ComfyUI's own attention: CORE, or CORE_EXACT where that is another function."""
        call = self.core if name != CORE_EXACT or self.core_exact is None else self.core_exact
        return call(self.drop_mask)


@dataclass(eq=False, slots=True)
class Candidate:
    """A backend ready for one shape.

    kernel: None for ComfyUI's own attention. limit: the error it is held to. contiguous, as_they_are: as of `Backend`.
    """

    backend: str
    tally: Tally
    kernel: Kernel | None
    lossy: bool
    limit: float
    contiguous: bool = False
    as_they_are: bool = False
    struck: Struck | None = None

    def on(self, inputs: AttentionInputs) -> torch.Tensor:
        """The output for inputs whose mask has four dimensions, unchecked."""
        if self.kernel is None:
            return inputs.own(self.backend)
        q, k, v = inputs[:3]
        if not self.as_they_are:
            q, k, v = (prepared(x, self.contiguous) for x in (q, k, v))
        return self.kernel(q, k, v, inputs.mask, inputs.scale)


class ShapePlan:
    """What is done with calls of one shape: candidates in order, and how far the first usable one is known.

    checked, attempts: calls whose output was judged, and those that could not be judged because their inputs were not
    finite. left: calls until the next one that is checked, which is then number 1; NEVER for none. since: the model call
    in which the current candidate took over. references: exact kernels to compare with.
    """

    __slots__ = (
        "call", "candidates", "current", "checked", "attempts", "left", "since", "seen", "out_shape", "flat_shape",
        "references",
    )  # fmt: skip

    def __init__(self, call: AttentionCall, candidates: list[Candidate], references: Sequence[Kernel], since: int):
        self.call = call
        self.candidates = candidates
        self.references = references
        self.out_shape = torch.Size((call.batch, call.heads, call.q_len, call.value_dim))
        self.flat_shape = (call.batch, call.q_len, call.heads * call.value_dim)
        self.current = candidates[0]
        self.advance(since)

    def advance(self, since: int) -> None:
        """Makes the first candidate that is not struck off the current one."""
        self.current = next(candidate for candidate in self.candidates if candidate.struck is None)
        self.checked = self.attempts = 0
        self.left = 1
        self.since = since
        self.seen = self.current.tally.calls
