"""What llama.cpp calls the tensors of a text encoder, and what ComfyUI calls them.

Source: llama.cpp's tensor names (gguf-py/gguf/constants.py) and what its converter does to weights (convert_hf_to_gguf.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from .header import Join, TensorEntry

_NUMBERED = re.compile(r"^(?P<stack>.*blk)\.(?P<number>\d+)\.(?P<part>\w+)(?P<suffix>\.\w+)$")


@dataclass(frozen=True)
class TextArchitecture:
    """One text encoder architecture of llama.cpp.

    Attributes:
        stack: what its blocks are called in the file.
        blocks: what they are called in ComfyUI.
        parts: of a block, ours by theirs.
        whole: tensors outside the blocks, ours by theirs, without `.weight`.
        interleaved: q and k rows are stored for a rotary embedding of neighbouring pairs, where ComfyUI's takes halves.
        norms_from_one: the file's norm weights have the 1 in them that ComfyUI adds.
    """

    stack: str
    blocks: str
    parts: Mapping[str, str]
    whole: Mapping[str, str]
    interleaved: bool = False
    norms_from_one: bool = False

    def name(self, theirs: str) -> str | None:
        """ComfyUI's name, or None for what it has no use for."""
        found = _NUMBERED.match(theirs)
        if found is not None:
            part = self.parts.get(found["part"]) if found["stack"] == self.stack else None
            return None if part is None else f"{self.blocks}.{found['number']}.{part}{found['suffix']}"
        stem, _, suffix = theirs.rpartition(".")
        ours = self.whole.get(stem)
        return None if ours is None else f"{ours}.{suffix}"

    def change(self, ours: str, heads: int, key_heads: int) -> Join | None:
        """What has to be done to a tensor besides naming it."""
        if self.interleaved and re.search(r"\.(q|k)_proj\.(weight|bias)$", ours):
            count = heads if ".q_proj." in ours else key_heads
            return lambda parts: halves_from_pairs(parts[0], count)
        if self.norms_from_one and ours.rpartition(".")[0].endswith("norm"):
            return lambda parts: parts[0] - 1
        return None


def halves_from_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads * head_dim, ...) in pairs 0 1 0 1 to halves 0 0 1 1, head by head."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


_DECODER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DECODER_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GEMMA = _DECODER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_T5 = TextArchitecture(
    "enc.blk",
    "encoder.block",
    {
        "attn_norm": "layer.0.layer_norm",
        "attn_q": "layer.0.SelfAttention.q",
        "attn_k": "layer.0.SelfAttention.k",
        "attn_v": "layer.0.SelfAttention.v",
        "attn_o": "layer.0.SelfAttention.o",
        "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
        "ffn_norm": "layer.1.layer_norm",
        "ffn_gate": "layer.1.DenseReluDense.wi_0",
        "ffn_up": "layer.1.DenseReluDense.wi_1",
        "ffn_down": "layer.1.DenseReluDense.wo",
    },
    {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"},
)
_PLAIN = TextArchitecture("blk", "model.layers", _DECODER, _DECODER_WHOLE)
_INTERLEAVED = TextArchitecture("blk", "model.layers", _DECODER, _DECODER_WHOLE, interleaved=True)
_GEMMAS = TextArchitecture("blk", "model.layers", _GEMMA, _DECODER_WHOLE, norms_from_one=True)

TEXT_ARCHITECTURES: Mapping[str, TextArchitecture] = MappingProxyType(
    {
        "t5": _T5,
        "t5encoder": _T5,
        "llama": _INTERLEAVED,
        "mistral3": _INTERLEAVED,
        "qwen2": _PLAIN,
        "qwen2vl": _PLAIN,
        "qwen3": _PLAIN,
        "gemma2": _GEMMAS,
        "gemma3": _GEMMAS,
    }
)
"""`general.architecture` -> names. A diffusion model's file has ComfyUI's names already."""

EMBEDDING = "token_embd.weight"
"""A tensor that every language model of llama.cpp's has, and no diffusion model."""

VISION_ARCHITECTURE = "clip"
"""Of an `mmproj` file."""


_VISION_PARTS = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_out": "attn.proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_VISION_WHOLE = {"v.post_ln": "visual.merger.ln_q", "mm.0": "visual.merger.mlp.0", "mm.2": "visual.merger.mlp.2"}
_VISION = TextArchitecture("v.blk", "visual.blocks", _VISION_PARTS, _VISION_WHOLE)


def scaled(stored: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """A file's tensors, each weight times the scale of the whole of it that llama.cpp stores beside NVFP4."""
    made = dict(stored)
    for name in stored:
        for scale in (f"{name.removesuffix('.weight')}.scale", f"{name}.scale") if name.endswith(".weight") else ():
            if scale in made and math.prod(made[scale].shape) == 1:
                made[name] = TensorEntry.joined(name, [made[name], made.pop(scale)], lambda parts: parts[0] * parts[1])
    return made


def vision_tensors(stored: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The vision tower of Qwen2.5-VL from the tensors of a llama.cpp `mmproj` file, by ComfyUI's names.

    Q, K and V stand apart in the file, and so do the two time steps of the patch embedding.
    """
    named = {name: _VISION.name(name) for name in stored}
    made = {ours: replace(stored[name], name=ours) for name, ours in named.items() if ours is not None}

    def add(ours: str, parts: Sequence[str], join: Join) -> None:
        if stored.keys() >= set(parts):
            made[ours] = TensorEntry.joined(ours, [stored[name] for name in parts], join)

    for name in stored:
        found = _NUMBERED.match(name)
        if found is not None and found["part"] == "attn_q":
            parts = [f"v.blk.{found['number']}.attn_{which}{found['suffix']}" for which in "qkv"]
            add(f"visual.blocks.{found['number']}.attn.qkv{found['suffix']}", parts, torch.cat)
    frames = ("v.patch_embd.weight", "v.patch_embd.weight.1")
    add("visual.patch_embed.proj.weight", frames, lambda parts: torch.stack(parts, 2))
    return made
