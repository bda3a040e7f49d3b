"""The Wan 2.1 VAE as one pass over all frames, on a table of parameters: the same mathematics as ComfyUI's frame by frame.

ComfyUI decodes a few frames at a time and carries the ends of the last ones along; here a causal convolution sees all
frames at once, as one two-dimensional convolution over three stacked frames, which a CPU does several times faster.
Activations are (batch, frames, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from testing.tiny.vae import MULTIPLIERS, RES_BLOCKS, TEMPORAL_DOWNSAMPLE

Parameters = Mapping[str, torch.Tensor]
STAGES = len(MULTIPLIERS)


def encode(parameters: Parameters, video: torch.Tensor) -> torch.Tensor:
    """Latent means of `video` in [-1, 1]: (batch, 4 n + 1, 3, height, width) -> (batch, n + 1, 16, height/8, width/8)."""
    net = _Net(parameters)
    x = net.causal("encoder.conv1", video)
    index = 0
    for stage in range(STAGES):
        for _ in range(RES_BLOCKS):
            x = net.res_block(f"encoder.downsamples.{index}", x)
            index += 1
        if stage < STAGES - 1:
            x = net.down(f"encoder.downsamples.{index}", x, TEMPORAL_DOWNSAMPLE[stage])
            index += 1
    x = net.middle("encoder.middle", x)
    x = net.causal("encoder.head.2", F.silu(net.norm("encoder.head.0", x)))
    return net.point("conv1", x).chunk(2, dim=2)[0]


def decode(parameters: Parameters, latent: torch.Tensor) -> torch.Tensor:
    """The video of a latent, about [-1, 1]: the inverse shapes of `encode`."""
    net = _Net(parameters)
    x = net.causal("decoder.conv1", net.point("conv2", latent))
    x = net.middle("decoder.middle", x)
    index = 0
    for stage in range(STAGES):
        for _ in range(RES_BLOCKS + 1):
            x = net.res_block(f"decoder.upsamples.{index}", x)
            index += 1
        if stage < STAGES - 1:
            x = net.up(f"decoder.upsamples.{index}", x, TEMPORAL_DOWNSAMPLE[::-1][stage])
            index += 1
    return net.causal("decoder.head.2", F.silu(net.norm("decoder.head.0", x)))


class _Net:
    """The VAE's layers by name."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gamma = self.parameters[f"{name}.gamma"].flatten()
        return F.normalize(x, dim=2) * (gamma * gamma.numel() ** 0.5)[:, None, None]

    def flat(self, name: str, x: torch.Tensor, **options) -> torch.Tensor:
        """A two-dimensional convolution of each frame."""
        y = F.conv2d(_frames(x), self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"], **options)
        return y.unflatten(0, x.shape[:2])

    def point(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(_frames(x), self.parameters[f"{name}.weight"][:, :, 0], self.parameters[f"{name}.bias"])
        return y.unflatten(0, x.shape[:2])

    def causal(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A 3x3x3 convolution that sees a frame and the two before it; zeros before the first."""
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
        frames = x.shape[1]
        stacked = torch.cat([padded[:, tap : tap + frames] for tap in range(3)], dim=2)
        y = F.conv2d(_frames(stacked), weight.transpose(1, 2).flatten(1, 2), bias, padding=1)
        return y.unflatten(0, x.shape[:2])

    def res_block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = self.causal(f"{name}.residual.2", F.silu(self.norm(f"{name}.residual.0", x)))
        y = self.causal(f"{name}.residual.6", F.silu(self.norm(f"{name}.residual.3", y)))
        return y + (self.point(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in self.parameters else x)

    def middle(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = self.res_block(f"{name}.0", x)
        qkv = self.flat(f"{name}.1.to_qkv", self.norm(f"{name}.1.norm", x))
        q, k, v = (part.flatten(3).transpose(2, 3) for part in qkv.chunk(3, dim=2))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).unflatten(3, x.shape[3:])
        return self.res_block(f"{name}.2", x + self.flat(f"{name}.1.proj", seen))

    def down(self, name: str, x: torch.Tensor, temporal: bool) -> torch.Tensor:
        x = self.flat(f"{name}.resample.1", F.pad(x, (0, 1, 0, 1)), stride=2)
        if not temporal or x.shape[1] == 1:
            return x
        first = x[:, :1]
        return torch.cat([first, self.over_time(f"{name}.time_conv", x, stride=2)], dim=1)

    def up(self, name: str, x: torch.Tensor, temporal: bool) -> torch.Tensor:
        if temporal and x.shape[1] > 1:
            # The frames after the first do not see the first: zeros stand before them.
            both = self.over_time(f"{name}.time_conv", F.pad(x[:, 1:], (0, 0, 0, 0, 0, 0, 2, 0)), stride=1)
            x = torch.cat([x[:, :1], both.unflatten(2, (2, x.shape[2])).flatten(1, 2)], dim=1)
        larger = F.interpolate(_frames(x), scale_factor=2.0, mode="nearest-exact")
        return self.flat(f"{name}.resample.1", larger.unflatten(0, x.shape[:2]), padding=1)

    def over_time(self, name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
        """A convolution over three frames, without padding."""
        weight, bias = self.parameters[f"{name}.weight"][..., 0, 0], self.parameters[f"{name}.bias"]
        frames = (x.shape[1] - 3) // stride + 1
        taps = [x[:, tap : tap + stride * (frames - 1) + 1 : stride] for tap in range(3)]
        stacked = torch.cat(taps, dim=2)
        y = F.conv2d(_frames(stacked), weight.transpose(1, 2).flatten(1, 2)[..., None, None], bias)
        return y.unflatten(0, (x.shape[0], frames))


def _frames(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
