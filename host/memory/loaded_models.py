"""Which models ComfyUI holds, which component each is, and how many bytes of it lie on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.memory_management
import comfy.model_base
import comfy.model_management
import torch

from ...memory.components import AUDIO_ENCODER, DIFFUSION_MODEL, MODEL_PATCH, SCRATCH, TEXT_ENCODER, VAE
from ...ops.scratch import scratch_nbytes

# Beginning of the module a model's class lives in -> component. The first that fits counts.
_MODULES = (
    ("comfy.audio_encoders", AUDIO_ENCODER),
    ("comfy.text_encoders", TEXT_ENCODER),
    ("comfy.sd1_clip", TEXT_ENCODER),
    ("comfy.sdxl_clip", TEXT_ENCODER),
    ("comfy_extras.nodes_model_patch", MODEL_PATCH),
    ("comfy.controlnet", MODEL_PATCH),
    ("comfy.taesd", VAE),
)
_VAE_WORDS = ("vae", "autoencod", "taesd", "stagea", "stagec")


def component_of(model: Any) -> str | None:
    """The component that a patcher's model is; None for a kind of model that has no name here."""
    if isinstance(model, comfy.model_base.BaseModel):
        return DIFFUSION_MODEL
    kinds = type(model).__mro__
    for kind in kinds:
        for beginning, component in _MODULES:
            if kind.__module__.startswith(beginning):
                return component
    if hasattr(model, "encode_token_weights"):
        return TEXT_ENCODER
    if any(word in kind.__name__.lower() for kind in kinds for word in _VAE_WORDS):
        return VAE
    return None


def loaded_patchers() -> Iterator[Any]:
    """The patchers that ComfyUI counts as loaded, clones of one model once."""
    seen = set()
    for loaded in list(comfy.model_management.current_loaded_models):
        patcher = loaded.model
        if patcher is not None and id(patcher.model) not in seen:
            seen.add(id(patcher.model))
            yield patcher


def resident(patcher: Any) -> int:
    """Bytes of a patcher's weights on its device, as ComfyUI counts them."""
    return int(patcher.loaded_size())


def left_to_load(patcher: Any) -> int:
    """Bytes of a patcher's weights that are not on its device."""
    return max(0, int(patcher.model_size()) - resident(patcher))


def component_bytes(device: torch.device) -> dict[str, int]:
    """Resident bytes on a device by component; models of one kind are added up, unknown ones are left to `other`."""
    sizes: dict[str, int] = {}
    for patcher in loaded_patchers():
        component = component_of(patcher.model)
        if component is not None:
            here = resident(patcher) if patcher.load_device == device else 0
            sizes[component] = sizes.get(component, 0) + here
    sizes[SCRATCH] = scratch_nbytes()
    return sizes


def unnamed_bytes(device: torch.device) -> int:
    """Resident bytes on a device of loaded models that are no component: ControlNets, CLIP vision, upscalers."""
    return sum(
        resident(patcher)
        for patcher in loaded_patchers()
        if patcher.load_device == device and component_of(patcher.model) is None
    )


def weight_tensors() -> Iterator[torch.Tensor]:
    """The tensors of all loaded models, those that dynamic VRAM has put into its pages included."""
    for patcher in loaded_patchers():
        for module in patcher.model.modules():
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)
            paged = (vars(module).get(name) for name in ("_v_weight", "_v_bias"))
            yield from (tensor for tensor in paged if tensor is not None)


def outside_bytes(device: torch.device) -> int:
    """Bytes of a GPU that dynamic VRAM holds outside PyTorch's allocator: resident pages of weights, and cast buffers.

    Its own total would not do: it has PyTorch's allocations in it, which it sees too.
    """
    if not comfy.memory_management.aimdo_enabled:
        return 0
    ranges = [getattr(patcher.model, "dynamic_vbars", {}).get(device) for patcher in loaded_patchers()]
    buffers = getattr(comfy.model_management, "STREAM_AIMDO_CAST_BUFFERS", {}).values()
    return sum(int(found.loaded_size()) for found in ranges if found is not None) + sum(
        int(buffer.size()) for buffer in list(buffers) if buffer.device == device.index
    )


def pinned_bytes() -> int:
    """Bytes of main memory that ComfyUI has pinned."""
    return int(comfy.model_management.TOTAL_PINNED_MEMORY)
