"""The UMT5 encoder on a table of parameters, as ComfyUI runs it for Wan, and the tokenizer of the demo's prompts."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from testing.tiny.text_encoders import Umt5Config

Parameters = Mapping[str, torch.Tensor]
CONFIG = Umt5Config(width=256, ffn=256, heads=4, layers=2, vocabulary=32)
PAD, END, UNKNOWN = 0, 1, 2
_BUCKETS, _FARTHEST = 32, 128
_EPSILON = 1e-6


def tokenizer(prompts: Sequence[str]) -> torch.Tensor:
    """A sentencepiece model of the words of `prompts`, as the uint8 tensor `spiece_model` of Wan's UMT5 files."""
    import sentencepiece

    words = {word for prompt in prompts for word in prompt.split()}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts),
        model_writer=model,
        model_type="word",
        vocab_size=len(words) + 3,
        character_coverage=1.0,
        pad_id=PAD,
        eos_id=END,
        unk_id=UNKNOWN,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8).clone()


def tokenize(spiece_model: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the prompts, each with its end token, padded to the longest: (prompts, tokens), and which are real."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece_model.numpy().tobytes(), add_eos=True)
    rows = [processor.encode(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest) < lengths[:, None]


def encode(parameters: Parameters, ids: torch.Tensor, real: torch.Tensor, config: Umt5Config = CONFIG) -> torch.Tensor:
    """Embeddings of the tokens, zero where there is padding: (prompts, tokens) -> (prompts, tokens, width)."""
    x = parameters["shared.weight"][ids]
    unseen = torch.zeros(real.shape, dtype=x.dtype).masked_fill(~real, -torch.finfo(x.dtype).max)[:, None, None]
    for index in range(config.layers):
        x = _block(parameters, f"encoder.block.{index}", x, unseen, config)
    return _norm(parameters, "encoder.final_layer_norm", x) * real[..., None]


def _block(
    parameters: Parameters, name: str, x: torch.Tensor, unseen: torch.Tensor, config: Umt5Config
) -> torch.Tensor:
    attention, dense = f"{name}.layer.0.SelfAttention", f"{name}.layer.1.DenseReluDense"
    y = _norm(parameters, f"{name}.layer.0.layer_norm", x)
    q, k, v = (
        F.linear(y, parameters[f"{attention}.{part}.weight"]).unflatten(2, (config.heads, -1)).transpose(1, 2)
        for part in "qkv"
    )
    bias = parameters[f"{attention}.relative_attention_bias.weight"][_buckets(x.shape[1])].permute(2, 0, 1)
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=unseen + bias, scale=1.0)
    x = x + F.linear(seen.transpose(1, 2).flatten(2), parameters[f"{attention}.o.weight"])
    y = _norm(parameters, f"{name}.layer.1.layer_norm", x)
    gate = F.gelu(F.linear(y, parameters[f"{dense}.wi_0.weight"]), approximate="tanh")
    return x + F.linear(gate * F.linear(y, parameters[f"{dense}.wi_1.weight"]), parameters[f"{dense}.wo.weight"])


def _norm(parameters: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], parameters[f"{name}.weight"], _EPSILON)


def _buckets(tokens: int) -> torch.Tensor:
    """T5's buckets of relative positions: exact up to 8 tokens, then logarithmic up to 128."""
    position = torch.arange(tokens)
    relative = position[None, :] - position[:, None]
    half, exact = _BUCKETS // 2, _BUCKETS // 4
    away = relative.abs()
    far = exact + (away.clamp(min=1) / exact).log() / math.log(_FARTHEST / exact) * (half - exact)
    return (relative > 0) * half + torch.where(away < exact, away, far.long().clamp(max=half - 1))
