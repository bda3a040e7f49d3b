"""Quantized files made once and found again: content-keyed, written whole or not at all, rebuilt when the source changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError, StorageError
from .checkpoint import INDEX_NAME, Checkpoint, open_checkpoint
from .plan import QuantizationPlan, find_stored
from .stream import METADATA_KEY, QUANTIZER_VERSION, RECIPE_KEY, Progress, quantize_checkpoint, read_origin
from .writer import short_stem

logger = logging.getLogger("lowbit.ops")

_OWN_NAME = re.compile(r"^.*\.[a-z0-9_]+\.[0-9a-f]{16}\.safetensors$", re.DOTALL)
"""What `cached_path` makes: a file of any other name is the user's, whatever its header says."""


@dataclass(frozen=True)
class CacheKey:
    """Names one quantized file.

    Attributes:
        recipe: digest of the source's place, the format and the rules.
        content: digest of the recipe, the quantizer's version, the source's content, and what is decided for
            its layers, names and text entries.
    """

    recipe: str
    content: str


def cache_key(checkpoint: Checkpoint, plan: QuantizationPlan) -> CacheKey:
    """The key of `checkpoint` quantized by `plan`.

    Raises:
        CheckpointError: the source is gone.
    """
    recipe = json.dumps(
        [
            checkpoint.place,
            asdict(plan.weight_format) if plan.weight_format else None,
            plan.stored_fast,
            [(rule.pattern, rule.action) for rule in plan.rules],
            *([] if plan.mix is None else [plan.mix.limit]),
        ]
    )
    recipe_digest = hashlib.sha256(recipe.encode()).hexdigest()
    # What ComfyUI makes of the file's names, and which layers it multiplies with, may change with its version.
    layers = [(layer.name, layer.action, layer.storage) for layer in plan.layers.values()]
    mixed = [] if plan.mix is None else [sorted(plan.mix.formats.items())]
    decided = json.dumps([layers, list(checkpoint.entries), sorted(checkpoint.metadata.items()), *mixed])
    content = f"{recipe_digest}{QUANTIZER_VERSION}{checkpoint.identity()}{decided}"
    return CacheKey(recipe_digest, hashlib.sha256(content.encode()).hexdigest())


def cached_path(checkpoint: Checkpoint, plan: QuantizationPlan, folder: Path) -> Path:
    """Where the quantized file lies, or will.

    Raises:
        CheckpointError: the source is gone.
    """
    return _path(checkpoint, plan, folder, cache_key(checkpoint, plan))


def quantized_file(
    checkpoint: Checkpoint,
    plan: QuantizationPlan,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """The quantized file of `checkpoint`: found if it was made before, else made now.

    Two processes may do this at once: both write under names of their own, and the last rename wins.

    Raises:
        CheckpointError: the source is damaged, or changed after it was opened.
        StorageError: `folder` cannot be written or the disk is too small.
    """
    started = time.time()
    key = cache_key(checkpoint, plan)
    # The key must be of the state that the plan was made for.
    checkpoint.check_unchanged()
    path = _path(checkpoint, plan, folder, key)
    if _is_whole(path):
        logger.info("Using the quantized file %s", path.name)
        return path
    try:
        quantize_checkpoint(checkpoint, plan, path, device=device, progress=progress, metadata={RECIPE_KEY: key.recipe})
    except StorageError:
        # Windows refuses to replace a file that another process has just finished and mapped.
        if not _is_whole(path):
            raise
    _remove_outdated(path, key.recipe, started)
    return path


def _path(checkpoint: Checkpoint, plan: QuantizationPlan, folder: Path, key: CacheKey) -> Path:
    index = INDEX_NAME.match(checkpoint.path.name)
    stem = index["stem"] if index is not None else checkpoint.path.stem
    return folder / f"{short_stem(stem)}.{plan.format_name}.{key.content[:16]}.safetensors"


def _is_whole(path: Path) -> bool:
    if not os.path.exists(path):
        return False
    try:
        checkpoint = open_checkpoint(path)
        find_stored(checkpoint)
    except CheckpointError:
        logger.warning("The quantized file %s is damaged: Lowbit makes it anew.", path)
        return False
    return METADATA_KEY in checkpoint.metadata


def _remove_outdated(current: Path, recipe: str, started: float) -> None:
    """Remove what the same recipe made of an earlier content of the same source, or by an earlier quantizer.

    What another process made after this one began may be of a later content, and is left. The same recipe of the same
    source has the same name but for the content, so that no other file needs to be opened.
    """
    same = current.name.rsplit(".", 2)[0] + "."
    for other in current.parent.glob("*.safetensors"):
        if other == current or not other.name.startswith(same) or not _OWN_NAME.match(other.name):
            continue
        with contextlib.suppress(OSError, CheckpointError):
            if other.stat().st_mtime < started and _is_outdated(open_checkpoint(other).metadata, recipe):
                other.unlink()
                logger.info("Removed %s, whose source has changed", other.name)


def _is_outdated(metadata: Mapping[str, str], recipe: str) -> bool:
    """Whether the header is of this recipe and of no later quantizer, whose files its own process would make again."""
    version = (read_origin(metadata) or {}).get("quantizer_version")
    return metadata.get(RECIPE_KEY) == recipe and isinstance(version, int) and version <= QUANTIZER_VERSION
