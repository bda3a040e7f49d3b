"""The Wan text-to-video transformer on a table of parameters: diffusers' class, made to be trained.

Wan attends to 512 text tokens, all but a few of them padding with one and the same embedding. Here the padding is one
token whose attention counts as many times: the same result for a fraction of the work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch.func import functional_call

from demo.shapes_in_diffusers import TEXT_TOKENS, TRANSFORMER_SIZES, wan_transformer
from testing.tiny.wan import WanConfig

Parameters = Mapping[str, torch.Tensor]


class _CountedPadding(WanAttnProcessor):
    """Attends to text whose last token stands for all of its padding. counted: what is added to the logits."""

    def __init__(self, counted: torch.Tensor) -> None:
        super().__init__()
        self.counted = counted

    def __call__(self, attn: Any, hidden_states: torch.Tensor, text: torch.Tensor, *_: Any) -> torch.Tensor:
        return super().__call__(attn, hidden_states, text, attention_mask=self.counted)


def velocity(
    parameters: Parameters,
    latent: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    real: torch.Tensor,
    config: WanConfig = TRANSFORMER_SIZES,
) -> torch.Tensor:
    """The flow's velocity, noise minus clean, at a noisy latent.

    Args:
        latent: (batch, 16, frames, height, width), height and width even.
        sigma: (batch,), the share of noise, 0 to 1.
        text: (batch, tokens, width) from the text encoder.
        real: (batch, tokens), False where a token is padding.
    """
    model = _model(config)
    padding = (TEXT_TOKENS - real.sum(dim=1, keepdim=True)).to(text.dtype).log()
    counted = torch.cat([torch.zeros(real.shape, dtype=text.dtype).masked_fill(~real, -math.inf), padding], dim=1)
    for block in model.blocks:
        block.attn2.set_processor(_CountedPadding(counted[:, None, None]))
    inputs = {
        "hidden_states": latent,
        "timestep": 1000 * sigma,
        "encoder_hidden_states": F.pad(text, (0, 0, 0, 1)),
        "return_dict": False,
    }
    return functional_call(model, convert_wan_transformer_to_diffusers(dict(parameters)), kwargs=inputs)[0]


@functools.cache
def _model(config: WanConfig) -> torch.nn.Module:
    return wan_transformer(config).eval()
