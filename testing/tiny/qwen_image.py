"""A tiny Qwen-Image diffusion model with the key names of the real files."""

from __future__ import annotations

from dataclasses import dataclass

from .tensors import linear, norm

HEAD_DIM = 128
IN_CHANNELS = 64
TIMESTEP_WIDTH = 256


@dataclass(frozen=True)
class QwenImageConfig:
    """Dimensions of a tiny Qwen-Image. The real one: 24 heads of 128, 60 layers, joint 3584."""

    heads: int = 2
    layers: int = 2
    joint: int = 64


def shapes(config: QwenImageConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of the model."""
    dim = config.heads * HEAD_DIM
    table: dict[str, tuple[int, ...]] = {
        **linear("time_text_embed.timestep_embedder.linear_1", dim, TIMESTEP_WIDTH),
        **linear("time_text_embed.timestep_embedder.linear_2", dim, dim),
        **norm("txt_norm", config.joint),
        **linear("img_in", dim, IN_CHANNELS),
        **linear("txt_in", dim, config.joint),
    }
    for index in range(config.layers):
        table |= _block(f"transformer_blocks.{index}", dim)
    return table | {**linear("norm_out.linear", dim * 2, dim), **linear("proj_out", IN_CHANNELS, dim)}


def _block(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    table: dict[str, tuple[int, ...]] = {}
    for stream in ("img", "txt"):
        table |= {
            **linear(f"{name}.{stream}_mod.1", dim * 6, dim),
            **linear(f"{name}.{stream}_mlp.net.0.proj", dim * 4, dim),
            **linear(f"{name}.{stream}_mlp.net.2", dim, dim * 4),
        }
    for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        table |= norm(f"{name}.attn.{part}", HEAD_DIM)
    for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        table |= linear(f"{name}.attn.{part}", dim, dim)
    return table
