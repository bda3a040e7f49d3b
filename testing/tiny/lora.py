"""Tiny LoRAs for the tiny Wan and Qwen-Image: rank-4 deltas strong enough to be seen in the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from .tensors import Tensors, draw

RANK = 4


def make(
    weights: Mapping[str, torch.Tensor], layers: Iterable[str], prefix: str = "diffusion_model.", seed: int = 7
) -> Tensors:
    """LoRA tensors for `layers` of a model.

    Keys are `{prefix}{layer}.lora_down.weight` (rank, in), `.lora_up.weight` (out, rank) and `.alpha`; the delta
    `up @ down * alpha / rank` has about half of the layer's own norm.
    """
    tensors: Tensors = {}
    for layer in layers:
        out_features, in_features = weights[f"{layer}.weight"].shape
        shapes = {
            f"{prefix}{layer}.lora_down.weight": (RANK, in_features),
            f"{prefix}{layer}.lora_up.weight": (out_features, RANK),
        }
        tensors |= draw(shapes, seed)
        tensors[f"{prefix}{layer}.alpha"] = torch.tensor(RANK / 2)
    return tensors
