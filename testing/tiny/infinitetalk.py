"""A tiny InfiniteTalk model patch: 40 audio cross-attention blocks and the audio projection, with the real key names."""

from __future__ import annotations

from dataclasses import dataclass

from .tensors import linear, norm
from .wan import WanConfig

BLOCKS = 40
CONTEXT_TOKENS = 32
AUDIO_LAYERS = 12
AUDIO_WIDTH = 768


@dataclass(frozen=True)
class InfiniteTalkConfig:
    """Dimensions of the tiny patch. ComfyUI fixes 40 heads and 40 blocks, so `dim` is a multiple of 40.

    The real one: dim 5120, intermediate 512, out 768.
    """

    dim: int = 160
    intermediate: int = 4
    out: int = 32


def matching_wan(config: InfiniteTalkConfig) -> WanConfig:
    """The tiny Wan 2.1 image-to-video model that the patch fits."""
    return WanConfig(dim=config.dim, ffn=320, heads=5, layers=2, text=256, in_channels=36, image_embedding=True)


def shapes(config: InfiniteTalkConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of the patch."""
    dim = config.dim
    table: dict[str, tuple[int, ...]] = {
        **linear("audio_proj.proj1", config.intermediate, 5 * AUDIO_LAYERS * AUDIO_WIDTH),
        **linear("audio_proj.proj1_vf", config.intermediate, 8 * AUDIO_LAYERS * AUDIO_WIDTH),
        **linear("audio_proj.proj2", config.intermediate, config.intermediate),
        **linear("audio_proj.proj3", CONTEXT_TOKENS * config.out, config.intermediate),
        **norm("audio_proj.norm", config.out, bias=True),
    }
    for index in range(BLOCKS):
        name = f"blocks.{index}"
        table |= {
            **linear(f"{name}.audio_cross_attn.q_linear", dim, dim),
            **linear(f"{name}.audio_cross_attn.proj", dim, dim),
            **linear(f"{name}.audio_cross_attn.kv_linear", dim * 2, config.out),
            **norm(f"{name}.norm_x", dim, bias=True),
        }
    return table
