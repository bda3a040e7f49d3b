"""Tiny checkpoints under the very names that ComfyUI's official templates ask for, and the images and sounds they load.

The weights are 16-bit whatever the name says, so that a bundled workflow really quantizes them.
"""

from __future__ import annotations

import math
import struct
import wave
from pathlib import Path

import torch
from PIL import Image

from . import (
    INFINITETALK,
    QWEN_IMAGE,
    WAN,
    WAN_I2V_22,
    Writer,
    file_of,
    infinitetalk,
    infinitetalk_tensors,
    lora,
    lora_layers,
    qwen25_writing_tensors,
    qwen_image,
    umt5_tensors,
    vae,
    wan,
)
from .tensors import Tensors, draw

_INFINITETALK_WAN = infinitetalk.matching_wan(INFINITETALK)


def _wan(config: wan.WanConfig, seed: int) -> Writer:
    return file_of(lambda: draw(wan.shapes(config), seed), config.metadata())


def _qwen_image(seed: int) -> Writer:
    return file_of(lambda: draw(qwen_image.shapes(QWEN_IMAGE), seed))


def _lightning(shapes: dict[str, tuple[int, ...]], prefix: str, seed: int, bias: bool = False) -> Writer:
    """A step-distillation LoRA as lightx2v writes them: down, up and alpha for each layer, with `bias` a `.diff_b` too."""

    def make() -> Tensors:
        weights = draw(shapes)
        layers = lora_layers(weights)
        biases = {f"{prefix}{name}.diff_b": shapes[f"{name}.bias"] for name in layers if bias}
        return lora.make(weights, layers, prefix, seed) | draw(biases, seed)

    return file_of(make)


def wav2vec2_shapes() -> dict[str, tuple[int, ...]]:
    """Of a wav2vec2-base, as transformers has it: of the real size, because ComfyUI knows no other (190 MB)."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    with torch.device("meta"):
        tensors = Wav2Vec2Model(Wav2Vec2Config()).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


_vae = file_of(lambda: draw(vae.shapes()))


def _image(number: int) -> Writer:
    """A smooth color gradient with a disc."""

    def write(path: Path) -> None:
        picture = Image.new("RGB", (96, 96))
        for x in range(96):
            for y in range(96):
                disc = (x - 30 - 10 * number) ** 2 + (y - 48) ** 2 < 400
                picture.putpixel((x, y), (230, 60, 60) if disc else (2 * x, 2 * y, 60 * number))
        picture.save(path)

    return write


def _mask(left: bool) -> Writer:
    """What the mask painter leaves: opaque where one speaker is, on the left or the right half."""

    def write(path: Path) -> None:
        picture = Image.new("RGBA", (96, 96))
        picture.paste((0, 0, 0, 255), (0, 0, 48, 96) if left else (48, 0, 96, 96))
        picture.save(path)

    return write


def _sound(pitch: float) -> Writer:
    """Half a second of a swelling tone. The name may say mp3: the content decides."""

    def write(path: Path) -> None:
        rate, seconds = 16000, 0.5
        samples = (
            int(12000 * math.sin(2 * math.pi * pitch * n / rate) * n / rate / seconds)
            for n in range(int(rate * seconds))
        )
        with path.open("wb") as file, wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(rate)
            sound.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))

    return write


_T2V, _I2V, _QWEN = wan.shapes(WAN), wan.shapes(WAN_I2V_22), qwen_image.shapes(QWEN_IMAGE)
_TALK = wan.shapes(_INFINITETALK_WAN)

FILES: dict[str, Writer] = {
    "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": _wan(WAN, 1),
    "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": _wan(WAN, 2),
    "diffusion_models/wan2.2_t2v_high_noise_14B_fp16.safetensors": _wan(WAN, 1),
    "diffusion_models/wan2.2_t2v_low_noise_14B_fp16.safetensors": _wan(WAN, 2),
    "diffusion_models/wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors": _wan(WAN_I2V_22, 1),
    "diffusion_models/wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors": _wan(WAN_I2V_22, 2),
    "diffusion_models/Wan2_1-I2V-14B-480p_fp8_e4m3fn_scaled_KJ.safetensors": _wan(_INFINITETALK_WAN, 3),
    "diffusion_models/qwen_image_fp8_e4m3fn.safetensors": _qwen_image(1),
    "diffusion_models/qwen_image_bf16.safetensors": _qwen_image(1),
    "diffusion_models/qwen_image_edit_fp8_e4m3fn.safetensors": _qwen_image(2),
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": file_of(umt5_tensors),
    "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors": file_of(qwen25_writing_tensors),
    "vae/wan_2.1_vae.safetensors": _vae,
    "vae/Wan2_1_VAE_bf16.safetensors": _vae,
    "vae/qwen_image_vae.safetensors": _vae,
    "loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": _lightning(_T2V, "diffusion_model.", 11),
    "loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors": _lightning(_T2V, "diffusion_model.", 12),
    "loras/wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors": _lightning(_I2V, "diffusion_model.", 13),
    "loras/wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors": _lightning(_I2V, "diffusion_model.", 14),
    "loras/lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors": _lightning(
        _TALK, "diffusion_model.", 15, bias=True
    ),
    "loras/Qwen-Image-Lightning-8steps-V1.0.safetensors": _lightning(_QWEN, "", 16),
    "loras/Qwen-Image-Edit-Lightning-4steps-V1.0-bf16.safetensors": _lightning(_QWEN, "", 17),
    "model_patches/wan2.1_infiniteTalk_single_fp16.safetensors": file_of(infinitetalk_tensors),
    "model_patches/wan2.1_infiniteTalk_multi_fp16.safetensors": file_of(infinitetalk_tensors),
    "audio_encoders/wav2vec2-chinese-base_fp16.safetensors": file_of(
        lambda: draw(wav2vec2_shapes(), dtype=torch.float16)
    ),
}
"""Path below the models folder -> what writes it."""

INPUTS: dict[str, Writer] = {
    "image_qwen_image_edit_input_image.png": _image(0),
    "video_wan2_2_14B_i2v_input_image.jpg": _image(1),
    "two_character_talking.png": _image(2),
    "audio_speaker1_woman.mp3": _sound(220.0),
    "audio_speaker2_man.mp3": _sound(110.0),
    "mask_left.png": _mask(left=True),
    "mask_right.png": _mask(left=False),
}
"""File in ComfyUI's input folder -> what writes it."""


def write_all(base: Path) -> None:
    """Writes every file of FILES and INPUTS below a ComfyUI base directory unless it is there."""
    for folder, table in (("models", FILES), ("input", INPUTS)):
        for name, write in table.items():
            path = base / folder / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
