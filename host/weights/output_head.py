"""Gives Qwen2.5-VL the output head that its file has and core leaves out, so that it can write text."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.sd
import torch

from ...versions import find

_PREFIX = "lm_head."


def attach_output_head(clip: comfy.sd.CLIP, heads: Sequence[dict[str, torch.Tensor]]) -> bool:
    """Load the first of `heads` that is not empty into the Qwen2.5-VL of `clip`; returns whether both are there.

    The head becomes a part of the model (`model.lm_head`), so that it is loaded, patched, streamed and saved as the rest.
    """
    wrapper, kind = find("comfy.sd1_clip.SDClipModel"), find("comfy.text_encoders.llama.Qwen25_7BVLI")
    archive_dtypes = find("comfy.model_management.archive_model_dtypes")
    if wrapper is None or kind is None or archive_dtypes is None:
        return False
    head = next((tensors for tensors in heads if tensors), None)
    encoder = next(
        (
            module
            for module in clip.cond_stage_model.modules()
            if isinstance(module, wrapper) and isinstance(module.transformer, kind)
        ),
        None,
    )
    if head is None or encoder is None:
        return False
    config = encoder.transformer.model.config
    device = next(encoder.transformer.parameters()).device
    module = encoder.operations.Linear(
        config.hidden_size, config.vocab_size, bias=False, device=device, dtype=encoder.transformer.dtype
    )
    module.load_state_dict(head, strict=False, assign=clip.patcher.is_dynamic())
    module.requires_grad_(False)
    archive_dtypes(module)
    encoder.transformer.model.lm_head = module
    clip.patcher.size = 0  # core counts again
    return True


def output_head_tensors(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder file's `lm_head.*`, without the prefix; in `state_dict` they get the names of core's modules.

    Core renames the weight alone, and a quantized head would lose its scales.
    """
    head = {name.removeprefix(_PREFIX): name for name in state_dict if name.startswith(_PREFIX)}
    for name in head.values():
        state_dict[f"model.{name}"] = state_dict.pop(name)
    return {suffix: state_dict[f"model.{name}"] for suffix, name in head.items()}
