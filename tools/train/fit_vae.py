"""Fits the VAE: first on windows around the moving shape, then on whole clips."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from demo.shapes import FRAMES, SIZE, batch
from testing.tiny.vae import shapes

from . import vae
from .optimizing import Trained

DIM = 8
_WINDOW, _WINDOW_FRAMES = 32, 5
_NOISE = 0.1


@dataclass(frozen=True)
class Phase:
    """A part of the training: its share of the time, clips a step, whether they are whole, Muon's rates from and to."""

    share: float
    clips: int
    whole: bool
    rate: tuple[float, float]


PHASES = (Phase(0.6, 4, False, (1e-2, 4e-3)), Phase(0.4, 2, True, (4e-3, 2e-4)))


def start(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Fresh parameters: Gaussian with variance 1 / fan-in; the last convolution of each residual starts near zero."""
    parameters = {}
    for key, shape in shapes(DIM).items():
        value = torch.randn(shape, generator=generator)
        if key.endswith("gamma"):
            value = torch.ones(shape)
        elif key.endswith("bias"):
            value = torch.zeros(shape)
        else:
            value *= (0.1 if key.endswith(("residual.6.weight", "proj.weight")) else 1.0) / value[0].numel() ** 0.5
        parameters[key] = value
    return parameters


def fit(seconds: float, seed: int, say: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """Trains for about `seconds`; returns the parameters."""
    generator = torch.Generator().manual_seed(seed)
    trained = Trained(start(generator))
    for phase in PHASES:
        began, done, step, mean = time.monotonic(), 0.0, 0, 1.0
        while done < 1:
            loss = _loss(trained.low(), _clips(phase, generator), generator)
            trained.step(loss, phase.rate[0] * (phase.rate[1] / phase.rate[0]) ** done)
            mean += 0.02 * (loss.item() - mean)
            step += 1
            done = (time.monotonic() - began) / (phase.share * seconds)
            if step % 200 == 0:
                say(f"VAE, {'whole clips' if phase.whole else 'windows'}: step {step}, {done:.0%}, loss {mean:.4f}")
    return trained.average()


def _clips(phase: Phase, generator: torch.Generator) -> torch.Tensor:
    clips = batch(phase.clips, generator)[0] * 2 - 1
    if phase.whole:
        return clips
    out = []
    for clip in clips:
        first = int(torch.randint(FRAMES - _WINDOW_FRAMES + 1, (), generator=generator))
        part = clip[first : first + _WINDOW_FRAMES]
        bright = (part - part[:1, :, :1, :1]).abs().amax(dim=(0, 1)).nonzero()
        spot = bright[int(torch.randint(len(bright), (), generator=generator))] if len(bright) else torch.zeros(2)
        top, left = (int(min(max(int(at) - _WINDOW // 2, 0), SIZE - _WINDOW)) for at in spot)
        out.append(part[:, :, top : top + _WINDOW, left : left + _WINDOW])
    return torch.stack(out)


def _loss(low: dict[str, torch.Tensor], clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Squared error and a little absolute error, in bfloat16, the latent blurred so that near latents decode alike."""
    latent = vae.encode(low, clips.bfloat16())
    spread = latent.detach().float().std(dim=(0, 1, 3, 4), keepdim=True)
    noise = torch.randn(latent.shape, generator=generator) * spread * _NOISE
    off = vae.decode(low, latent + noise.to(latent.dtype)).float() - clips
    return off.square().mean() + 0.1 * off.abs().mean()
