"""Draws the next token from logits without leaving the device: the distribution of ComfyUI's own loop, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import CheckpointError, FormatError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, in ComfyUI's terms and order: penalties, temperature, top-k, min-p, top-p.

    Attributes:
        draws: False, or a temperature of 0: always the likeliest token, and no penalties.
        temperature: divides the logits.
        top_k: only the likeliest so many (0: all).
        top_p: only the likeliest whose probabilities add up to it.
        min_p: none less likely than this part of the likeliest.
        repetition_penalty: divides the positive logits of what was generated before, multiplies the negative ones.
        presence_penalty: is taken off the logits of what was generated before.
        seed: of the draws.

    Raises:
        FormatError: the repetition penalty is not above 0, which would divide by it.
    """

    draws: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.greedy and not self.repetition_penalty > 0:
            raise FormatError(
                f"A repetition penalty of {self.repetition_penalty} cannot divide: use one above 0, and 1 for none."
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return not self.draws or self.temperature == 0.0

    @property
    def penalizes(self) -> bool:
        """Whether it matters what was generated before."""
        return not self.greedy and (self.repetition_penalty != 1.0 or self.presence_penalty != 0.0)


class Sampler:
    """Draws tokens one after the other; its state (what was generated, the random numbers) stays on the device."""

    def __init__(self, sampling: Sampling, vocabulary: int, device: torch.device, history: Sequence[int] = ()) -> None:
        """`history`: tokens that count as generated before."""
        self.sampling = sampling
        self.generator = None
        if sampling.draws:
            self.generator = torch.Generator(device=device).manual_seed(sampling.seed)
        self._seen = torch.zeros(1, vocabulary, dtype=torch.bool, device=device) if sampling.penalizes else None
        if self._seen is not None and len(history):
            self._seen[0, torch.tensor(sorted(set(history)), device=device)] = True

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """(1, 1) int64 token from logits (1, V), without waiting for the device."""
        sampling = self.sampling
        if sampling.greedy:
            return torch.argmax(logits, dim=-1, keepdim=True)
        if self._seen is not None:
            logits = torch.where(self._seen, self._penalized(logits), logits)
        if sampling.temperature != 1.0:
            logits = logits / sampling.temperature
        indices = None
        if sampling.top_k > 0:
            logits, indices = torch.topk(logits, min(sampling.top_k, logits.shape[-1]))
        logits = _drop_unlikely(logits, sampling.min_p, sampling.top_p)
        # What torch.multinomial does for one token, without its check of the probabilities on the host.
        probabilities = torch.softmax(logits, dim=-1)
        noise = torch.empty_like(probabilities).exponential_(1, generator=self.generator)
        token = torch.argmax(torch.div(probabilities, noise, out=noise), dim=-1, keepdim=True)
        if indices is not None:
            token = indices.gather(1, token)
        if self._seen is not None:
            self._seen.scatter_(1, token, True)
        return token

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        repetition, presence = self.sampling.repetition_penalty, self.sampling.presence_penalty
        if repetition != 1.0:
            logits = torch.where(logits < 0, logits * repetition, logits / repetition)
        return logits - presence if presence != 0.0 else logits


def check_logits(logits: torch.Tensor) -> None:
    """Wait for the logits after a prompt, and see that they are numbers: of others any token could be drawn.

    Raises:
        CheckpointError: they hold NaN.
    """
    if bool(logits.isnan().any()):
        raise CheckpointError(
            "The model makes NaN of this prompt, so no text can be drawn from it: its file is damaged, or it makes numbers "
            "that are too large for the dtype it runs in."
        )


def _drop_unlikely(logits: torch.Tensor, min_p: float, top_p: float) -> torch.Tensor:
    """Logits with the least value of their dtype where min-p or top-p leave a token out."""
    lowest = torch.finfo(logits.dtype).min
    if min_p > 0.0:
        probabilities = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), lowest)
    if top_p < 1.0:
        ordered, order = torch.sort(logits, descending=True)
        beyond = torch.cumsum(torch.softmax(ordered, dim=-1), dim=-1) > top_p
        beyond[..., :1] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter_(1, order, beyond), lowest)
    return logits
