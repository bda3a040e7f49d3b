"""One token through a gated delta net (Qwen3.5): a convolution over the last tokens, then a state that is updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...text.linears import Linears


@dataclass
class DeltaNet:
    """The recurrent step of core's `GatedDeltaNet`, in core's order and roundings.

    Attributes:
        project: the mixed row of queries, keys and values; the gate of the output; beta; alpha.
        output: the projection back.
        state: (1, heads, key width, value width) float32, updated.
        recent: (1, channels, taps - 1) rows before this one, updated.
        taps: (channels, taps) weight of the convolution.
        conv_bias: (channels,) or None.
        decay, time_bias: (heads,) float32.
        norm: (value width,) weight of the RMSNorm of every head.
        key_heads: heads of queries and keys.
        eps: of the norm.
    """

    project: Linears
    output: Linears
    state: torch.Tensor
    recent: torch.Tensor
    taps: torch.Tensor
    conv_bias: torch.Tensor | None
    decay: torch.Tensor
    time_bias: torch.Tensor
    norm: torch.Tensor
    key_heads: int
    eps: float

    @classmethod
    def read(cls, module: Any, weights: Any, state: torch.Tensor, recent: torch.Tensor) -> DeltaNet:
        """From core's module, and the states that its prompt left."""
        bias = module.conv1d.bias
        return cls(
            weights.linears(module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a),
            weights.linears(module.out_proj),
            state,
            recent,
            weights.tensor(module.conv1d.weight).squeeze(1),
            None if bias is None else weights.tensor(bias),
            -module.A_log.to(weights.device).float().exp(),
            module.dt_bias.to(weights.device).float(),
            weights.tensor(module.norm.weight + 1.0 if module.norm.add else module.norm.weight),
            module.num_key_heads,
            module.norm.eps,
        )

    def __call__(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """(1, K) -> (1, K)."""
        mixed, gate, beta, alpha = self.project(x)
        heads, key_width, value_width = self.state.shape[1:]
        query, key, value = self._convolve(mixed).split(
            [self.key_heads * key_width, self.key_heads * key_width, heads * value_width]
        )
        repeat = heads // self.key_heads
        query = F.normalize(query.view(-1, key_width).repeat_interleave(repeat, 0).float(), dim=-1) * key_width**-0.5
        key = F.normalize(key.view(-1, key_width).repeat_interleave(repeat, 0).float(), dim=-1)
        kept = (self.decay * F.softplus(alpha[0].float() + self.time_bias)).exp()
        state = self.state[0]
        state.mul_(kept[:, None, None])
        known = torch.einsum("hk,hkv->hv", key, state)
        change = (value.view(heads, -1).float() - known) * beta[0].sigmoid()[:, None]
        state.add_(key.unsqueeze(-1) * change.unsqueeze(-2))
        out = torch.einsum("hk,hkv->hv", query, state).to(x.dtype)
        out = F.rms_norm(out, self.norm.shape, self.norm, self.eps) * F.silu(gate.view(heads, -1))
        return self.output(out.view(1, -1))[0]

    def _convolve(self, mixed: torch.Tensor) -> torch.Tensor:
        """(channels,) of the newest row, which joins the recent ones."""
        window = torch.cat([self.recent, mixed.view(1, -1, 1)], dim=-1)
        self.recent.copy_(window[:, :, 1:])
        summed = (window[0] * self.taps).sum(dim=-1)
        return F.silu(summed if self.conv_bias is None else summed + self.conv_bias)
