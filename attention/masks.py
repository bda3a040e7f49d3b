"""Tells masks that mask nothing from those that do, looking at each mask once and not at every call."""

from __future__ import annotations

import torch

CHECKS_PER_MODEL_CALL = 64
HELD_BYTES = 64 * 2**20


def is_trivial(mask: torch.Tensor) -> bool:
    """Whether a mask changes nothing: all True, or one finite number along each row of keys (softmax ignores it).

    mask: bool (True is kept) or floating (added to the scores), keys last. Reads it: on a GPU this synchronizes.
    """
    if mask.numel() == 0:
        return False
    if mask.dtype == torch.bool:
        return bool(mask.all())
    if not mask.is_floating_point():
        return False
    first = mask[..., :1]
    return bool(((mask == first) & torch.isfinite(first)).all())


def normalized(mask: torch.Tensor) -> torch.Tensor:
    """A mask of 2 to 4 dimensions as (batch or 1, heads or 1, q or 1, keys), the way ComfyUI's own attention reads it."""
    if mask.ndim == 2:
        mask = mask.unsqueeze(0)
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


class MaskMemory:
    """Remembers which masks mask nothing. A tensor is recognized by its memory, shape and version counter.

    The tensors seen are held, so their memory cannot be handed to another mask meanwhile: up to HELD_BYTES, and one
    larger one. `forget()` starts a new sampling run; `new_model_call()` drops what cannot be trusted any longer:
    inference tensors count no versions, so one that is written to in the middle of a model call is not noticed before
    the next. A mask that does mask something ends the looking at masks of its shape, so that models which build a fresh
    mask in every block cost one look a run.
    """

    def __init__(self) -> None:
        self._verdicts: dict[tuple, tuple[torch.Tensor, bool]] = {}
        self._real_shapes: set[tuple] = set()
        self.forget()

    def forget(self) -> None:
        """A new sampling run: nothing is known of any mask."""
        self.checks = 0
        self._verdicts.clear()
        self._real_shapes.clear()

    def new_model_call(self) -> None:
        """Forgets the verdicts on tensors that could have been written to without a trace, and allows new looks.

        Every model call so drops the same masks, and no backend changes in the middle of a run.
        """
        self.checks = 0
        if self._verdicts:
            self._verdicts = {key: entry for key, entry in self._verdicts.items() if entry[1]}

    def masks_nothing(self, mask: torch.Tensor) -> bool:
        """Whether the mask can be left out; reads it at most once a run (once a model call for inference tensors).

        Never while a CUDA graph is recorded: the graph would leave out whatever mask it is replayed with.
        """
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        versioned = not mask.is_inference()
        key = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, mask._version if versioned else -1)
        if key in self._verdicts:
            return True
        kind = (mask.shape, mask.dtype)
        if kind in self._real_shapes or self.checks >= CHECKS_PER_MODEL_CALL or not self._has_room(mask):
            return False
        self.checks += 1
        if not is_trivial(mask):
            self._real_shapes.add(kind)
            return False
        self._verdicts[key] = (mask, versioned)
        return True

    def _has_room(self, mask: torch.Tensor) -> bool:
        """Whether one more mask can be held."""
        sizes = [held.nbytes for held, _ in self._verdicts.values()]
        if mask.nbytes > HELD_BYTES:
            return not any(size > HELD_BYTES for size in sizes)
        return sum(size for size in sizes if size <= HELD_BYTES) + mask.nbytes <= HELD_BYTES
