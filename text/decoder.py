"""A decoder that makes one token after another on the device: embedding, layers, logits, draw, all without a wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..kernels.norm_rows import add_norm
from .layers import Layer
from .sampling import Sampler


@dataclass
class Model:
    """What a decoder is made of.

    Attributes:
        embed: (1, 1) int64 token -> (1, K) in the dtype of the residual stream.
        layers: in order.
        norm: weight of the RMSNorm at the end (K,), or None.
        logits: (1, K) -> (1, V).
        eps: of every norm of the residual stream.
        extra: what every layer's `finish` is given besides: (token, embedding) -> one tensor a layer (Gemma 4).
        vocabulary: tokens that it has embeddings for, or None.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    layers: Sequence[Layer]
    norm: torch.Tensor | None
    logits: Callable[[torch.Tensor], torch.Tensor]
    eps: float
    extra: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]] | None = None
    vocabulary: int | None = None


class Decoder:
    """Makes token after token; everything that changes lies on the device, so that a step can be captured as a graph.

    Attributes:
        tokens: (most,) int64, what was generated; the prompt's own logits give the first.
    """

    def __init__(self, model: Model, sampler: Sampler, first: torch.Tensor, most: int) -> None:
        """`first`: (1, 1) token drawn from the prompt's logits; `most`: tokens at most, that one included."""
        self.model, self.sampler = model, sampler
        self.tokens = torch.zeros(most, dtype=torch.int64, device=first.device)
        self.tokens[:1] = first.view(1)
        self._token = first.clone()
        self._step = torch.zeros(1, dtype=torch.int64, device=first.device)

    def step(self) -> None:
        """Feed the newest token to the layers and draw the next."""
        self._token.copy_(self.sampler.draw(self.logits()))
        self._step += 1
        self.tokens.index_copy_(0, self._step, self._token.view(1))

    def logits(self) -> torch.Tensor:
        """(1, V) logits of what follows the newest token, which the caches take up."""
        model, step = self.model, self._step
        x = model.embed(self._token)
        extras = None if model.extra is None else model.extra(self._token, x)
        branch = branch_norm = None
        for index, layer in enumerate(model.layers):
            x, normed = add_norm(x, branch, branch_norm, layer.before_mixer, model.eps)
            branch = layer.mixer(normed, step)
            x, normed = add_norm(x, branch, layer.after_mixer, layer.before_feed_forward, model.eps)
            branch, branch_norm = layer.feed_forward(normed), layer.after_feed_forward
            if layer.finish is not None:
                x = add_branch(x, branch, branch_norm, model.eps)
                x = layer.finish(x, None if extras is None else extras[index])
                branch = branch_norm = None
        if model.norm is None:
            return model.logits(add_branch(x, branch, branch_norm, model.eps))
        return model.logits(add_norm(x, branch, branch_norm, model.norm, model.eps)[1])


def add_branch(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x + RMSNorm(branch) (or x + branch, where there is no weight)."""
    if branch is None:
        return x
    if weight is not None:
        branch = torch.nn.functional.rms_norm(branch, weight.shape, weight, eps)
    return x + branch
