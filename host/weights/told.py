"""What core reads of a model's file besides its weights, told from the loaded model, for files that are made of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ...errors import CheckpointError
from ...ops.checkpoint import Checkpoint, TensorEntry
from ...versions import find
from .core_build import Tensors, detected

logger = logging.getLogger("lowbit.host")


def told(model: Any, tensors: Tensors, metadata: Mapping[str, str]) -> tuple[dict[str, str], Tensors]:
    """Text entries of a header and further tensors with which core finds in `tensors` the model that `model` is.

    Args:
        model: core's, as loaded.
        tensors: the diffusion model's state dict, under the names of its file.
        metadata: text entries to go on with.

    Raises:
        CheckpointError: core would take the file for another model, whatever is added.
    """
    wanted = model.model_config
    alike = None
    try:
        for header in _headers(wanted, tensors, metadata):
            for extra in _markers(wanted):
                difference = _difference(model, detected({**tensors, **extra}, header), {**tensors, **extra})
                if difference == "":
                    return header, extra
                if difference is None and alike is None:
                    alike = header, extra
    except (NotImplementedError, RuntimeError) as error:
        logger.debug("The architecture of the model cannot be told from its header: %s", error)
        return dict(metadata), {}
    if alike is not None:
        return alike
    raise CheckpointError(
        f"ComfyUI would not build this model ({type(wanted).__name__}) again from its weights, since it was loaded with "
        "more than a file holds: use a loader that notes the model's file, or the format 'none'."
    )


def with_told(checkpoint: Checkpoint, model: Any, tensors: Tensors) -> Checkpoint:
    """`checkpoint` with what `told` adds.

    Raises:
        CheckpointError: as there.
    """
    metadata, extra = told(model, tensors, checkpoint.metadata)
    entries = {**checkpoint.entries, **{name: _entry(name, tensor) for name, tensor in extra.items()}}
    return replace(checkpoint, entries=entries, metadata=metadata)


def _entry(name: str, tensor: torch.Tensor) -> TensorEntry:
    return replace(TensorEntry.of(name, tensor), join=lambda parts: tensor.clone())


def _headers(wanted: Any, tensors: Tensors, metadata: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The text entries that core's detection may have read: none, or what the tensors do not say of the model."""
    yield dict(metadata)
    found = detected(tensors, metadata)
    known = {} if found is None else _comparable(found)
    config = {name: value for name, value in _comparable(wanted).items() if name not in known or known[name] != value}
    for further in ({}, {"is_512": "true"}):
        yield {**metadata, "config": json.dumps({"transformer": config}), **further}


def _markers(wanted: Any) -> Iterator[Tensors]:
    """The tensors by which checkpoints of Stable Diffusion say how they sample."""
    yield {}
    if not _tells_sampling(wanted):
        return
    settings, empty = wanted.sampling_settings, torch.zeros(1)
    yield {"v_pred": empty}
    yield {"v_pred": empty, "ztsnr": empty}
    yield {"edm_mean": empty, "edm_std": empty}
    if "sigma_max" in settings and "sigma_min" in settings:
        yield {f"edm_vpred.{name}": torch.tensor(float(settings[name])) for name in ("sigma_max", "sigma_min")}


def _difference(model: Any, found: Any | None, tensors: Tensors) -> str | None:
    """Empty where core's configuration is the model's; None where only one of both says something; else what differs."""
    wanted = model.model_config
    if found is None or type(found) is not type(wanted):
        return "class"
    samples = _tells_sampling(found)
    if samples and found.model_type(tensors, "") != model.model_type:
        return "model_type"
    if samples and found.sampling_settings != wanted.sampling_settings:
        return "sampling_settings"
    ours, theirs = _comparable(wanted), _comparable(found)
    differing = next((name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]), None)
    if differing is not None:
        return differing
    return "" if ours == theirs else None


def _tells_sampling(config: Any) -> bool:
    """Whether core reads off a file how the model samples."""
    base = find("comfy.supported_models_base.BASE")
    return base is not None and type(config).model_type is not base.model_type


def _comparable(config: Any) -> dict[str, Any]:
    """The model's arguments as a header's JSON holds them."""
    plain = {name: value for name, value in config.unet_config.items() if name not in ("dtype", "device")}
    return json.loads(json.dumps(plain, default=str))
