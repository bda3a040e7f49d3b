"""Quantizes a model that some other node loaded, keeping the LoRAs and patches that are on it."""

from __future__ import annotations

import functools
import hashlib
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_patcher
import torch

from ...errors import CheckpointError
from ...ops.checkpoint import Checkpoint, TensorEntry
from .loading import load_diffusion_model, take_over
from .preparing import Planned, Request, plan_checkpoint, plan_file, prepared_file
from .saving import source_checkpoint

logger = logging.getLogger("lowbit.host")

_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class LoadedModel(Checkpoint):
    """A loaded model's weights, without the patches on it, as a checkpoint that lies in no file.

    Attributes:
        tensors: by name.
    """

    tensors: Mapping[str, torch.Tensor]

    def read_stored(self, name: str) -> torch.Tensor:
        """The tensor `name` itself: not to be written to."""
        return self.tensors[name]

    @property
    def place(self) -> str:
        """Nowhere: another content is another model, whose file this one's must not replace."""
        return self._digest

    def identity(self) -> str:
        """Hex digest of every tensor's name, dtype, shape and content."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            content = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0{zlib.crc32(content)}\0".encode())
        return digest.hexdigest()


def plan_model(patcher: comfy.model_patcher.ModelPatcher, request: Request) -> Planned:
    """Decide what happens to the model's weights: those of the file it came from, or its own where core noted none.

    What is made of a model without a file is not kept, whatever the request says: nothing would find it again.

    Raises:
        CheckpointError, FormatError, CapabilityError: as for the loader; or the model's weights cannot be read.
    """
    origin = source_checkpoint(patcher)
    if origin is not None:
        return plan_file(origin.path, request, patcher.load_device)
    return plan_checkpoint(loaded_model(patcher), replace(request, keep_file=False), patcher.load_device)


def quantize_model(patcher: comfy.model_patcher.ModelPatcher, planned: Planned) -> comfy.model_patcher.ModelPatcher:
    """A patcher like `patcher`, patches and all, over the model quantized as planned.

    Raises:
        CheckpointError, StorageError: as for the loader.
    """
    if isinstance(planned.checkpoint, LoadedModel) and not planned.plan.changes_weights:
        take_over(patcher.model)
        return patcher.clone()
    quantized = load_diffusion_model(str(prepared_file(planned)), disable_dynamic=not patcher.is_dynamic())
    result = patcher.clone(model_override=quantized.get_clone_model_override())
    result.cached_patcher_init = quantized.cached_patcher_init
    result.size = quantized.model_size()
    # Core falls back to the parent when a clone goes: it must be a patcher of the same model.
    result.parent = quantized
    return result


def loaded_model(patcher: comfy.model_patcher.ModelPatcher) -> LoadedModel:
    """The model's weights as they are under any patches.

    Raises:
        CheckpointError: a weight is a placeholder without values.
    """
    with torch.inference_mode():
        state = patcher.model.diffusion_model.state_dict()
        for key, backup in patcher.backup.items():
            name = key.removeprefix("diffusion_model.")
            if name in state:
                state[name] = backup.weight
        state = patcher.model.model_config.process_unet_state_dict_for_saving(state)
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
        entries = {name: _entry(name, tensor) for name, tensor in tensors.items()}
        return LoadedModel(Path("loaded-model"), (), entries, {}, (), tensors)


def _entry(name: str, tensor: torch.Tensor) -> TensorEntry:
    if tensor.is_meta:
        raise CheckpointError(
            f"The model's weight '{name}' has no values that other nodes can read, as is the case behind GGUF loaders: "
            "load the 16-bit safetensors file instead."
        )
    return TensorEntry(name, tensor.dtype, tuple(tensor.shape), Path(), 0, tensor.nbytes)
