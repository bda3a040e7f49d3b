"""Writes tensors as GGUF files in the names of llama.cpp and ComfyUI-GGUF, with the `gguf` package's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.ops.gguf_names import TEXT_ARCHITECTURES

LARGEST_DIMENSION = 4


def write(
    path: Path, architecture: str, tensors: Mapping[str, torch.Tensor], kind: str | None = "Q8_0", **fields: Any
) -> dict[str, torch.Tensor]:
    """Writes `tensors` under their own names; returns what a reader decodes of them.

    Args:
        path: the file.
        architecture: `general.architecture`.
        tensors: by name.
        kind: block format of the matrices whose rows are whole blocks; None stores float32.
        fields: further entries: integers, or lists of them.
    """
    import gguf

    writer, decoded = gguf.GGUFWriter(path, architecture), {}
    for name, value in fields.items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(name, value)
    for name, tensor in tensors.items():
        numbers = np.ascontiguousarray(tensor.float().numpy())
        if numbers.ndim > LARGEST_DIMENSION:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(numbers.shape))
            numbers = numbers.reshape(numbers.shape[0], -1)
        values, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind or "F32"]]
        if kind is not None and numbers.ndim == 2 and numbers.shape[1] % values == 0:
            coded = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(name, coded, raw_dtype=gguf.GGMLQuantizationType[kind])
            numbers = gguf.dequantize(coded, gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, numbers)
        decoded[name] = torch.from_numpy(numbers.reshape(tuple(tensor.shape)).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def llama_names(architecture: str, names: Mapping[str, Any]) -> dict[str, str]:
    """ComfyUI's names of a text encoder -> llama.cpp's."""
    row = TEXT_ARCHITECTURES[architecture]
    parts = {ours: theirs for theirs, ours in row.parts.items()}
    whole = {ours: theirs for theirs, ours in row.whole.items()}
    result = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if stem in whole:
            result[name] = f"{whole[stem]}.{suffix}"
        elif stem.startswith(f"{row.blocks}."):
            number, _, part = stem.removeprefix(f"{row.blocks}.").partition(".")
            result[name] = f"{row.stack}.{number}.{parts[part]}.{suffix}"
    return result


def vision_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen2.5-VL's vision tower as an `mmproj` file has it: Q, K and V apart, a patch embedding a time step."""
    plain = {"norm1": "ln1", "norm2": "ln2", "attn.proj": "attn_out"}
    plain |= {f"mlp.{which}_proj": f"ffn_{which}" for which in ("gate", "up", "down")}
    whole = {"merger.ln_q": "v.post_ln", "merger.mlp.0": "mm.0", "merger.mlp.2": "mm.2"}
    result = {}
    for name, tensor in tensors.items():
        if not name.startswith("visual."):
            continue
        stem, _, suffix = name.removeprefix("visual.").rpartition(".")
        if stem in whole:
            result[f"{whole[stem]}.{suffix}"] = tensor
        elif stem == "patch_embed.proj":
            result |= {"v.patch_embd.weight": tensor[:, :, 0], "v.patch_embd.weight.1": tensor[:, :, 1]}
        else:
            _, number, part = stem.split(".", 2)
            if part == "attn.qkv":
                result |= {
                    f"v.blk.{number}.attn_{which}.{suffix}": third
                    for which, third in zip("qkv", tensor.chunk(3), strict=True)
                }
            else:
                result[f"v.blk.{number}.{plain[part]}.{suffix}"] = tensor
    return result
