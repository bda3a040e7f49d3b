"""Reads the next tensor and writes the last one while one is quantized: a GPU would wait for the disk otherwise."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

MOST_AHEAD = 256 << 20
"""Bytes of a tensor up to which it is read or written beside others; larger ones come alone, for the memory they take."""


def read_ahead(
    names: Iterable[str], nbytes: Callable[[str], int], read: Callable[[str], torch.Tensor]
) -> Generator[tuple[str, Callable[[], torch.Tensor]], None, None]:
    """Each name, in order, and what gives its tensor, once; while the caller works on it, the next is read.

    Args:
        names: of the tensors.
        nbytes: size of one.
        read: its content; what it raises is raised when it is asked for.
    """
    with ThreadPoolExecutor(1, "lowbit-reader") as reader:

        def start(name: str) -> list[Callable[[], torch.Tensor]]:
            return [reader.submit(read, name).result if nbytes(name) <= MOST_AHEAD else partial(read, name)]

        waiting = deque(names)
        following = start(waiting[0]) if waiting else []
        while waiting:
            # Whoever takes the tensor has the only reference to it.
            name, taken = waiting.popleft(), following
            following = start(waiting[0]) if waiting else []
            yield name, partial(_take, taken)
            taken.clear()


def _take(waiting: list[Callable[[], torch.Tensor]]) -> torch.Tensor:
    return waiting.pop()()


class WriteBehind:
    """Calls writes one after the other on a thread of its own. What one of them raises is raised by the next call here."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, "lowbit-writer")
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._nbytes = 0

    def close(self) -> None:
        """Drop what has not begun, and wait for what has."""
        self._writer.shutdown(wait=True, cancel_futures=True)

    def add(self, nbytes: int, write: Callable[[], None]) -> None:
        """Call `write`, which holds `nbytes` of memory, after all before it; wait while they hold too much."""
        self.wait(MOST_AHEAD - nbytes)
        self._pending.append((nbytes, self._writer.submit(write)))
        self._nbytes += nbytes
        if nbytes > MOST_AHEAD:
            self.wait()

    def wait(self, most: int = 0) -> None:
        """Until what is not written yet holds at most that many bytes."""
        while self._pending and self._nbytes > max(most, 0):
            nbytes, future = self._pending.popleft()
            self._nbytes -= nbytes
            future.result()
