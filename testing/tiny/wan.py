"""Tiny Wan diffusion models (2.1 and 2.2, text-to-video and image-to-video) with the key names of the real files."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .tensors import linear, norm

FREQUENCY_WIDTH = 256
CLIP_VISION_WIDTH = 1280


@dataclass(frozen=True)
class WanConfig:
    """Dimensions of a tiny Wan. Real Wan 14B: dim 5120, ffn 13824, heads 40, layers 40, text 4096."""

    dim: int = 256
    ffn: int = 512
    heads: int = 2
    layers: int = 2
    text: int = 256
    in_channels: int = 16
    out_channels: int = 16
    image_embedding: bool = False

    def metadata(self) -> dict[str, str]:
        """File metadata that tells ComfyUI what it cannot read off the shapes (number of heads, width of the text)."""
        transformer = {"num_heads": self.heads, "text_dim": self.text}
        return {"config": json.dumps({"transformer": transformer}), "format": "pt"}


def shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of the model."""
    dim = config.dim
    table: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, config.in_channels, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        **linear("text_embedding.0", dim, config.text),
        **linear("text_embedding.2", dim, dim),
        **linear("time_embedding.0", dim, FREQUENCY_WIDTH),
        **linear("time_embedding.2", dim, dim),
        **linear("time_projection.1", dim * 6, dim),
    }
    for index in range(config.layers):
        table |= _block(f"blocks.{index}", config)
    table |= {"head.modulation": (1, 2, dim), **linear("head.head", config.out_channels * 4, dim)}
    if config.image_embedding:
        table |= {
            **norm("img_emb.proj.0", CLIP_VISION_WIDTH, bias=True),
            **linear("img_emb.proj.1", CLIP_VISION_WIDTH, CLIP_VISION_WIDTH),
            **linear("img_emb.proj.3", dim, CLIP_VISION_WIDTH),
            **norm("img_emb.proj.4", dim, bias=True),
        }
    return table


def _block(name: str, config: WanConfig) -> dict[str, tuple[int, ...]]:
    dim = config.dim
    table: dict[str, tuple[int, ...]] = {f"{name}.modulation": (1, 6, dim)}
    for attention in ("self_attn", "cross_attn"):
        for part in "qkvo":
            table |= linear(f"{name}.{attention}.{part}", dim, dim)
        table |= {**norm(f"{name}.{attention}.norm_q", dim), **norm(f"{name}.{attention}.norm_k", dim)}
    table |= norm(f"{name}.norm3", dim, bias=True)
    if config.image_embedding:
        table |= {
            **linear(f"{name}.cross_attn.k_img", dim, dim),
            **linear(f"{name}.cross_attn.v_img", dim, dim),
            **norm(f"{name}.cross_attn.norm_k_img", dim),
        }
    table |= {**linear(f"{name}.ffn.0", config.ffn, dim), **linear(f"{name}.ffn.2", dim, config.ffn)}
    return table
