"""Asks core, from a file's header alone, whether it knows the architecture: before anything is quantized or loaded."""

from __future__ import annotations

import logging

from comfy_kitchen.tensor.base import LAYOUTS

from ...errors import CapabilityError, CheckpointError
from ...ops.checkpoint import Checkpoint
from ...ops.diffusion_names import diffusion_names
from ...ops.formats import STORAGES
from ...ops.keep_rules import QUANTIZE
from ...ops.plan import QuantizationPlan
from ...versions import find
from .core_build import CONVERT, DETECT_U_NET, OPEN_CLIP, core_function, detected, incomplete, on_meta, refuse_foreign

logger = logging.getLogger("lowbit.host")

MODEL_PATCH_SIGNATURE = "audio_proj.proj1.weight"
"""A tensor that every InfiniteTalk and MultiTalk patch has."""


def check_diffusion_model(checkpoint: Checkpoint) -> None:
    """Refuse what core cannot tell the architecture of.

    Raises:
        CheckpointError: it is no diffusion model that this ComfyUI knows.
    """
    refuse_foreign(checkpoint)
    if not checkpoint.entries or not _known_diffusion_model(checkpoint):
        raise CheckpointError(
            f"{checkpoint.path.name} is no diffusion model that this ComfyUI knows: check that it is not a LoRA, a VAE "
            "or a text encoder, or update ComfyUI."
        )


def check_text_encoder(checkpoint: Checkpoint) -> None:
    """Refuse what core would take for a CLIP model for want of anything better.

    Raises:
        CheckpointError: it is no text encoder that this ComfyUI knows.
    """
    refuse_foreign(checkpoint)
    detect = find("comfy.sd.detect_te_model")
    try:
        known = detect is None or OPEN_CLIP in checkpoint.entries or detect(on_meta(checkpoint)) is not None
    except KeyError as error:
        raise incomplete(checkpoint, error) from None
    if not known:
        raise CheckpointError(
            f"{checkpoint.path.name} is no text encoder that this ComfyUI knows: check that it is not a diffusion model "
            "or a LoRA, or update ComfyUI."
        )


def check_model_patch(checkpoint: Checkpoint, plan: QuantizationPlan) -> None:
    """Refuse any quantized patch but InfiniteTalk's and MultiTalk's, whose modules are known.

    Raises:
        CheckpointError: it is another patch, and a format was asked for, or its file is quantized.
    """
    if MODEL_PATCH_SIGNATURE in checkpoint.entries:
        return
    if plan.changes_weights:
        raise CheckpointError(
            f"{checkpoint.path.name} is no InfiniteTalk or MultiTalk patch, the only ones that can be quantized: choose "
            "the format 'none'."
        )
    # A plain cast is for ComfyUI a dtype like another.
    if not all(layer.unit_scale for layer in plan.stored.layers.values()):
        raise CheckpointError(
            f"{checkpoint.path.name} is quantized, as only InfiniteTalk and MultiTalk patches can be: use its "
            "16-bit file."
        )


def check_formats(checkpoint: Checkpoint, plan: QuantizationPlan) -> None:
    """Refuse formats that this ComfyUI would not load.

    Raises:
        CapabilityError: ComfyUI, or its comfy-kitchen, does not have a format of the plan.
    """
    known = find("comfy.quant_ops.QUANT_ALGOS")
    if known is None:
        return
    formats = {name: layer.core_format for name, layer in plan.stored.layers.items()}
    formats |= {
        name: STORAGES[layer.storage].core_format for name, layer in plan.layers.items() if layer.action == QUANTIZE
    }
    for name, core_format in formats.items():
        row = known.get(core_format)
        if row is None or row["comfy_tensor_layout"] not in LAYOUTS:
            raise CapabilityError(
                f"{checkpoint.path.name}: the layer '{name}' would be loaded as '{core_format}', a format that this ComfyUI "
                "and its comfy-kitchen do not have: update both, or use another file or format."
            )


def _known_diffusion_model(checkpoint: Checkpoint) -> bool:
    tensors = on_meta(checkpoint)
    tensors = {name: tensors[source] for name, source in diffusion_names(tensors)[1].items()}
    try:
        if detected(tensors, checkpoint.metadata) is not None:
            return True
        return core_function(CONVERT)(dict(tensors), "") is not None or core_function(DETECT_U_NET)(tensors) is not None
    except KeyError as error:
        raise incomplete(checkpoint, error) from None
    except (NotImplementedError, RuntimeError) as error:
        # Some detections look at values, which a header does not have: loading will tell.
        logger.debug("The architecture of %s cannot be told from its header: %s", checkpoint.path.name, error)
        return True
