"""Fits the transformer and its text encoder together, by flow matching on the VAE's latents of drawn clips."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from demo.shapes import SCENES, TEMPLATES, batch
from demo.shapes_in_diffusers import TEXT_SIZES, TRANSFORMER_SIZES
from testing.tiny import text_encoders, wan

from . import dit, text_encoder, vae
from .optimizing import Trained

CLIPS = 3000
_BATCH = 64
_RATE = 1e-2
_WARMUP = 100
_UNPROMPTED = 0.1
_SHIFT = 3.0

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Latents:
    """Clips as the transformer sees them: latents (clips, 16, frames, height, width), unit normal, and scene indices."""

    values: torch.Tensor
    scenes: torch.Tensor


@dataclass(frozen=True)
class Prompts:
    """Every prompt's tokens, scene by scene and template by template, and the empty prompt last."""

    ids: torch.Tensor
    real: torch.Tensor

    def rows(self, scenes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A row for each scene: a template at random, or now and then no prompt."""
        templates = torch.randint(len(TEMPLATES), scenes.shape, generator=generator)
        unprompted = torch.rand(scenes.shape, generator=generator) < _UNPROMPTED
        return torch.where(unprompted, len(self.ids) - 1, scenes * len(TEMPLATES) + templates)


def all_prompts() -> list[str]:
    return [scene.prompt(template) for scene in SCENES for template in range(len(TEMPLATES))]


def prompts(spiece_model: torch.Tensor) -> Prompts:
    return Prompts(*text_encoder.tokenize(spiece_model, [*all_prompts(), ""]))


@torch.no_grad()
def latents(vae_parameters: vae.Parameters, mean: torch.Tensor, deviation: torch.Tensor, seed: int) -> Latents:
    """Draws CLIPS clips and encodes them; `mean` and `deviation` are the latent format's, per channel."""
    generator = torch.Generator().manual_seed(seed)
    values, scenes = [], []
    for _ in range(CLIPS // 20):
        clips, shown = batch(20, generator)
        encoded = vae.encode(vae_parameters, clips * 2 - 1).transpose(1, 2)
        values.append((encoded - mean.view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1))
        scenes += [SCENES.index(scene) for scene in shown]
    return Latents(torch.cat(values), torch.tensor(scenes))


def start(generator: torch.Generator) -> Tensors:
    """Fresh parameters of both models: Gaussian, small where a residual is added, norms one, biases zero."""
    parameters = {}
    tables = {**wan.shapes(TRANSFORMER_SIZES), **text_encoders.umt5_shapes(TEXT_SIZES)}
    for key, shape in tables.items():
        if "norm" in key and key.endswith("weight"):
            value = torch.ones(shape)
        elif key.endswith("bias") or key.startswith("head.head"):
            value = torch.zeros(shape)
        elif key.endswith(("modulation", "relative_attention_bias.weight")):
            value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        elif key == "shared.weight":
            value = torch.randn(shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5
            value *= 0.25 if key.endswith((".o.weight", "ffn.2.weight", "wo.weight", "time_projection.1.weight")) else 1
            if key.endswith("SelfAttention.q.weight"):
                value *= TEXT_SIZES.head_dim**-0.5
        parameters[key] = value
    return parameters


def apart(parameters: Tensors) -> tuple[Tensors, Tensors]:
    """The transformer's parameters, and the text encoder's."""
    encoder = {key: value for key, value in parameters.items() if key.startswith(("encoder.", "shared."))}
    return {key: value for key, value in parameters.items() if key not in encoder}, encoder


def fit(data: Latents, tokens: Prompts, seconds: float, seed: int, say: Callable[[str], None]) -> Tensors:
    """Trains for about `seconds`; returns the running average of the parameters of both models."""
    generator = torch.Generator().manual_seed(seed)
    trained = Trained(start(generator))
    began, done, step, mean = time.monotonic(), 0.0, 0, 2.0
    while done < 1:
        loss = _loss(trained.low(), data, tokens, generator)
        trained.step(loss, _RATE * min((step + 1) / _WARMUP, 1.02 - done))
        mean += 0.02 * (loss.item() - mean)
        step += 1
        done = (time.monotonic() - began) / seconds
        if step % 100 == 0:
            say(f"transformer: step {step}, {done:.0%}, loss {mean:.4f}")
    return trained.average()


def _loss(low: Tensors, data: Latents, tokens: Prompts, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity, computed in bfloat16."""
    chosen = torch.randint(len(data.scenes), (_BATCH,), generator=generator)
    clean = data.values[chosen]
    rows = tokens.rows(data.scenes[chosen], generator)
    real = tokens.real[rows]
    transformer, encoder = apart(low)
    text = text_encoder.encode(encoder, tokens.ids[rows], real)
    even = torch.rand(_BATCH, generator=generator)
    sigma = _SHIFT * even / (1 + (_SHIFT - 1) * even)
    noise = torch.randn(clean.shape, generator=generator)
    share = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - share) * clean + share * noise
    made = dit.velocity(transformer, noisy.bfloat16(), sigma, text, real)
    return (made.float() - (noise - clean)).square().mean()
