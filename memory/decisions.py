"""What to do with the numbers: when to clear between steps, when to run prompts one at a time, how to tile a decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .devices import Reading
from .policies import AUTO, EVERY, ON

LEAST_CLEARED = 256 << 20
"""Less than this is never worth a clearing between steps."""


def clears_now(
    choice: str, every: int, step: int, reading: Reading, room: int, budget: int, fraction: float, returning: int = 0
) -> bool:
    """Whether to give idle memory back after a step.

    Args:
        choice: of `policies.STEP_CLEARING`.
        every: the N of `every N`.
        step: how many steps are done.
        reading: the device now.
        room: bytes within the budget that are not even reserved.
        budget: bytes that may be used in all.
        fraction: the policy's `clearing_fraction`.
        returning: idle bytes that were there again a step after a clearing: what each step takes anyway.
    """
    if choice == EVERY:
        return step % every == 0
    threshold = max(LEAST_CLEARED, fraction * budget)
    # Idle memory harms nobody while there is room: giving it back would only make the next step ask for it again.
    return choice == AUTO and reading.idle - returning > threshold and room < threshold


def runs_one_at_a_time(choice: str, prompts: int, weights: int, single: int, batched: int, budget: int) -> bool:
    """Whether the prompts of a step run one after the other.

    With `auto` when the batch does not fit at all, or when the weights that must then stream, once for each prompt, are
    still fewer than those that stream beside the batch's larger working memory.

    Args:
        choice: of `policies.SEQUENTIAL_CFG`.
        prompts: how many.
        weights: bytes of the diffusion model.
        single, batched: bytes of working memory with one prompt at a time, and with all together.
        budget: bytes that model and working memory may take in all.
    """
    if prompts < 2:
        return False
    if choice != AUTO:
        return choice == ON
    if batched > budget:
        return True
    together = max(0, weights - (budget - batched))
    apart = prompts * max(0, weights - (budget - single))
    return apart < together


@dataclass(frozen=True)
class VaeTiles:
    """How to cut a latent: tile and overlap along height and width, and along time (None for the whole)."""

    size: int
    overlap: int
    frames: int | None
    overlap_frames: int | None


def plan_tiles(
    estimate: Callable[[int, int | None], float], height: int, width: int, frames: int, smallest: int, room: float
) -> VaeTiles | None:
    """The largest tiles whose decode fits, or the smallest there are when none does; None for the whole.

    Args:
        estimate: bytes that a decode takes, from a tile's size along height and width, and its frames (None for all).
        height, width, frames: of the latent; frames is 1 for an image.
        smallest: the least tile size that gives a sound picture.
        room: bytes there are for it.
    """
    whole = max(height, width)
    if estimate(whole, None) <= room:
        return None
    size = whole
    while size > smallest and (size >= whole or estimate(size, None) > room):
        size = max(smallest, -(-size // 2))
    length: int | None = None
    if frames > 2 and estimate(size, None) > room:
        length = frames
        while length > 2 and estimate(size, length) > room:
            length = -(-length // 2)
    overlap = max(1, size // 4)
    if length is None or length >= frames:
        return None if size >= whole else VaeTiles(size, overlap, None, None)
    return VaeTiles(size, overlap, length, max(1, length // 4))


def smaller(tiles: VaeTiles, smallest: int, frames: int) -> VaeTiles | None:
    """Tiles of half the size, for after an out-of-memory error, then of half the time; None when they cannot be smaller.

    Args:
        tiles: that did not fit.
        smallest: the least tile size that gives a sound picture.
        frames: of the latent; 1 for an image.
    """
    if tiles.size > smallest:
        size = max(smallest, -(-tiles.size // 2))
        return VaeTiles(size, max(1, size // 4), tiles.frames, tiles.overlap_frames)
    length = frames if tiles.frames is None else tiles.frames
    if length <= 2:
        return None
    length = -(-length // 2)
    return VaeTiles(tiles.size, tiles.overlap, length, max(1, length // 4))
