"""Quantizes a model that some other node loaded, keeping the LoRAs and patches that are on it."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...errors import CheckpointError
from ...ops.checkpoint import Checkpoint, TensorEntry, read_elements, spread
from ..prompts import keep_prompts_near
from .core_build import on_meta, under_core_names
from .loading import load_diffusion_model
from .patching import patch_beside_weights
from .preparing import Planned, Request, diffusion_part, plan_diffusion_checkpoint, prepared_file
from .rebinding import check_untouched, rebind, use_unpatched
from .saving import source_checkpoint
from .temporary import removal_put_off
from .told import told, with_told

logger = logging.getLogger("lowbit.host")

_PREFIX = "model.diffusion_model."
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2})

_SAMPLES = 32
_SAMPLE_LENGTH = 8
"""How many stretches of a tensor are compared with its file's, and of how many numbers."""


@dataclass(frozen=True)
class LoadedModel(Checkpoint):
    """A loaded model's weights, without the patches on it, as a checkpoint that lies in no file.

    Attributes:
        tensors: by name.
    """

    tensors: Mapping[str, torch.Tensor]

    def read_stored(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor `name` on a device, itself where it is there: not to be written to."""
        return self.tensors[name].to(device)

    def read_rows(self, name: str, count: int) -> torch.Tensor:
        """Some rows of the tensor itself."""
        return self.tensors[name][spread(len(self.tensors[name]), count)]

    @property
    def place(self) -> str:
        """Nowhere: another content is another model, whose file this one's must not replace."""
        return self._digest

    def identity(self) -> str:
        """Hex digest of every tensor's name, dtype, shape and content."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(sorted(self.metadata.items())).encode())
        for name, tensor in self.tensors.items():
            content = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0{zlib.crc32(content)}\0".encode())
        return digest.hexdigest()


def plan_model(patcher: comfy.model_patcher.ModelPatcher, request: Request) -> Planned:
    """Decide what happens to the model's weights: those of the file it came from, or its own.

    Its own are taken where core noted no file, or where they are not the file's any more. What is made of those is not
    kept, whatever the request says: nothing would find it again.

    Raises:
        CheckpointError, FormatError, CapabilityError: as for the loader; or the model's weights cannot be read.
    """
    checkpoint, edited = noted_file(patcher)
    if checkpoint is not None:
        if not edited:
            checkpoint = with_told(checkpoint, patcher.model, on_meta(checkpoint))
            return plan_diffusion_checkpoint(checkpoint, request, patcher.load_device)
        logger.warning(
            "Another node has changed %d weights of the model since %s was loaded, '%s' among them: the weights that it "
            "has now are quantized, not the file's.",
            len(edited),
            checkpoint.path.name,
            edited[0],
        )
    request = replace(request, keep_quantized_file=False)
    return plan_diffusion_checkpoint(loaded_model(patcher), request, patcher.load_device)


def quantize_model(patcher: comfy.model_patcher.ModelPatcher, planned: Planned) -> comfy.model_patcher.ModelPatcher:
    """A patcher like `patcher`, patches and all, over the model quantized as planned.

    The model that `patcher` is of stays as it is. Where nothing is to be quantized the result is a clone of that one,
    unless it can be loaded anew from its file for the sake of weights that are quantized there.

    Raises:
        CheckpointError, StorageError: as for the loader.
        CapabilityError: another node tied something to the model's layers that cannot be moved to the quantized ones.
    """
    plan = planned.plan
    if not plan.changes_weights and (isinstance(planned.checkpoint, LoadedModel) or not plan.stored.layers):
        return patcher.clone()
    check_untouched(patcher)
    with patcher.use_ejected(), use_unpatched(patcher):
        with removal_put_off():
            path = str(prepared_file(planned))
            quantized = load_diffusion_model(path, disable_dynamic=not patcher.is_dynamic())
        result = patcher.clone(model_override=quantized.get_clone_model_override())
        rebind(result, patcher.model, quantized.model)
    result.cached_patcher_init = quantized.cached_patcher_init
    result.size = quantized.model_size()
    for callback in quantized.get_all_callbacks(CallbacksMP.ON_LOAD):
        result.add_callback(CallbacksMP.ON_LOAD, callback)
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.OUTER_SAMPLE):
        for wrapper in quantized.get_all_wrappers(kind):
            result.add_wrapper(kind, wrapper)
    keep_prompts_near(result)
    # Core falls back to the parent when a clone goes: it must be a patcher of the same model.
    result.parent = quantized
    # What is done to the other model's weights at the moment.
    result.hook_backup, result.cached_hook_patches, result.current_hooks = {}, {}, None
    return patch_beside_weights(result)


def noted_file(patcher: comfy.model_patcher.ModelPatcher) -> tuple[Checkpoint | None, list[str]]:
    """The file that core noted for the model, in core's names, and the weights of the model that are not its any more."""
    origin = source_checkpoint(patcher)
    if origin is None:
        return None, []
    checkpoint = under_core_names(diffusion_part(origin))
    return checkpoint, edited_weights(patcher, checkpoint)


def edited_weights(patcher: comfy.model_patcher.ModelPatcher, origin: Checkpoint) -> list[str]:
    """The weights of the model that are not the file's: samples of each are compared, not every number.

    A tensor that core cast to another dtype, as its loader's `weight_dtype` asks for, is the file's all the same.
    """
    return [
        name
        for name, tensor in _own_weights(patcher).items()
        if name in origin.entries and not tensor.is_meta and _is_edited(tensor, origin.entries[name])
    ]


def _is_edited(tensor: torch.Tensor, entry: TensorEntry) -> bool:
    comparable = tensor.dtype == entry.dtype or (tensor.dtype in _FLOATS and entry.dtype in _FLOATS)
    if not comparable or entry.encoding or entry.parts or tuple(tensor.shape) != entry.shape or not tensor.numel():
        return False
    flat = tensor.detach().reshape(-1)
    starts = sorted({step * (len(flat) - 1) // (_SAMPLES - 1) for step in range(_SAMPLES)})
    places = torch.tensor(starts).unsqueeze(1) + torch.arange(_SAMPLE_LENGTH)
    places = places.clamp(max=len(flat) - 1).reshape(-1)
    stored = read_elements(entry, starts, _SAMPLE_LENGTH).to(tensor.dtype)
    own = flat[places.to(flat.device)].cpu()
    return not torch.equal(own.contiguous().view(torch.uint8), stored.contiguous().view(torch.uint8))


def loaded_model(patcher: comfy.model_patcher.ModelPatcher) -> LoadedModel:
    """The model's weights as they are under any patches.

    Raises:
        CheckpointError: a weight is a placeholder without values.
    """
    tensors = _own_weights(patcher)
    entries = {name: _entry(name, tensor) for name, tensor in tensors.items()}
    metadata, extra = told(patcher.model, tensors, {})
    entries |= {name: _entry(name, tensor) for name, tensor in extra.items()}
    return LoadedModel(Path("loaded-model"), (), entries, metadata, (), tensors | extra)


def _own_weights(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, torch.Tensor]:
    """The diffusion model's tensors under any patches, in a file's names."""
    with torch.inference_mode(), use_unpatched(patcher):
        state = patcher.model.diffusion_model.state_dict()
        for key, backup in patcher.backup.items():
            name = key.removeprefix("diffusion_model.")
            if name in state:
                state[name] = backup.weight
        # Compiled blocks that core has put in their places.
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
        state = patcher.model.model_config.process_unet_state_dict_for_saving(state)
        return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def _entry(name: str, tensor: torch.Tensor) -> TensorEntry:
    if tensor.is_meta:
        raise CheckpointError(
            f"The model's weight '{name}' has no values that other nodes can read, as is the case behind GGUF loaders: "
            "load the 16-bit safetensors file instead."
        )
    return TensorEntry.of(name, tensor)
