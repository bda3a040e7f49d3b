"""One decoding step as a CUDA graph: captured once a run, replayed for every token."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.lru_cache(maxsize=16)
def _place(index: int) -> tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]:
    """The stream that steps of a device are captured on, and a graph of nothing whose memory pool they all share.

    A stream or a pool of each capture's own would stay behind when it is over: kernels keep scratch memory by stream, and
    the allocator does not use a dead graph's pool again.
    """
    stream, graph = torch.cuda.Stream(index), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=torch.device("cuda", index))
        graph.capture_end()
    return stream, graph


class StepGraph:
    """Runs a step, first as it is, then as a graph.

    The first step runs eagerly on the stream of the capture, which compiles kernels and makes what they keep; nothing
    is captured twice, and a capture runs nothing.
    """

    def __init__(self, step: Callable[[], None], generator: torch.Generator | None) -> None:
        """`generator`: where the step's random numbers come from, or None."""
        self._step, self._generator = step, generator
        self._stream, self._pool = _place(torch.cuda.current_device())
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self) -> None:
        """The next step, in the order of the current stream."""
        if self._graph is not None:
            self._graph.replay()
            return
        current = torch.cuda.current_stream()
        if not self._warm:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._step()
            current.wait_stream(self._stream)
            self._warm = True
            return
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        self._stream.wait_stream(current)
        # Not torch.cuda.graph: it empties the allocator's cache first, which takes as long as dozens of tokens.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool.pool(), capture_error_mode="thread_local")
            try:
                self._step()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        self._graph = graph
        graph.replay()

    def release(self) -> None:
        """Give the graph's memory back."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
