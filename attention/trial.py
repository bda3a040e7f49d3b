"""Times ComfyUI's own attention beside the backend that `auto` chose, which has to be the faster one on this graph too."""

from __future__ import annotations

import math

import torch

from .plan import Candidate, Request
from .times import Times

WARM_CALLS = 1
TIMED_CALLS = 2
MARGIN = 0.9
"""ComfyUI's own takes over below this part of the backend's time."""


class Trial:
    """A few calls that ComfyUI's own attention and a backend make in turn; only the backend's output is used.

    The table of backends was measured on some shapes; one between them may not suit a kernel. own: what ComfyUI would
    call. Both times are kept here: those of the report are of other calls, and start anew with each prompt.
    """

    def __init__(self, own: Candidate) -> None:
        self.own = own
        self._calls = 0
        self._own_times = Times()
        self._times = Times()

    def anew(self) -> Trial:
        """The same for another backend."""
        return Trial(self.own)

    @property
    def is_over(self) -> bool:
        """Whether no more calls are needed."""
        return self._calls >= WARM_CALLS + TIMED_CALLS

    def call(self, request: Request, backend: Candidate) -> torch.Tensor:
        """One call of both, ComfyUI's own first, so that only one of the two outputs is held at a time."""
        timed = self._calls >= WARM_CALLS
        self._calls += 1
        try:
            _run(self.own, request, self._own_times if timed else None)
        except Exception:  # whatever it cannot do, it is not asked for; with no time of its own it loses
            self._calls = WARM_CALLS + TIMED_CALLS
            self._own_times = Times()
            timed = False
        return _run(backend, request, self._times if timed else None)

    def verdict(self) -> tuple[float, float] | None:
        """(the backend's shortest milliseconds, ComfyUI's own longest) once known, without waiting for the GPU.

        The longest beside the shortest: a call that was held up by something else is no reason to change a kernel.
        ComfyUI's own takes for ever where it could not take these calls.
        """
        if not (self.is_over and self._times.are_known and self._own_times.are_known):
            return None
        return min(self._times.resolved(), default=0.0), max(self._own_times.resolved(), default=math.inf)


def _run(candidate: Candidate, request: Request, times: Times | None) -> torch.Tensor:
    if times is None:
        return candidate.on(request)
    return times.take(lambda: candidate.on(request), request.q.is_cuda)
