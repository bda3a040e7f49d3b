"""The Wan 2.1 VAE on a table of parameters: diffusers' class, made to be trained.

Activations are (batch, frames, channels, height, width).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch.func import functional_call

from demo.shapes_in_diffusers import wan_vae

Parameters = Mapping[str, torch.Tensor]


def encode(parameters: Parameters, video: torch.Tensor) -> torch.Tensor:
    """Latent means of `video` in [-1, 1]: (batch, 4 n + 1, 3, height, width) -> (batch, n + 1, 16, height/8, width/8)."""
    return _call(parameters, "encode", video.transpose(1, 2)).latent_dist.mean.transpose(1, 2)


def decode(parameters: Parameters, latent: torch.Tensor) -> torch.Tensor:
    """The video of a latent, [-1, 1]: the inverse shapes of `encode`."""
    return _call(parameters, "decode", latent.transpose(1, 2)).sample.transpose(1, 2)


class _Methods(torch.nn.Module):
    """Lets `functional_call`, which knows `forward` alone, reach a model's other methods."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, x: torch.Tensor) -> Any:
        return getattr(self.model, method)(x)


def _call(parameters: Parameters, method: str, x: torch.Tensor) -> Any:
    model = _model(len(parameters["encoder.conv1.weight"]))
    tensors = convert_wan_vae_to_diffusers(dict(parameters))
    return functional_call(model, {f"model.{name}": tensor for name, tensor in tensors.items()}, (method, x))


@functools.cache
def _model(dim: int) -> _Methods:
    return _Methods(wan_vae(dim)).eval()
