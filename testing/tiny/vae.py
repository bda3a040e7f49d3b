"""A tiny Wan 2.1 VAE (Qwen-Image uses the same architecture) with the key names of the real file."""

from __future__ import annotations

from itertools import pairwise

LATENT_CHANNELS = 16
MULTIPLIERS = (1, 2, 4, 4)
RES_BLOCKS = 2
TEMPORAL_DOWNSAMPLE = (False, True, True)

Table = dict[str, tuple[int, ...]]


def shapes(dim: int = 4) -> Table:
    """Key -> shape of every tensor; `dim` is the width of the first convolution (96 in the real file)."""
    latent = LATENT_CHANNELS
    return {
        **_encoder(dim),
        **_conv("conv1", latent * 2, latent * 2, (1, 1, 1)),
        **_conv("conv2", latent, latent, (1, 1, 1)),
        **_decoder(dim),
    }


def _conv(name: str, out_channels: int, in_channels: int, kernel: tuple[int, ...]) -> Table:
    return {f"{name}.weight": (out_channels, in_channels, *kernel), f"{name}.bias": (out_channels,)}


def _res_block(name: str, in_channels: int, out_channels: int) -> Table:
    table: Table = {
        f"{name}.residual.0.gamma": (in_channels, 1, 1, 1),
        **_conv(f"{name}.residual.2", out_channels, in_channels, (3, 3, 3)),
        f"{name}.residual.3.gamma": (out_channels, 1, 1, 1),
        **_conv(f"{name}.residual.6", out_channels, out_channels, (3, 3, 3)),
    }
    if in_channels != out_channels:
        table |= _conv(f"{name}.shortcut", out_channels, in_channels, (1, 1, 1))
    return table


def _middle(name: str, channels: int) -> Table:
    return {
        **_res_block(f"{name}.middle.0", channels, channels),
        f"{name}.middle.1.norm.gamma": (channels, 1, 1),
        **_conv(f"{name}.middle.1.to_qkv", channels * 3, channels, (1, 1)),
        **_conv(f"{name}.middle.1.proj", channels, channels, (1, 1)),
        **_res_block(f"{name}.middle.2", channels, channels),
    }


def _encoder(dim: int) -> Table:
    widths = [dim * multiplier for multiplier in (1, *MULTIPLIERS)]
    table = _conv("encoder.conv1", dim, 3, (3, 3, 3))
    index = 0
    for stage, (before, after) in enumerate(pairwise(widths)):
        for block in range(RES_BLOCKS):
            table |= _res_block(f"encoder.downsamples.{index}", before if block == 0 else after, after)
            index += 1
        if stage < len(MULTIPLIERS) - 1:
            table |= _conv(f"encoder.downsamples.{index}.resample.1", after, after, (3, 3))
            if TEMPORAL_DOWNSAMPLE[stage]:
                table |= _conv(f"encoder.downsamples.{index}.time_conv", after, after, (3, 1, 1))
            index += 1
    table |= _middle("encoder", widths[-1])
    table["encoder.head.0.gamma"] = (widths[-1], 1, 1, 1)
    return table | _conv("encoder.head.2", LATENT_CHANNELS * 2, widths[-1], (3, 3, 3))


def _decoder(dim: int) -> Table:
    widths = [dim * multiplier for multiplier in (MULTIPLIERS[-1], *reversed(MULTIPLIERS))]
    upsample_time = tuple(reversed(TEMPORAL_DOWNSAMPLE))
    table = _conv("decoder.conv1", widths[0], LATENT_CHANNELS, (3, 3, 3))
    table |= _middle("decoder", widths[0])
    index = 0
    for stage, (before, after) in enumerate(pairwise(widths)):
        first = before if stage == 0 else before // 2
        for block in range(RES_BLOCKS + 1):
            table |= _res_block(f"decoder.upsamples.{index}", first if block == 0 else after, after)
            index += 1
        if stage < len(MULTIPLIERS) - 1:
            table |= _conv(f"decoder.upsamples.{index}.resample.1", after // 2, after, (3, 3))
            if upsample_time[stage]:
                table |= _conv(f"decoder.upsamples.{index}.time_conv", after * 2, after, (3, 1, 1))
            index += 1
    table["decoder.head.0.gamma"] = (dim, 1, 1, 1)
    return table | _conv("decoder.head.2", 3, dim, (3, 3, 3))
