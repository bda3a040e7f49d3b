"""Trainable tensors by name and the optimizers that move them: Muon for matrices and convolutions, Adam for the rest."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_ADAM_RATE = 0.3
_AVERAGE = 0.995


class Trained:
    """A model's parameters in training, and their running average, which is what is kept.

    A weight is trained as a matrix of its output channels, which Muon (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon) takes; embeddings and what has one dimension go to Adam.
    """

    def __init__(self, start: Mapping[str, torch.Tensor]) -> None:
        self._shapes = {key: value.shape for key, value in start.items()}
        self._leaves = {
            key: (value.flatten(1) if _is_matrix(key, value) else value.clone()).requires_grad_()
            for key, value in start.items()
        }
        self._average = {key: leaf.detach().clone() for key, leaf in self._leaves.items()}
        matrices = [leaf for key, leaf in self._leaves.items() if _is_matrix(key, start[key])]
        others = [leaf for key, leaf in self._leaves.items() if not _is_matrix(key, start[key])]
        self._muon = torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.0)
        self._adam = torch.optim.Adam(others, betas=(0.9, 0.98))
        self._steps = 0

    def low(self) -> dict[str, torch.Tensor]:
        """The parameters in bfloat16, for the forward pass."""
        return {key: leaf.view(self._shapes[key]).bfloat16() for key, leaf in self._leaves.items()}

    def average(self) -> dict[str, torch.Tensor]:
        """The running average of the parameters, float32."""
        return {key: leaf.view(self._shapes[key]) for key, leaf in self._average.items()}

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """One step down the loss; `rate` is Muon's, Adam's is in proportion."""
        self._muon.zero_grad()
        self._adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._leaves.values(), 1.0)
        for optimizer, own in ((self._muon, rate), (self._adam, rate * _ADAM_RATE)):
            optimizer.param_groups[0]["lr"] = own
            optimizer.step()
        self._steps += 1
        weight = 1 - min(_AVERAGE, (1 + self._steps) / (10 + self._steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self._average.values()), list(self._leaves.values()), weight)


def _is_matrix(key: str, value: torch.Tensor) -> bool:
    return value.dim() >= 2 and key.endswith("weight") and not key.endswith(("shared.weight", "attention_bias.weight"))
