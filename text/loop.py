"""Runs a decoder until a stop token: a few steps at a time, then one look at what they made."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from ..kernels.runtime import kernels_run_on
from .decoder import Decoder
from .graph import StepGraph

STEPS_A_LOOK = 8
"""Tokens between two waits for the device."""


def generate(
    decoder: Decoder,
    stop_tokens: Collection[int],
    *,
    graph: bool,
    seen: Callable[[int], None] = lambda count: None,
) -> list[int]:
    """The tokens of `decoder`, up to the first stop token, which is the last of them.

    Args:
        decoder: fresh, its first token drawn.
        stop_tokens: end the text.
        graph: replay a CUDA graph, where the device is a GPU.
        seen: told how many tokens after the first were new, at every look; what it raises ends the run.
    """
    tokens = decoder.tokens
    step: Callable[[], None] = decoder.step
    captured = None
    # Without Triton a step waits for the device, which a graph cannot hold.
    if graph and tokens.is_cuda and kernels_run_on(tokens):
        step = captured = StepGraph(decoder.step, decoder.sampler.generator)
    look = STEPS_A_LOOK if tokens.is_cuda else 1
    made: list[int] = tokens[:1].tolist()
    try:
        while made[-1] not in stop_tokens and len(made) < tokens.numel():
            count = min(look, tokens.numel() - len(made))
            for _ in range(count):
                step()
            fresh = tokens[len(made) : len(made) + count].tolist()
            stop = next((place for place, token in enumerate(fresh) if token in stop_tokens), count - 1)
            made += fresh[: stop + 1]
            seen(stop + 1)
        return made
    finally:
        if captured is not None:
            torch.cuda.current_stream().synchronize()
            captured.release()
