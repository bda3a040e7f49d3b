"""Times ComfyUI's own attention beside the backend that `auto` chose, which has to be the faster one on this graph too."""

from __future__ import annotations

from .plan import Candidate, Request
from .report import Tally

WARM_CALLS = 1
TIMED_CALLS = 2
MARGIN = 0.9
"""ComfyUI's own takes over below this part of the backend's time."""


class Trial:
    """ComfyUI's own attention on a few calls' tensors, its output thrown away, so that every run computes the same.

    The table of backends was measured on some shapes; one between them may not suit a kernel. own: the last resort that
    may take these calls.
    """

    def __init__(self, own: Candidate) -> None:
        self._own = own
        self._tally = Tally(own.backend, own.tally.call, own.tally.budget)
        self._calls = 0

    @property
    def is_over(self) -> bool:
        """Whether no more calls are needed."""
        return self._calls >= WARM_CALLS + TIMED_CALLS

    def call(self, request: Request) -> None:
        """One call more, before the backend's own: only one of the two outputs is held at a time."""
        self._calls += 1
        try:
            if self._calls <= WARM_CALLS:
                self._own.on(request)
            else:
                self._tally.time(lambda: self._own.on(request), request.q.is_cuda)
        except RuntimeError:  # no memory for it, say: the backend is not to blame
            self._calls = WARM_CALLS + TIMED_CALLS

    def verdict(self, candidate: Candidate) -> tuple[float, float] | None:
        """(the backend's shortest milliseconds, ComfyUI's own longest) once known, without waiting for the GPU.

        The longest beside the shortest: a call that was held up by something else is no reason to change a kernel.
        """
        if not (self.is_over and self._tally.is_timed and candidate.tally.is_timed):
            return None
        candidate.tally.resolve()
        self._tally.resolve()
        return min(candidate.tally.milliseconds), max(self._tally.milliseconds)
