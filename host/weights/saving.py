"""Writes a loaded model, LoRAs merged in, to a core-format file that stock ComfyUI opens."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch

from ...errors import CheckpointError, StorageError
from ...ops.checkpoint import Checkpoint, open_checkpoint
from ...ops.stream import METADATA_KEY, carried_metadata, read_origin
from ...ops.writer import CheckpointWriter, check_free_space, names_nbytes
from .told import told

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
        StorageError: the disk is full or the folder cannot be written, or lies outside the output folder; or no file is named.
    """
    output = folder_paths.get_output_directory()
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, output)
    except OSError as error:
        raise StorageError(
            f"The folder of '{filename_prefix}' cannot be made in {output} ({error.strerror or error}): choose another."
        ) from error
    except Exception as error:
        raise StorageError(
            f"'{filename_prefix}' leads out of {output}: write a name, or a subfolder and a name."
        ) from error
    # Core makes a dot of an empty prefix, which would hide the file.
    if not name.strip(". "):
        raise StorageError(f"'{filename_prefix}' names no file: write a name, or a subfolder and a name.")
    target = Path(folder) / f"{name}_{counter:05}_.safetensors"
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
        tensors = {key.removeprefix(_PREFIX): value for key, value in patcher.state_dict_for_saving().items()}
        origin = source_checkpoint(patcher)
        metadata, extra = told(patcher.model, tensors, _metadata(origin))
        tensors = {**extra, **tensors}
        check_free_space(target.parent, sum(value.nbytes for value in tensors.values()), f"The model {target.name}")
        _write(tensors, target, origin, metadata)
    logger.info("Saved %s", target)
    return target


def source_checkpoint(patcher: comfy.model_patcher.ModelPatcher) -> Checkpoint | None:
    """The file that core loaded the model from, where it noted it and it is still readable."""
    arguments = (patcher.cached_patcher_init or (None, ()))[1]
    if not arguments or not isinstance(arguments[0], str):
        return None
    try:
        return open_checkpoint(arguments[0])
    except CheckpointError as error:
        logger.info("The file of the model cannot be used any more: %s", error)
        return None


def _write(tensors: dict[str, torch.Tensor], target: Path, origin: Checkpoint | None, metadata: dict[str, str]) -> None:
    count = len(tensors)
    bar = comfy.utils.ProgressBar(count)
    with CheckpointWriter(target, name_bytes=names_nbytes(tensors), name_count=count, metadata=metadata) as writer:
        while tensors:
            comfy.model_management.throw_exception_if_processing_interrupted()
            name = next(iter(tensors))
            # Core's lazy parameters are patched and quantized again when they are moved, one at a time.
            writer.add(name, _as_in_source(tensors.pop(name).to("cpu"), name, origin))
            bar.update(1)


def _as_in_source(tensor: torch.Tensor, name: str, origin: Checkpoint | None) -> torch.Tensor:
    """Back to the file's 16 bits what core made float32 to compute on a CPU."""
    entry = origin.entries.get(name) or origin.entries.get(_PREFIX + name) if origin is not None else None
    if entry is not None and tensor.dtype == torch.float32 and entry.dtype in (torch.bfloat16, torch.float16):
        return tensor.to(entry.dtype)
    return tensor


def _metadata(origin: Checkpoint | None) -> dict[str, str]:
    """What core needs to know the architecture again: Wan files may carry their configuration in the header."""
    if origin is None:
        return {}
    metadata = carried_metadata(origin.metadata)
    made = read_origin(origin.metadata)
    if made is not None:
        # LoRAs may be merged in: it is no longer what was made of that source.
        metadata[METADATA_KEY] = json.dumps({key: value for key, value in made.items() if key != "source"})
    return metadata
