"""Loads prepared files through core, by path, so that LoRA, dynamic VRAM, saving and multi-GPU clones keep working."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...errors import CapabilityError, CheckpointError
from ...ops.checkpoint import Checkpoint, open_checkpoint
from ...ops.diffusion_names import diffusion_names
from ...ops.stored import normalize_state_dict
from ...ops.stored_names import metadata_below
from ...ops.stream import read_origin
from ...versions import advice, find
from ..prompts import keep_prompts_near
from .architecture import MODEL_PATCH_SIGNATURE, check_diffusion_model
from .checked import NumbersCheck, check_shapes, settle, watched
from .elementwise import speed_up_elementwise
from .feed_forward import fuse_feed_forwards, route_input_activations
from .folders import cache_folder
from .input_groups import group_inputs
from .operations import adopt_quantized_linears
from .output_head import attach_output_head, output_head_tensors
from .patching import patch_beside_weights
from .temporary import remove_with

logger = logging.getLogger("lowbit.host")

StateDict = dict[str, torch.Tensor]


_PATCH_DIMENSIONS = {
    "in_dim": "blocks.0.audio_cross_attn.proj.weight",
    "intermediate_dim": MODEL_PATCH_SIGNATURE,
    "out_dim": "audio_proj.norm.weight",
}


def load_diffusion_model(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Load a diffusion model in any naming of quantized weights; its quantized linears multiply through this pack.

    Also the factory that core calls again for clones on other GPUs.

    Args:
        path: a safetensors file.
        disable_dynamic: load for the legacy patcher even where dynamic VRAM is on.

    Raises:
        CheckpointError: the file is damaged, holds NaN or Inf, has no weight for one of the model's Linears, or is of no
            architecture that this ComfyUI knows.
    """
    check_diffusion_model(open_checkpoint(path))
    name = _name_of_file(path)
    state_dict, metadata, numbers = read_stored_file(path, diffusion_model=True)
    with watched(name) as arrivals:
        patcher = comfy.sd.load_diffusion_model_state_dict(
            state_dict, metadata=metadata, disable_dynamic=disable_dynamic
        )
    if patcher is None:
        raise CheckpointError(f"{name} is no diffusion model that this ComfyUI can build: update ComfyUI.")
    settle(arrivals, name)
    numbers.settle(patcher)
    take_over(patcher.model)
    remove_with(patcher.model, path)
    keep_prompts_near(patcher)
    patcher.cached_patcher_init = (load_diffusion_model, (path,))
    return patch_beside_weights(patcher)


def load_text_encoder(
    paths: Sequence[str], clip_type: comfy.sd.CLIPType, device: str = "default", disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """Load one or more text encoder files as a CLIP.

    Args:
        paths: safetensors files.
        clip_type: as core's CLIP loader takes it.
        device: `default`, or `cpu` to keep it there for good and send only embeddings to the GPU.
        disable_dynamic: as above.

    Raises:
        CheckpointError: a file is damaged, holds NaN or Inf, lacks the weight of a Linear, or is no text encoder.
    """
    model_options: dict[str, Any] = {}
    if device == "cpu":
        model_options["load_device"] = model_options["offload_device"] = torch.device("cpu")
    names = ", ".join(map(_name_of_file, paths))
    state_dicts, _, checks = zip(*(read_stored_file(path) for path in paths), strict=True)
    heads = [output_head_tensors(state_dict) for state_dict in state_dicts]
    with watched(names) as arrivals:
        clip = comfy.sd.load_text_encoder_state_dicts(
            list(state_dicts),
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=clip_type,
            model_options=model_options,
            disable_dynamic=disable_dynamic,
        )
    settle(arrivals, names, optional_parts=True)
    attach_output_head(clip, heads)
    for numbers in checks:
        numbers.settle(clip.patcher)
    take_over(clip.cond_stage_model)
    for path in paths:
        remove_with(clip.cond_stage_model, path)
    patch_beside_weights(clip.patcher)
    clip.patcher.cached_patcher_init = (_load_text_encoder_patcher, (list(paths), clip_type, device))
    return clip


def load_model_patch(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Load an InfiniteTalk or MultiTalk patch, quantized or not; any other model patch goes to core's own loader.

    Raises:
        CheckpointError: the file is damaged, its tensors are not those of the patch, or it is another quantized patch.
        CapabilityError: this ComfyUI has no such patches.
    """
    checkpoint = open_checkpoint(path)
    if MODEL_PATCH_SIGNATURE not in checkpoint.entries:
        return _load_other_patch(path)
    dimensions = _patch_dimensions(checkpoint)
    state_dict, _, numbers = read_stored_file(path)
    device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    compute_dtype = comfy.model_management.unet_manual_cast(
        None, device, [torch.bfloat16, torch.float16, torch.float32]
    )
    model = _of_model_patches("MultiTalkModelPatch")(
        audio_window=5,
        context_tokens=32,
        vae_scale=4,
        **dimensions,
        device=offload_device,
        dtype=compute_dtype,
        operations=comfy.ops.mixed_precision_ops({}, compute_dtype),
    )
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=offload_device)
    try:
        model.load_state_dict(state_dict, assign=patcher.is_dynamic())
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{_name_of_file(path)} does not hold an InfiniteTalk patch's tensors ({reason[:200]}): download it again."
        ) from None
    check_shapes(dict(model.named_modules()), _name_of_file(path))
    numbers.settle(patcher)
    take_over(model)
    remove_with(model, path)
    patcher.cached_patcher_init = (load_model_patch, (path,))
    return patch_beside_weights(patcher)


def take_over(model: torch.nn.Module) -> int:
    """Have the quantized linears of a loaded model multiply through this pack; returns how many do."""
    adopted = adopt_quantized_linears(model)
    if adopted:
        fuse_feed_forwards(model)
        group_inputs(model)
        route_input_activations()
        speed_up_elementwise(model)
    return adopted


def _name_of_file(path: str) -> str:
    """What the user calls a file: one in the cache by the name of the file that it was made of."""
    origin = read_origin(open_checkpoint(path).metadata) if Path(path).is_relative_to(cache_folder()) else None
    return str((origin or {}).get("source", Path(path).name))


def _load_text_encoder_patcher(
    paths: Sequence[str], clip_type: comfy.sd.CLIPType, device: str, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    return load_text_encoder(paths, clip_type, device, disable_dynamic).patcher


def _patch_dimensions(checkpoint: Checkpoint) -> dict[str, int]:
    """Core's arguments of an InfiniteTalk patch that its file tells, each the first dimension of a tensor."""
    dimensions = {}
    for argument, name in _PATCH_DIMENSIONS.items():
        entry = checkpoint.entries.get(name)
        if entry is None or not entry.shape:
            raise CheckpointError(
                f"{checkpoint.path.name} is only part of an InfiniteTalk patch, without '{name}': download it again."
            )
        dimensions[argument] = entry.shape[0]
    return dimensions


def _load_other_patch(path: str) -> comfy.model_patcher.ModelPatcher:
    for root in folder_paths.get_folder_paths("model_patches"):
        if Path(path).is_relative_to(root):
            loader = _of_model_patches("ModelPatchLoader")()
            with watched(Path(path).name):
                try:
                    return loader.load_model_patch(Path(path).relative_to(root).as_posix())[0]
                except UnboundLocalError as error:  # what core's loader makes of a file that it knows no patch by
                    raise CheckpointError(
                        f"{Path(path).name} is no model patch that this ComfyUI knows: check the file or update ComfyUI."
                    ) from error
    raise CheckpointError(f"{Path(path).name} lies outside the model_patches folders: move it there.")


def _of_model_patches(name: str) -> Any:
    """A class of core's model patches."""
    found = find(f"comfy_extras.nodes_model_patch.{name}")
    if found is None:
        raise CapabilityError(f"This ComfyUI has no {name} to load the patch with. {advice()}")
    return found


def read_stored_file(path: str, *, diffusion_model: bool = False) -> tuple[StateDict, dict[str, str], NumbersCheck]:
    """The file through core's loader (memory-mapped under dynamic VRAM), in core's names for quantized weights.

    Whether it holds numbers is being looked at, and still to be judged; of a diffusion model's file, the diffusion model alone is
    read.
    """
    name, stamps = Path(path).name, open_checkpoint(path).stamps
    stored, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    metadata = dict(metadata or {})
    if diffusion_model:
        # What a file's other parts hold decides nothing.
        prefix, below = diffusion_names(stored)
        metadata = metadata_below(metadata, prefix, stored)
        stored = {ours: stored[source] for ours, source in below.items()}
    try:
        normalized = normalize_state_dict(stored, metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    # Core would apply this a second time, to names that are final by now.
    metadata.pop("_quantization_metadata", None)
    numbers = NumbersCheck(name, stamps, metadata, stored, normalized, diffusion_model=diffusion_model)
    return normalized, metadata, numbers
