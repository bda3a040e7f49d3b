"""Times ComfyUI's own attention beside the backend that `auto` chose, which has to be the faster one on this graph too."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .plan import Candidate, Request
from .report import Tally

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
        self._own_times = Tally(own.backend, own.tally.call, own.tally.budget)
        self._times = Tally(own.backend, own.tally.call, own.tally.budget)

    def anew(self) -> Trial:
        """The same for another backend."""
        return Trial(self.own)

    @property
    def is_over(self) -> bool:
        """Whether no more calls are needed."""
        return self._calls >= WARM_CALLS + TIMED_CALLS

    def call(self, request: Request, backend: Callable[[], torch.Tensor]) -> torch.Tensor:
        """One call of both, ComfyUI's own first, so that only one of the two outputs is held at a time."""
        timed = self._calls >= WARM_CALLS
        self._calls += 1
        try:
            self._run(lambda: self.own.on(request), self._own_times if timed else None, request)
        except Exception:  # whatever it cannot do, it is not asked for; with no time of its own it loses
            self._calls = WARM_CALLS + TIMED_CALLS
            self._own_times.clear()
            return backend()
        return self._run(backend, self._times if timed else None, request)

    @staticmethod
    def _run(call: Callable[[], torch.Tensor], times: Tally | None, request: Request) -> torch.Tensor:
        return call() if times is None else times.time(call, request.q.is_cuda)

    @property
    def failed(self) -> bool:
        """Whether it is over without times: ComfyUI's own could not take these calls."""
        return self.is_over and not (self._own_times.has_times and self._times.has_times)

    def verdict(self) -> tuple[float, float] | None:
        """(the backend's shortest milliseconds, ComfyUI's own longest) once known, without waiting for the GPU.

        The longest beside the shortest: a call that was held up by something else is no reason to change a kernel.
        """
        if not self.is_over or self.failed or not (self._times.is_done and self._own_times.is_done):
            return None
        self._times.resolve()
        self._own_times.resolve()
        return min(self._times.milliseconds), max(self._own_times.milliseconds)
