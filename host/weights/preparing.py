"""Turns a file and a node's choices into the core-format file to load, quantizing on the way where that is asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

from ...errors import StorageError
from ...kernels.measured import Numbers
from ...ops.auto_format import FormatChooser
from ...ops.cache import cached_path, quantized_file
from ...ops.checkpoint import Checkpoint, open_checkpoint
from ...ops.device_info import device_info
from ...ops.diffusion_names import diffusion_names, tables
from ...ops.formats import AS_STORED, AUTO
from ...ops.gguf_file import SUFFIX
from ...ops.keep_rules import parse_rules
from ...ops.plan import QuantizationPlan
from ...ops.plan_report import plan_report, plan_summary, unmatched_sentences
from ...ops.sampled_errors import sampled_errors
from ...ops.stored_names import metadata_below
from ...ops.trade import trade_table
from ...ops.writer import check_free_space
from ...versions import find
from .architecture import MODEL_PATCH_SIGNATURE, check_formats, check_model_patch
from .core_build import Look, detected, pinned_layers, pinned_text_layers, shape_pinned, signature, under_core_names
from .folders import CACHE_VARIABLE, cache_folder
from .linear_times import step_milliseconds
from .temporary import temporary_folder

logger = logging.getLogger("lowbit.host")

_QUANTIZER_HEADROOM = 1 << 30


@dataclass(frozen=True)
class Request:
    """A loader node's choices, called as its inputs are.

    Attributes:
        format: a name of `FORMAT_CHOICES`.
        keep_rules: `auto` or a text of globs.
        keep_quantized_file: whether the quantized file stays for the next start.
    """

    format: str = AUTO
    keep_rules: str = "auto"
    keep_quantized_file: bool = True


@dataclass(frozen=True)
class Planned:
    """What will happen to a file: nothing is written or loaded yet."""

    chooser: FormatChooser
    plan: QuantizationPlan
    request: Request
    choice: str

    @property
    def checkpoint(self) -> Checkpoint:
        """The source."""
        return self.chooser.checkpoint

    @property
    def summary(self) -> str:
        """One line."""
        return plan_summary(self.plan)

    @property
    def report(self) -> str:
        """Every layer, what happens to it and why, and what this device makes of the formats."""
        return plan_report(self.checkpoint, self.plan, self.chooser.device, self.choice)

    def dry_run(self) -> str:
        """The report with what could be had instead: `trade_table`. Rows of the weights are read, and shapes timed once."""
        where = comfy.model_management.get_torch_device()
        trade = trade_table(self.chooser, partial(step_milliseconds, device=where, folder=cache_folder()))
        return plan_report(self.checkpoint, self.plan, self.chooser.device, self.choice, trade)


def plan_diffusion_model(path: Path, request: Request) -> Planned:
    """Read a diffusion model's header and decide, on the names and layers that core makes of the file.

    Args:
        path: a safetensors file, shard, index or GGUF.
        request: the node's choices.

    Raises:
        CheckpointError: the file is damaged, missing or a pickle.
        FormatError: the format or a rule is unknown.
        CapabilityError: ComfyUI or comfy-kitchen does not have a format that the file holds or was asked for.
    """
    return plan_diffusion_checkpoint(under_core_names(diffusion_part(open_checkpoint(path))), request)


def plan_diffusion_checkpoint(checkpoint: Checkpoint, request: Request, device: torch.device | None = None) -> Planned:
    """`plan_diffusion_model` for a diffusion model in core's names."""

    def look(tensors: dict[str, torch.Tensor]) -> object:
        return signature(detected(tensors, checkpoint.metadata))

    return plan_checkpoint(checkpoint, request, device, pinned=pinned_layers(checkpoint), look=look)


def plan_text_encoder(path: Path, request: Request) -> Planned:
    """`plan_diffusion_model` for a text encoder."""
    checkpoint = open_checkpoint(path)
    return plan_checkpoint(
        checkpoint, request, pinned=pinned_text_layers(checkpoint), look=find("comfy.sd.detect_te_model")
    )


def plan_model_patch(path: Path, request: Request) -> Planned:
    """`plan_diffusion_model` for a model patch; `auto` leaves alone the patches that cannot be quantized.

    Raises:
        CheckpointError: as `plan_diffusion_model`, or a format was asked for by name for such a patch, or it is quantized.
    """
    checkpoint = open_checkpoint(path)
    if request.format == AUTO and MODEL_PATCH_SIGNATURE not in checkpoint.entries:
        planned = plan_checkpoint(checkpoint, replace(request, format=AS_STORED))
        check_model_patch(checkpoint, planned.plan)
        return replace(planned, choice=f"{AS_STORED}: only InfiniteTalk and MultiTalk patches can be quantized")
    planned = plan_checkpoint(checkpoint, request)
    check_model_patch(checkpoint, planned.plan)
    return planned


def plan_checkpoint(
    checkpoint: Checkpoint,
    request: Request,
    device: torch.device | None = None,
    *,
    pinned: Mapping[str, str] | None = None,
    look: Look | None = None,
) -> Planned:
    """`plan_diffusion_model` for a checkpoint that is open already.

    Args:
        checkpoint: it.
        request: the node's choices.
        device: where the model will run; None for core's choice.
        pinned: as `make_plan` takes it.
        look: what core finds in a state dict, which the planned shapes must not change.
    """
    rules = parse_rules(request.keep_rules)
    where = device_info(device if device is not None else comfy.model_management.get_torch_device())
    chooser = FormatChooser(checkpoint, where, rules, _measure, pinned)
    chosen = chooser.choose(request.format)
    shaped = {} if look is None else shape_pinned(checkpoint, chosen.plan, look)
    if shaped:
        pinned = {**(tables(chosen.plan.layers) if pinned is None else pinned), **shaped}
        chooser = replace(chooser, pinned=pinned)
        chosen = chooser.choose(request.format)
    check_formats(checkpoint, chosen.plan)
    for sentence in unmatched_sentences(chosen.plan) if rules is not None else ():
        logger.warning("%s: %s", checkpoint.path.name, sentence)
    return Planned(chooser, chosen.plan, request, str(chosen))


def _measure(checkpoint: Checkpoint, formats: Mapping[str, Collection[str]]) -> Mapping[str, Numbers]:
    """Errors of layers, kept beside the quantized files where the checkpoint is a file."""
    folder = cache_folder() if checkpoint.files else None
    return sampled_errors(checkpoint, formats, device=comfy.model_management.get_torch_device(), folder=folder)


def prepared_file(planned: Planned) -> Path:
    """The file to load: the source itself when nothing changes, else its quantized file.

    Raises:
        CheckpointError: a weight holds NaN or Inf, or the source is damaged.
        StorageError: the quantized file cannot be written.
    """
    source = planned.checkpoint.path
    if not _needs_file(planned):
        return source
    folder = _folder(planned)
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        largest = max((entry.plain_nbytes for entry in planned.checkpoint.entries.values()), default=0)
        comfy.model_management.free_memory(2 * largest + _QUANTIZER_HEADROOM, device)
    try:
        try:
            return quantized_file(planned.checkpoint, planned.plan, folder, device=device, progress=_progress())
        except torch.OutOfMemoryError:
            logger.warning("Too little free GPU memory to quantize %s there: it is done on the CPU.", source.name)
        return quantized_file(planned.checkpoint, planned.plan, folder, device="cpu", progress=_progress())
    except StorageError as error:
        raise _with_variable(error) from None


def check_disk(planned: Planned) -> None:
    """Raise unless the quantized file is there, or there is room for it: `prepared_file`'s check, without the work.

    Raises:
        StorageError: the disk is too small.
    """
    if not _needs_file(planned):
        return
    path = cached_path(planned.checkpoint, planned.plan, _folder(planned))
    if not os.path.exists(path):
        try:
            check_free_space(path.parent, planned.plan.nbytes_after, f"The quantized {planned.checkpoint.path.name}")
        except StorageError as error:
            raise _with_variable(error) from None


def _needs_file(planned: Planned) -> bool:
    return planned.plan.changes_weights or not _core_reads(planned.checkpoint)


def _folder(planned: Planned) -> Path:
    return cache_folder() if planned.request.keep_quantized_file else temporary_folder()


def _with_variable(error: StorageError) -> StorageError:
    return StorageError(f"{str(error).rstrip('.')}; {CACHE_VARIABLE} names the folder of quantized files.")


def _core_reads(checkpoint: Checkpoint) -> bool:
    """Whether core's memory-mapped reader takes the file: no GGUF, not a sharded set, nor block scales stored as E8M0.

    Nor does it take weights as other tools store them; nor is it the file that core is to read where a tensor was added to it.
    """
    return (
        checkpoint.path.suffix.lower() != SUFFIX
        and checkpoint.files == (checkpoint.path,)
        and all(
            entry.dtype != torch.float8_e8m0fnu and entry.path in checkpoint.files and not entry.decoded_from
            for entry in checkpoint.entries.values()
        )
    )


def diffusion_part(checkpoint: Checkpoint) -> Checkpoint:
    """The diffusion model of an all-in-one checkpoint, without the prefix that core takes off its names."""
    prefix, below = diffusion_names(checkpoint.entries)
    if not prefix:
        return checkpoint
    entries = {name: replace(checkpoint.entries[source], name=name) for name, source in below.items()}
    metadata = metadata_below(checkpoint.metadata, prefix, checkpoint.entries)
    return replace(checkpoint, entries=entries, metadata=metadata)


def _progress():
    """A callback that moves ComfyUI's bar and lets the user's interrupt through."""
    bar = None

    def report(done: int, total: int, name: str) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return report
