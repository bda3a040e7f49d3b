"""Quantizes a model that some other node loaded, keeping the LoRAs and patches that are on it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import comfy.model_patcher
import torch

from ..ops.writer import CheckpointWriter, check_free_space
from .loading import load_diffusion_model, take_over
from .preparing import Planned, Request, plan_file, prepared_file
from .saving import source_checkpoint
from .temporary import temporary_folder

logger = logging.getLogger("lowbit.host")


def quantize_model(
    patcher: comfy.model_patcher.ModelPatcher, request: Request
) -> tuple[comfy.model_patcher.ModelPatcher, Planned]:
    """A patcher like `patcher`, patches and all, over a quantized model.

    The model is quantized from the file it came from; where core did not note one, its unpatched weights are written
    to a temporary file first.

    Raises:
        CheckpointError, FormatError, StorageError: as for the loader.
    """
    origin = source_checkpoint(patcher)
    source = origin.path if origin is not None else _write_unpatched(patcher)
    try:
        planned = plan_file(source, request, patcher.load_device)
        if origin is None and not planned.plan.changes_weights:
            take_over(patcher.model)
            return patcher.clone(), planned
        path = prepared_file(planned)
        quantized = load_diffusion_model(str(path), disable_dynamic=not patcher.is_dynamic())
    finally:
        if origin is None:
            source.unlink(missing_ok=True)
    result = patcher.clone(model_override=quantized.get_clone_model_override())
    result.cached_patcher_init = quantized.cached_patcher_init
    result.size = quantized.model_size()
    # Core falls back to the parent when a clone goes: it must be a patcher of the same model.
    result.parent = quantized
    return result, planned


def _write_unpatched(patcher: comfy.model_patcher.ModelPatcher) -> Path:
    """The model's weights as they are under any patches, in a file of this process's own."""
    with torch.inference_mode():
        state = patcher.model.diffusion_model.state_dict()
        for key, backup in patcher.backup.items():
            name = key.removeprefix("diffusion_model.")
            if name in state:
                state[name] = backup.weight
        state = patcher.model.model_config.process_unet_state_dict_for_saving(state)
        state = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in state.items()}
        label = hashlib.sha256(repr([(name, tuple(tensor.shape)) for name, tensor in state.items()]).encode())
        target = temporary_folder() / f"model-{label.hexdigest()[:12]}.safetensors"
        check_free_space(target.parent, sum(tensor.nbytes for tensor in state.values()), "The model to quantize")
        name_bytes = sum(2 * len(name.encode()) for name in state)
        with CheckpointWriter(target, name_bytes=name_bytes, name_count=len(state), metadata={}) as writer:
            for name, tensor in state.items():
                writer.add(name, tensor)
    return target
