"""The demo without ComfyUI: diffusers' own tiny Wan and Qwen-Image transformers through the pack's ops."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, QwenImageTransformer2DModel
from PIL import Image

from testing.measure import held_bytes
from testing.tiny.tensors import draw, write
from testing.tiny.wan import WanConfig

from . import shapes_in_diffusers
from .clips import Quality
from .progress import ProgressLine
from .quantized_modules import DEVICE, DTYPE, load
from .report import Make, Row, latent_rows

STEPS = 4
TEXT_TOKENS = 16
QWEN_TEXT = 64

Denoise = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _denoise_wan(model, latent, sigma, text):
    return model(hidden_states=latent, timestep=sigma * 1000, encoder_hidden_states=text, return_dict=False)[0]


_wan = partial(shapes_in_diffusers.wan_transformer, WanConfig())
_qwen_image = partial(QwenImageTransformer2DModel, num_layers=2, num_attention_heads=2, joint_attention_dim=QWEN_TEXT)


def _denoise_qwen_image(model, latent, sigma, text):
    batch, channels, _, height, width = latent.shape
    packed = latent.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    packed = packed.reshape(batch, height // 2 * (width // 2), channels * 4)
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    out = model(
        hidden_states=packed,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        timestep=sigma,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    out = out.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(latent.shape)


MODELS: dict[str, tuple[str, Callable[[], torch.nn.Module], Denoise, tuple[int, ...], int]] = {
    "Wan t2v": ("wan_t2v", _wan, _denoise_wan, (1, 16, 3, 16, 16), WanConfig().text),
    "Qwen-Image": ("qwen_image", _qwen_image, _denoise_qwen_image, (1, 16, 1, 32, 32), QWEN_TEXT),
}


def run(out: Path, formats: Sequence[str]) -> Iterator[Quality | Row]:
    """Runs the models in bfloat16 and in `formats`; the tiny models' pictures go to `out`.

    Yields each format's clips of the trained model, then the tiny models' rows, as they are made.
    """
    with tempfile.TemporaryDirectory(prefix="lowbit-demo-") as folder, torch.inference_mode():
        yield from shapes_in_diffusers.measure(Path(folder), formats)
        for model in MODELS:
            yield from latent_rows(model, formats, _maker(model, Path(folder), out))


def _maker(model_title: str, folder: Path, out: Path) -> Make:
    stem, build, denoise, shape, width = MODELS[model_title]
    torch.manual_seed(0)
    decoder = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).eval()
    shapes = {key: tuple(value.shape) for key, value in build().state_dict().items()}
    source = write(folder / f"{stem}.safetensors", draw(shapes))

    def make(name: str, progress: ProgressLine) -> tuple[list[torch.Tensor], Row]:
        started = time.monotonic()
        path, model = load(source, build, name, folder, progress)
        latent = _sample(model, denoise, shape, width, 1, progress)
        loaded = time.monotonic()
        _sample(model, denoise, shape, width, 2, progress)
        times = {"first_seconds": loaded - started, "again_seconds": time.monotonic() - loaded}
        _save_pictures(decoder, latent, out / f"{stem}.{name}")
        return [latent], Row(model_title, name, path.stat().st_size, held_bytes(model), **times)

    return make


def _sample(
    model: torch.nn.Module, denoise: Denoise, shape: tuple[int, ...], width: int, seed: int, progress: ProgressLine
) -> torch.Tensor:
    """A few Euler steps of a flow-matching schedule from seeded noise."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(shape, generator=generator).to(DEVICE, DTYPE)
    text = torch.randn(1, TEXT_TOKENS, width, generator=torch.Generator().manual_seed(11)).to(DEVICE, DTYPE)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    for step, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        velocity = denoise(model, latent, sigma.to(DEVICE, DTYPE).expand(1), text)
        latent = latent + velocity * (after - sigma).item()
        progress.step("sampling", step + 1, STEPS)
    return latent.float().cpu()


def _save_pictures(decoder: torch.nn.Module, latent: torch.Tensor, stem: Path) -> None:
    """The decoded frames as {stem}.png (the first) and, when there are several, {stem}.webp."""
    video = decoder.decode(latent, return_dict=False)[0][0].movedim(0, -1)
    video = (video - video.amin()) / (video.amax() - video.amin()).clamp_min(1e-6)
    frames = [Image.fromarray((frame * 255).round().to(torch.uint8).numpy()) for frame in video]
    frames[0].save(stem.with_name(f"{stem.name}.png"))
    if len(frames) > 1:
        frames[0].save(stem.with_name(f"{stem.name}.webp"), save_all=True, append_images=frames[1:], duration=125)
