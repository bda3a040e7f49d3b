"""The demo without ComfyUI: diffusers' own tiny Wan and Qwen-Image transformers through the pack's ops."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from lowbit.errors import LowbitError
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.linear import quantized_linear
from lowbit.ops.plan import QuantizationPlan, make_plan
from lowbit.ops.quantize import assemble
from lowbit.ops.stream import quantize_checkpoint
from testing.measure import held_bytes, relative_error
from testing.tiny.tensors import draw, write

from .progress import ProgressLine
from .report import Row

REFERENCE = "none"
STEPS = 4
TEXT_TOKENS = 16
WAN_TEXT, QWEN_TEXT = 256, 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

Denoise = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class QuantizedLinear(torch.nn.Module):
    """A Linear whose weight is quantized, multiplied by `lowbit.ops.linear.quantized_linear`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, fast: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.fast = fast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) to (..., N)."""
        return quantized_linear(x, self.weight, self.bias, fast=self.fast)


def _wan() -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=WAN_TEXT, ffn_dim=512, num_layers=2
    )


def _denoise_wan(model, latent, sigma, text):
    return model(hidden_states=latent, timestep=sigma * 1000, encoder_hidden_states=text, return_dict=False)[0]


def _qwen_image() -> torch.nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(num_layers=2, num_attention_heads=2, joint_attention_dim=QWEN_TEXT)


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
    "Wan t2v": ("wan_t2v", _wan, _denoise_wan, (1, 16, 3, 16, 16), WAN_TEXT),
    "Qwen-Image": ("qwen_image", _qwen_image, _denoise_qwen_image, (1, 16, 1, 32, 32), QWEN_TEXT),
}


def run(out: Path, formats: Sequence[str]) -> list[Row]:
    """Runs both models in bfloat16 and in `formats`; pictures go to `out`. Returns the table's rows."""
    with tempfile.TemporaryDirectory(prefix="lowbit-demo-") as folder, torch.inference_mode():
        return [row for model in MODELS for row in _rows(model, Path(folder), out, formats)]


def _rows(title: str, folder: Path, out: Path, formats: Sequence[str]) -> Iterator[Row]:
    stem, make, denoise, shape, width = MODELS[title]
    torch.manual_seed(0)
    decoder = _decoder()
    shapes = {key: tuple(value.shape) for key, value in make().state_dict().items()}
    source = write(folder / f"{stem}.safetensors", draw(shapes))
    reference = None
    for name in (REFERENCE, *formats):
        progress = ProgressLine(f"{title}, {'bf16 (as stored)' if name == REFERENCE else name}")
        started = time.monotonic()
        try:
            path, model = _load(source, make, name, folder, progress)
            latent = _sample(model, denoise, shape, width, 1, progress)
        except LowbitError as error:
            progress.finish(f"failed: {error}")
            yield Row(title, name, problem=str(error))
            continue
        first = time.monotonic() - started
        started = time.monotonic()
        _sample(model, denoise, shape, width, 2, progress)
        again = time.monotonic() - started
        reference = latent if reference is None else reference
        error = None if name == REFERENCE else relative_error(latent, reference)
        _save_pictures(decoder, latent, out / f"{stem}.{name}")
        progress.finish(f"{'reference' if error is None else f'error {error:.2e}'}, {first:.1f} s")
        yield Row(title, name, path.stat().st_size, held_bytes(model), error, first, again)


def _load(
    source: Path, make: Callable[[], torch.nn.Module], name: str, folder: Path, progress: ProgressLine
) -> tuple[Path, torch.nn.Module]:
    """The file that holds the model in format `name`, and the model loaded from it."""
    with torch.device("meta"):
        model = make()
    if name == REFERENCE:
        model.load_state_dict(_moved(load_file(source)), assign=True)
        return source, _with_computed_buffers(model, make)
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, FORMATS[name], None)
    target = folder / f"{source.stem}.{name}.safetensors"
    quantize_checkpoint(
        checkpoint, plan, target, device=DEVICE, progress=lambda done, total, key: progress.step(key, done, total)
    )
    tensors = load_file(target)
    _replace_linears(model, plan, tensors)
    model.load_state_dict(_moved(tensors), assign=True, strict=False)
    return target, _with_computed_buffers(model, make)


def _moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(DEVICE, DTYPE) for key, value in tensors.items() if value.is_floating_point()}


def _replace_linears(model: torch.nn.Module, plan: QuantizationPlan, tensors: dict[str, torch.Tensor]) -> None:
    """Takes the quantized layers' tensors out of `tensors` and puts QuantizedLinear modules in their place."""
    for layer in plan.layers.values():
        if layer.action != "quantize":
            continue
        prefix = f"{layer.name}."
        parts = {
            key.removeprefix(prefix): tensors.pop(key).to(DEVICE) for key in list(tensors) if key.startswith(prefix)
        }
        bias = parts.pop("bias", None)
        weight = assemble(parts, layer.storage, layer.shape, DTYPE)
        module = QuantizedLinear(weight, None if bias is None else bias.to(DTYPE), FORMATS[layer.weight_format].fast)
        parent, _, child = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _with_computed_buffers(model: torch.nn.Module, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Rotary tables are computed by the constructor, and a model made on `meta` has none: take them from another."""
    made = make()
    for name, module in model.named_modules():
        other = made.get_submodule(name) if not isinstance(module, QuantizedLinear) else None
        for key, value in vars(other).items() if other is not None else ():
            if isinstance(value, torch.Tensor):
                setattr(module, key, value.to(DEVICE))
        for key, buffer in other._buffers.items() if other is not None else ():
            if buffer is not None:
                module._buffers[key] = buffer.to(DEVICE)
    return model.eval()


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


def _decoder() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).eval()


def _save_pictures(decoder: torch.nn.Module, latent: torch.Tensor, stem: Path) -> None:
    """The decoded frames as {stem}.png (the first) and, when there are several, {stem}.webp."""
    video = decoder.decode(latent, return_dict=False)[0][0].movedim(0, -1)
    video = (video - video.amin()) / (video.amax() - video.amin()).clamp_min(1e-6)
    frames = [Image.fromarray((frame * 255).round().to(torch.uint8).numpy()) for frame in video]
    frames[0].save(stem.with_name(f"{stem.name}.png"))
    if len(frames) > 1:
        frames[0].save(stem.with_name(f"{stem.name}.webp"), save_all=True, append_images=frames[1:], duration=125)
