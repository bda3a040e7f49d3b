"""How many processes make a forward fastest: tried in the first forwards of a model and size, and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence

from ...kernels.measured import MeasuredNumbers

FILE_NAME = "several_gpus.json"
TRIES = 3
"""Forwards with each number of processes. The first is not counted: kernels are compiled in it, and processes connect."""
LONG = 1.0
"""Seconds. A forward that takes longer keeps the GPUs busy, not the processors that feed them: more of them are faster."""


class Trial:
    """One model and size. Fewer processes are tried as long as that is faster; the fastest number stays.

    Args:
        counts: numbers of processes, the largest first.
        kept: what was measured before, and what will have been.
        where: the machine, as `kept` names it.
        what: the model and size.
    """

    def __init__(self, counts: Sequence[int], kept: MeasuredNumbers, where: str, what: str):
        self._counts = list(counts)
        self._kept, self._where, self._what = kept, where, what
        known = kept.get(where, what) or {}
        self._seconds = {count: known[str(count)] for count in counts if str(count) in known}
        self._taken: list[float] = []
        self.settled = bool(self._seconds)

    @property
    def count(self) -> int:
        """How many processes the next forward is for; one that is to be timed, unless the number is settled."""
        if self.settled:
            return min(self._seconds, key=self._seconds.__getitem__)
        return self._counts[len(self._seconds)]

    def took(self, seconds: float) -> None:
        """How long the forward took."""
        self._taken.append(seconds)
        if len(self._taken) < TRIES:
            return
        counted, self._taken = min(self._taken[1:]), []
        self._seconds[self.count] = counted
        slower = counted > min(self._seconds.values())
        if slower or counted > LONG or len(self._seconds) == len(self._counts):
            self._settle()

    def failed(self) -> bool:
        """There was no memory for the forward: so few are not tried again. Whether it can be done again, by more."""
        more = {count: taken for count, taken in self._seconds.items() if count > self.count}
        if more:
            self._seconds, self._taken = more, []
            self._settle()
        return bool(more)

    def _settle(self) -> None:
        self.settled = True
        self._kept.put(self._where, {self._what: {str(count): taken for count, taken in self._seconds.items()}})
