"""Tiny checkpoints of the real architectures, seeded: a table of files, written into a ComfyUI models folder.

They need torch and safetensors only (and sentencepiece for UMT5's tokenizer), not ComfyUI. Each file is named by its
path below the models folder; `write("diffusion_models/wan_t2v.safetensors", folder)` writes one, `write_all` all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from . import infinitetalk, lora, quantized, qwen_image, text_encoders, vae, wan
from .tensors import Tensors, draw, linear_names
from .tensors import write as write_file

WAN = wan.WanConfig()
WAN_PLAIN = wan.WanConfig(text=4096)
WAN_SMALL = wan.WanConfig(dim=48, ffn=64, heads=2, text=32)
WAN_I2V_21 = wan.WanConfig(in_channels=36, image_embedding=True)
WAN_I2V_22 = wan.WanConfig(in_channels=36)
WAN_5B = wan.WanConfig(in_channels=48, out_channels=48)
QWEN_IMAGE = qwen_image.QwenImageConfig()
UMT5 = text_encoders.Umt5Config()
QWEN25 = text_encoders.Qwen25Config()
INFINITETALK = infinitetalk.InfiniteTalkConfig()

LORA_LAYERS = ("self_attn.q", "self_attn.v", "cross_attn.k", "ffn.0", "attn.to_q", "attn.to_v", "img_mlp.net.0.proj")


@functools.cache
def wan_tensors(config: wan.WanConfig = WAN) -> Tensors:
    """The weights of a tiny Wan in bfloat16; do not write into them."""
    return draw(wan.shapes(config))


@functools.cache
def qwen_image_tensors(config: qwen_image.QwenImageConfig = QWEN_IMAGE) -> Tensors:
    """The weights of the tiny Qwen-Image in bfloat16; do not write into them."""
    return draw(qwen_image.shapes(config))


def umt5_tensors() -> Tensors:
    """The weights and the tokenizer of the tiny UMT5."""
    weights = draw(text_encoders.umt5_shapes(UMT5))
    for name in weights:
        if name.endswith("SelfAttention.q.weight"):
            weights[name] /= UMT5.head_dim**0.5  # T5 keeps the attention's scale in its query weights
    return weights | {"spiece_model": text_encoders.sentencepiece_model(UMT5.vocabulary)}


def qwen25_tensors() -> Tensors:
    """The weights of the tiny Qwen2.5-VL."""
    return draw(text_encoders.qwen25_shapes(QWEN25))


def qwen25_writing_tensors() -> Tensors:
    """The weights of the tiny Qwen2.5-VL with the output head that the real files have."""
    return qwen25_tensors() | draw({"lm_head.weight": (text_encoders.QWEN_VOCABULARY, QWEN25.width)})


def infinitetalk_tensors() -> Tensors:
    """The weights of the tiny InfiniteTalk patch."""
    return draw(infinitetalk.shapes(INFINITETALK))


def lora_layers(tensors: Tensors) -> list[str]:
    """The layers that a LoRA here changes."""
    return [name for name in linear_names(tensors) if name.endswith(LORA_LAYERS)]


Writer = Callable[[Path], object]


def file_of(make: Callable[[], Tensors], metadata: Mapping[str, str] | None = None) -> Writer:
    """What writes a safetensors file of tensors that are made then."""
    return lambda path: write_file(path, make(), metadata)


def _wan(config: wan.WanConfig) -> Writer:
    return file_of(lambda: wan_tensors(config), config.metadata())


def _wan_variant(make: Callable[[Tensors], Tensors]) -> Writer:
    return file_of(lambda: make(wan_tensors()), WAN.metadata())


def _lora(tensors: Callable[[], Tensors]) -> Writer:
    return file_of(lambda: lora.make(tensors(), lora_layers(tensors())))


def _wan_quantization_metadata(path: Path) -> Path:
    tensors, metadata = quantized.quantization_metadata(wan_tensors())
    return write_file(path, tensors, WAN.metadata() | metadata)


def _wan_sharded(path: Path) -> Path:
    stem = path.name.removesuffix(".safetensors.index.json")
    return quantized.write_sharded(path.parent, stem, wan_tensors(), WAN.metadata())


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

FILES: dict[str, Writer] = {
    "diffusion_models/wan_t2v.safetensors": _wan(WAN),
    "diffusion_models/wan_t2v_plain.safetensors": file_of(lambda: wan_tensors(WAN_PLAIN)),
    "diffusion_models/wan_t2v_small.safetensors": _wan(WAN_SMALL),
    "diffusion_models/wan_i2v_21.safetensors": _wan(WAN_I2V_21),
    "diffusion_models/wan_i2v_22.safetensors": _wan(WAN_I2V_22),
    "diffusion_models/wan_ti2v_5b.safetensors": _wan(WAN_5B),
    "diffusion_models/wan_i2v_infinitetalk.safetensors": _wan(infinitetalk.matching_wan(INFINITETALK)),
    "diffusion_models/wan_t2v_cast_e4m3fn.safetensors": _wan_variant(lambda t: quantized.cast(t, E4M3)),
    "diffusion_models/wan_t2v_cast_e5m2.safetensors": _wan_variant(lambda t: quantized.cast(t, E5M2)),
    "diffusion_models/wan_t2v_scaled_fp8_kijai.safetensors": _wan_variant(quantized.scaled_fp8),
    "diffusion_models/wan_t2v_scaled_fp8_comfy.safetensors": _wan_variant(
        lambda t: quantized.scaled_fp8(t, scale_input=0.05)
    ),
    "diffusion_models/wan_t2v_scaled_fp8_full_precision.safetensors": _wan_variant(
        lambda t: quantized.scaled_fp8(t, full_precision=True)
    ),
    "diffusion_models/wan_t2v_scaled_e5m2.safetensors": _wan_variant(lambda t: quantized.scaled_fp8(t, dtype=E5M2)),
    "diffusion_models/wan_t2v_weight_scale.safetensors": _wan_variant(lambda t: quantized.weight_scale(t, rows=False)),
    "diffusion_models/wan_t2v_weight_scale_rows.safetensors": _wan_variant(
        lambda t: quantized.weight_scale(t, rows=True)
    ),
    "diffusion_models/wan_t2v_quantization_metadata.safetensors": _wan_quantization_metadata,
    "diffusion_models/wan_t2v_comfy_quant.safetensors": _wan_variant(quantized.comfy_quant),
    "diffusion_models/wan_t2v_sharded.safetensors.index.json": _wan_sharded,
    "diffusion_models/qwen_image.safetensors": file_of(qwen_image_tensors),
    "text_encoders/umt5.safetensors": file_of(umt5_tensors),
    "text_encoders/umt5_scaled_fp8.safetensors": file_of(
        lambda: quantized.scaled_fp8(umt5_tensors(), layers=("SelfAttention", "DenseReluDense.w"))
    ),
    "text_encoders/qwen25_vl.safetensors": file_of(qwen25_tensors),
    "text_encoders/qwen25_vl_writing.safetensors": file_of(qwen25_writing_tensors),
    "vae/wan_vae.safetensors": file_of(lambda: draw(vae.shapes())),
    "model_patches/infinitetalk.safetensors": file_of(infinitetalk_tensors),
    "loras/wan.safetensors": _lora(wan_tensors),
    "loras/qwen_image.safetensors": _lora(qwen_image_tensors),
}


def write(name: str, folder: Path) -> Path:
    """Writes the file `name` (a key of FILES) below `folder` unless it is there; returns its path.

    Raises KeyError on an unknown name.
    """
    path = Path(folder) / name
    if not path.exists():
        FILES[name](path)
    return path


def write_all(folder: Path, names: Iterable[str] | None = None) -> dict[str, Path]:
    """Writes every file of FILES (or those in `names`) below `folder`; returns name -> path."""
    return {name: write(name, folder) for name in (FILES if names is None else names)}
