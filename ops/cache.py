"""Quantized files made once and found again: content-keyed, written whole or not at all, rebuilt when the source changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError, StorageError
from .checkpoint import Checkpoint, open_checkpoint
from .formats import WeightFormat
from .keep_rules import Rule
from .plan import QuantizationPlan
from .stream import METADATA_KEY, QUANTIZER_VERSION, Progress, quantize_checkpoint
from .writer import TEMPORARY_PREFIX, TEMPORARY_SUFFIX

logger = logging.getLogger("lowbit.ops")

_ABANDONED_SECONDS = 24 * 3600
_RECIPE_KEY = "lowbit_recipe"


@dataclass(frozen=True)
class CacheKey:
    """Names one quantized file.

    Attributes:
        recipe: digest of the source's place, the format, the rules and the quantizer's version.
        content: digest of the recipe and of the source's content.
    """

    recipe: str
    content: str


def cache_key(checkpoint: Checkpoint, weight_format: WeightFormat | None, rules: Sequence[Rule]) -> CacheKey:
    """The key of `checkpoint` quantized so."""
    recipe = json.dumps(
        [
            QUANTIZER_VERSION,
            str(checkpoint.path.resolve()),
            asdict(weight_format) if weight_format else None,
            [(rule.pattern, rule.action) for rule in rules],
        ]
    )
    recipe_digest = hashlib.sha256(recipe.encode()).hexdigest()
    content = hashlib.sha256(f"{recipe_digest}{checkpoint.identity()}".encode()).hexdigest()
    return CacheKey(recipe_digest, content)


def cached_path(checkpoint: Checkpoint, plan: QuantizationPlan, folder: Path) -> Path:
    """Where the quantized file lies, or will."""
    key = cache_key(checkpoint, plan.weight_format, plan.rules)
    stem = checkpoint.path.name.removesuffix(".json").removesuffix(".index").removesuffix(".safetensors")
    format_name = plan.weight_format.name if plan.weight_format else "merged"
    return folder / f"{stem}.{format_name}.{key.content[:16]}.safetensors"


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
        CheckpointError: the source is damaged.
        StorageError: `folder` cannot be written or the disk is too small.
    """
    path = cached_path(checkpoint, plan, folder)
    if _is_whole(path):
        logger.info("Using the quantized file %s", path.name)
        return path
    key = cache_key(checkpoint, plan.weight_format, plan.rules)
    _sweep_abandoned(folder)
    try:
        quantize_checkpoint(
            checkpoint, plan, path, device=device, progress=progress, metadata={_RECIPE_KEY: key.recipe}
        )
    except StorageError:
        # Windows refuses to replace a file that another process has just finished and mapped.
        if not _is_whole(path):
            raise
    _remove_outdated(folder, path, key.recipe)
    return path


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        return METADATA_KEY in open_checkpoint(path).metadata
    except CheckpointError as error:
        logger.warning("%s Lowbit makes it anew.", error)
        return False


def _sweep_abandoned(folder: Path) -> None:
    """Remove what a killed process left half-written a day ago or earlier."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
                leftover.unlink()


def _remove_outdated(folder: Path, current: Path, recipe: str) -> None:
    """Remove files that the same recipe made of an earlier content of the same source."""
    for other in folder.glob("*.safetensors"):
        if other == current:
            continue
        with contextlib.suppress(OSError, CheckpointError):
            if open_checkpoint(other).metadata.get(_RECIPE_KEY) == recipe:
                other.unlink()
                logger.info("Removed %s, whose source has changed", other.name)
