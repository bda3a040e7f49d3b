"""Wraps ComfyUI's model detection so that dimensions it takes as constants follow the tensors of tiny checkpoints."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_detection
import comfy.sd
import comfy.text_encoders.qwen_vl as qwen_vl
import comfy.text_encoders.sd3_clip as sd3_clip

QWEN_HEAD_DIM = 128
UMT5_MARK = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
QWEN25_MARK = "model.layers.0.self_attn.k_proj.bias"
VISION_MARK = "visual.patch_embed.proj.weight"
VISION_HEADS = 4
REAL_VISION_WIDTH = 1280


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Puts the wrappers in place, once per process; with a MonkeyPatch's `setattr`, for as long as that lasts."""
    for owner, name, wrap in (
        (comfy.model_detection, "detect_unet_config", _with_qwen_image_dims),
        (comfy.sd, "detect_te_model", _with_umt5),
        (comfy.sd, "t5xxl_detect", _with_umt5_quantization),
        (comfy.sd, "load_text_encoder_state_dicts", _with_text_encoder_dims),
    ):
        put(owner, name, wrap(getattr(owner, name)))


def _with_qwen_image_dims(detect: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(detect)
    def wrapped(state_dict, key_prefix, metadata=None):
        config = detect(state_dict, key_prefix, metadata=metadata)
        if config is not None and config.get("image_model") == "qwen_image":
            head_dim = state_dict[f"{key_prefix}transformer_blocks.0.attn.norm_q.weight"].shape[0]
            config["attention_head_dim"] = head_dim
            config["num_attention_heads"] = state_dict[f"{key_prefix}img_in.weight"].shape[0] // head_dim
            config["joint_attention_dim"] = state_dict[f"{key_prefix}txt_norm.weight"].shape[0]
        return config

    return wrapped


def _with_umt5(detect: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(detect)
    def wrapped(state_dict):
        if UMT5_MARK in state_dict:
            return comfy.sd.TEModel.T5_XXL
        return detect(state_dict)

    return wrapped


def _with_umt5_quantization(detect: Callable[..., Any]) -> Callable[..., Any]:
    """ComfyUI looks for T5's dtype and quantization only where layer 23 is, which a tiny one has not."""

    @functools.wraps(detect)
    def wrapped(clip_data):
        for state_dict in clip_data:
            if UMT5_MARK in state_dict:
                return sd3_clip.t5_xxl_detect(state_dict)
        return detect(clip_data)

    return wrapped


def _with_text_encoder_dims(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def wrapped(state_dicts=(), *args, model_options=None, **kwargs):
        options = dict(model_options or {})
        vision = None
        for state_dict in state_dicts:
            if UMT5_MARK in state_dict:
                options["umt5xxl_model_config"] = _umt5_config(state_dict)
            elif QWEN25_MARK in state_dict:
                options["qwen25_7b_model_config"] = _qwen25_config(state_dict)
                vision = _vision_config(state_dict)
        with _vision_tower(vision):
            return load(state_dicts, *args, model_options=options, **kwargs)

    return wrapped


def _count(keys: Iterable[str], pattern: str) -> int:
    found = [re.match(pattern, key) for key in keys]
    return 1 + max(int(match.group(1)) for match in found if match)


def _umt5_config(state_dict) -> dict[str, int]:
    attention = "encoder.block.0.layer.0.SelfAttention"
    heads = state_dict[f"{attention}.relative_attention_bias.weight"].shape[1]
    return {
        "d_model": state_dict["encoder.final_layer_norm.weight"].shape[0],
        "d_ff": state_dict["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "d_kv": state_dict[f"{attention}.q.weight"].shape[0] // heads,
        "num_heads": heads,
        "num_layers": _count(state_dict, r"encoder\.block\.(\d+)\."),
        "vocab_size": state_dict["shared.weight"].shape[0],
    }


def _qwen25_config(state_dict) -> dict[str, int]:
    layer = "model.layers.0"
    return {
        "hidden_size": state_dict["model.norm.weight"].shape[0],
        "intermediate_size": state_dict[f"{layer}.mlp.gate_proj.weight"].shape[0],
        "num_attention_heads": state_dict[f"{layer}.self_attn.q_proj.bias"].shape[0] // QWEN_HEAD_DIM,
        "num_key_value_heads": state_dict[f"{layer}.self_attn.k_proj.bias"].shape[0] // QWEN_HEAD_DIM,
        "num_hidden_layers": _count(state_dict, r"model\.layers\.(\d+)\."),
    }


def _vision_config(state_dict) -> dict[str, int] | None:
    """Sizes of a vision tower that is smaller than the real one; None leaves ComfyUI's."""
    if VISION_MARK not in state_dict or state_dict[VISION_MARK].shape[0] == REAL_VISION_WIDTH:
        return None
    return {
        "hidden_size": state_dict[VISION_MARK].shape[0],
        "intermediate_size": state_dict["visual.blocks.0.mlp.gate_proj.bias"].shape[0],
        "num_layers": _count(state_dict, r"visual\.blocks\.(\d+)\."),
        "num_heads": VISION_HEADS,
    }


@contextmanager
def _vision_tower(config: dict[str, int] | None) -> Iterator[None]:
    """While active, a Qwen2.5-VL is built with a vision tower of these sizes."""
    original = qwen_vl.Qwen2VLVisionTransformer
    if config is not None:
        qwen_vl.Qwen2VLVisionTransformer = lambda **sizes: original(**(sizes | config))
    try:
        yield
    finally:
        qwen_vl.Qwen2VLVisionTransformer = original
