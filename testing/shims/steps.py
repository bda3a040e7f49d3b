"""Step times for benchmarks: where it is asked for, a sampling step is reported when the GPU is done with it.

ComfyUI reports a step when the processor has queued it. Over a few long steps the time between two reports says little
about the GPU: the second step seems short, and the last one long.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import latent_preview
import torch

SYNCHRONIZE = "LOWBIT_SYNCHRONIZE_STEPS"
"""The environment variable that asks for it."""


def install() -> None:
    """Wraps the callback that every sampler node gets from core, for stock ComfyUI as for the pack."""
    if not os.environ.get(SYNCHRONIZE) or not torch.cuda.is_available():
        return
    prepare = latent_preview.prepare_callback

    @functools.wraps(prepare)
    def prepare_synchronized(*arguments: Any, **named: Any) -> Callable[..., Any]:
        report = prepare(*arguments, **named)

        def callback(*values: Any) -> Any:
            torch.cuda.synchronize()
            return report(*values)

        return callback

    latent_preview.prepare_callback = prepare_synchronized
