"""Tiny UMT5 and Qwen2.5-VL text encoders with the key names of the real files, and a tiny sentencepiece tokenizer."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .tensors import linear, norm

QWEN_VOCABULARY = 152064
QWEN_HEAD_DIM = 128
PAD, END, UNKNOWN = 0, 1, 2
"""Tokens of the sentencepiece models."""

SENTENCES = (
    "a cat walks over the quiet roof in the morning light",
    "two people talk by the window while rain falls",
    "wide shot of a red train crossing a bridge, film grain, soft colors",
    "portrait of an old sailor, 35mm photograph, shallow depth of field",
    "blurry, low quality, watermark, text, deformed hands",
)


@dataclass(frozen=True)
class Umt5Config:
    """Dimensions of a tiny UMT5 encoder. Real UMT5-XXL: width 4096, ffn 10240, 64 heads of 64, 24 layers."""

    width: int = 256
    ffn: int = 512
    heads: int = 4
    head_dim: int = 64
    layers: int = 2
    vocabulary: int = 96


@dataclass(frozen=True)
class Qwen25Config:
    """Dimensions of a tiny Qwen2.5-VL. Real 7B: width 3584, ffn 18944, 28 heads, 28 layers, vision 1280, 32 layers."""

    width: int = 64
    ffn: int = 256
    heads: int = 4
    key_value_heads: int = 4
    layers: int = 2
    vision_width: int = 64
    vision_ffn: int = 128
    vision_layers: int = 1


def umt5_shapes(config: Umt5Config) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of the UMT5 encoder (without its tokenizer)."""
    inner = config.heads * config.head_dim
    table: dict[str, tuple[int, ...]] = {"shared.weight": (config.vocabulary, config.width)}
    for index in range(config.layers):
        name = f"encoder.block.{index}"
        for part in "qkv":
            table |= linear(f"{name}.layer.0.SelfAttention.{part}", inner, config.width, bias=False)
        table |= {
            **linear(f"{name}.layer.0.SelfAttention.o", config.width, inner, bias=False),
            f"{name}.layer.0.SelfAttention.relative_attention_bias.weight": (32, config.heads),
            **norm(f"{name}.layer.0.layer_norm", config.width),
            **linear(f"{name}.layer.1.DenseReluDense.wi_0", config.ffn, config.width, bias=False),
            **linear(f"{name}.layer.1.DenseReluDense.wi_1", config.ffn, config.width, bias=False),
            **linear(f"{name}.layer.1.DenseReluDense.wo", config.width, config.ffn, bias=False),
            **norm(f"{name}.layer.1.layer_norm", config.width),
        }
    return table | norm("encoder.final_layer_norm", config.width)


def qwen25_shapes(config: Qwen25Config) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of Qwen2.5-VL: the language model and the vision tower."""
    query, key_value = config.heads * QWEN_HEAD_DIM, config.key_value_heads * QWEN_HEAD_DIM
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (QWEN_VOCABULARY, config.width)}
    for index in range(config.layers):
        name = f"model.layers.{index}"
        table |= {
            **linear(f"{name}.self_attn.q_proj", query, config.width),
            **linear(f"{name}.self_attn.k_proj", key_value, config.width),
            **linear(f"{name}.self_attn.v_proj", key_value, config.width),
            **linear(f"{name}.self_attn.o_proj", config.width, query, bias=False),
            **linear(f"{name}.mlp.gate_proj", config.ffn, config.width, bias=False),
            **linear(f"{name}.mlp.up_proj", config.ffn, config.width, bias=False),
            **linear(f"{name}.mlp.down_proj", config.width, config.ffn, bias=False),
            **norm(f"{name}.input_layernorm", config.width),
            **norm(f"{name}.post_attention_layernorm", config.width),
        }
    return table | norm("model.norm", config.width) | _vision_shapes(config)


def _vision_shapes(config: Qwen25Config) -> dict[str, tuple[int, ...]]:
    width, merged = config.vision_width, config.vision_width * 4
    table: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (width, 3, 2, 14, 14)}
    for index in range(config.vision_layers):
        name = f"visual.blocks.{index}"
        table |= {
            **norm(f"{name}.norm1", width),
            **norm(f"{name}.norm2", width),
            **linear(f"{name}.attn.qkv", width * 3, width),
            **linear(f"{name}.attn.proj", width, width),
            **linear(f"{name}.mlp.gate_proj", config.vision_ffn, width),
            **linear(f"{name}.mlp.up_proj", config.vision_ffn, width),
            **linear(f"{name}.mlp.down_proj", width, config.vision_ffn),
        }
    return table | {
        **norm("visual.merger.ln_q", width),
        **linear("visual.merger.mlp.0", merged, merged),
        **linear("visual.merger.mlp.2", config.width, merged),
    }


def sentencepiece_model(vocabulary: int, sentences: Iterable[str] = SENTENCES, **options: Any) -> torch.Tensor:
    """A sentencepiece model trained on a few sentences, as the uint8 tensor `spiece_model` of Wan's UMT5 files.

    options: further ones of the trainer.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocabulary,
        pad_id=PAD,
        eos_id=END,
        unk_id=UNKNOWN,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8).clone()
