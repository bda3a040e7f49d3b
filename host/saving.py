"""Writes a loaded model, LoRAs merged in, to a core-format file that stock ComfyUI opens."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch

from ..ops.writer import CheckpointWriter, check_free_space

logger = logging.getLogger("lowbit.host")

_PREFIX = "model.diffusion_model."


def save_diffusion_model(patcher: comfy.model_patcher.ModelPatcher, filename_prefix: str) -> Path:
    """Save the diffusion model as `<output>/<filename_prefix>_00001_.safetensors`, one weight in memory at a time.

    Args:
        patcher: the model, with whatever LoRAs are on it.
        filename_prefix: as in core's Save nodes; may name a subfolder.

    Returns:
        The file.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
    target = Path(folder) / f"{name}_{counter:05}_.safetensors"
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
        tensors = {key.removeprefix(_PREFIX): value for key, value in patcher.state_dict_for_saving().items()}
        check_free_space(target.parent, sum(value.nbytes for value in tensors.values()), f"The model {target.name}")
        _write(tensors, target, _metadata(patcher))
    logger.info("Saved %s", target)
    return target


def _write(tensors: dict[str, torch.Tensor], target: Path, metadata: dict[str, str]) -> None:
    bar = comfy.utils.ProgressBar(len(tensors))
    name_bytes = sum(2 * len(name.encode()) for name in tensors)
    with CheckpointWriter(target, name_bytes=name_bytes, name_count=len(tensors), metadata=metadata) as writer:
        while tensors:
            comfy.model_management.throw_exception_if_processing_interrupted()
            name = next(iter(tensors))
            # Core's lazy parameters are patched and quantized again when they are moved, one at a time.
            writer.add(name, tensors.pop(name).to("cpu"))
            bar.update(1)


def _metadata(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, str]:
    """What core needs to know the architecture again: Wan files may carry their configuration in the header."""
    origin = (patcher.cached_patcher_init or (None, ()))[1]
    if not origin or not str(origin[0]).endswith((".safetensors", ".sft")):
        return {}
    _, metadata = comfy.utils.load_torch_file(str(origin[0]), return_metadata=True)
    return {key: value for key, value in (metadata or {}).items() if key != "_quantization_metadata"}
