"""The Wan text-to-video transformer on a table of parameters: the same mathematics as ComfyUI's, made to be trained.

Wan attends to 512 text tokens, all but a few of them padding with one and the same embedding. Here the padding is one
token whose attention counts as many times: the same result for a fraction of the work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from testing.tiny.wan import FREQUENCY_WIDTH, WanConfig

Parameters = Mapping[str, torch.Tensor]
CONFIG = WanConfig(dim=256, ffn=512, heads=2, layers=4, text=256)
TEXT_TOKENS = 512
_EPSILON = 1e-6


def velocity(
    parameters: Parameters,
    latent: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    real: torch.Tensor,
    config: WanConfig = CONFIG,
) -> torch.Tensor:
    """The flow's velocity, noise minus clean, at a noisy latent.

    Args:
        latent: (batch, 16, frames, height, width), height and width even.
        sigma: (batch,), the share of noise, 0 to 1.
        text: (batch, tokens, width) from the text encoder.
        real: (batch, tokens), False where a token is padding.
    """
    net = _Net(parameters, config)
    x = F.conv3d(latent, parameters["patch_embedding.weight"], parameters["patch_embedding.bias"], stride=(1, 2, 2))
    grid = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    time = net.time(sigma)
    change = net.linear("time_projection.1", F.silu(time)).unflatten(1, (6, config.dim))
    context, counted = net.context(text, real)
    turn = _turns(grid, config.dim // config.heads).to(x.dtype)
    for index in range(config.layers):
        x = net.block(f"blocks.{index}", x, change, context, counted, turn)
    shift, scale = (parameters["head.modulation"] + time[:, None]).chunk(2, dim=1)
    x = net.linear("head.head", shift + _plain_norm(x) * (1 + scale))
    frames, rows, columns = grid
    x = x.unflatten(1, grid).unflatten(4, (2, 2, config.out_channels))
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), config.out_channels, frames, 2 * rows, 2 * columns)


class _Net:
    """The transformer's layers by name."""

    def __init__(self, parameters: Parameters, config: WanConfig) -> None:
        self.parameters = parameters
        self.config = config

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"])

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        half = FREQUENCY_WIDTH // 2
        angle = torch.outer(sigma.float() * 1000, 10000 ** (-torch.arange(half) / half))
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.parameters["head.modulation"].dtype)
        return self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", waves)))

    def context(self, text: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedded tokens with one for the padding after them, and what to add to their attention's logits."""
        tokens = F.pad(text, (0, 0, 0, 1))
        tokens = self.linear("text_embedding.2", F.gelu(self.linear("text_embedding.0", tokens), approximate="tanh"))
        padding = (TEXT_TOKENS - real.sum(dim=1, keepdim=True)).to(text.dtype).log()
        counted = torch.cat([torch.zeros(real.shape, dtype=text.dtype).masked_fill(~real, -math.inf), padding], dim=1)
        return tokens, counted[:, None, None]

    def block(
        self,
        name: str,
        x: torch.Tensor,
        change: torch.Tensor,
        context: torch.Tensor,
        counted: torch.Tensor,
        turn: torch.Tensor,
    ) -> torch.Tensor:
        change = (self.parameters[f"{name}.modulation"] + change).chunk(6, dim=1)
        y = change[0] + _plain_norm(x) * (1 + change[1])
        x = x + self.attention(f"{name}.self_attn", y, y, turn=turn) * change[2]
        norm3 = self.parameters[f"{name}.norm3.weight"], self.parameters[f"{name}.norm3.bias"]
        y = F.layer_norm(x, x.shape[-1:], *norm3, _EPSILON)
        x = x + self.attention(f"{name}.cross_attn", y, context, counted=counted)
        y = change[3] + _plain_norm(x) * (1 + change[4])
        y = self.linear(f"{name}.ffn.2", F.gelu(self.linear(f"{name}.ffn.0", y), approximate="tanh"))
        return x + y * change[5]

    def attention(
        self,
        name: str,
        x: torch.Tensor,
        context: torch.Tensor,
        counted: torch.Tensor | None = None,
        turn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q = self.heads(self.norm(f"{name}.norm_q", self.linear(f"{name}.q", x)))
        k = self.heads(self.norm(f"{name}.norm_k", self.linear(f"{name}.k", context)))
        v = self.heads(self.linear(f"{name}.v", context))
        if turn is not None:
            q, k = _turned(q, turn), _turned(k, turn)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=counted)
        return self.linear(f"{name}.o", seen.transpose(1, 2).flatten(2))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.parameters[f"{name}.weight"], _EPSILON)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.config.heads, -1)).transpose(1, 2)


def _plain_norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPSILON)


def _turns(grid: torch.Size, head_dim: int) -> torch.Tensor:
    """Cosines and sines of the rotary embedding of frame, row and column: (2, positions, head_dim / 2)."""
    spatial = 2 * (head_dim // 6)
    angles = []
    for axis, width in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        omega = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        position = torch.arange(grid[axis]).view([-1 if other == axis else 1 for other in range(3)]).expand(grid)
        angles.append(torch.outer(position.flatten().double(), omega))
    angle = torch.cat(angles, dim=1)
    return torch.stack([angle.cos(), angle.sin()])


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(3, (-1, 2)).unbind(4)
    cosine, sine = turn
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=4).flatten(3)
