"""Runs a decoder until a stop token: a few steps at a time, then one look at what they made."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

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
        seen: told how many tokens were new, after every look; what it raises ends the run.
    """
    tokens = decoder.tokens
    step: Callable[[], None] = decoder.step
    captured = None
    if graph and tokens.is_cuda:
        step = captured = StepGraph(decoder.step, decoder.sampler.generator)
    look = STEPS_A_LOOK if tokens.is_cuda else 1
    made: list[int] = []
    try:
        while True:
            made_now = tokens[len(made) : len(made) + look if made else 1].tolist()
            for token in made_now:
                made.append(token)
                if token in stop_tokens:
                    seen(made_now.index(token) + 1)
                    return made
            seen(len(made_now))
            if len(made) == tokens.numel():
                return made
            for _ in range(min(look, tokens.numel() - len(made))):
                step()
    finally:
        if captured is not None:
            torch.cuda.current_stream().synchronize()
            captured.release()
