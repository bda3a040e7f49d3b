"""What attention every token of a prompt gathers: the scores by which heavy hitters are chosen."""

from __future__ import annotations

import torch

_MOST_SCORES = 1 << 26
"""Scores that are held at once: 256 MiB."""


def gathered_by_key(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """(KV, T) float32: the probabilities that every key is given, over all queries and those heads that share it.

    No query looks at what comes after it.

    Args:
        q: (H, T, D).
        k: (KV, T, D).
        mask: (..., T, T) added to the scores, causal; None for one token.
        scale: of the scores.
    """
    heads, count, width = q.shape
    groups = heads // k.shape[0]
    gathered = torch.zeros(k.shape[0], k.shape[1], dtype=torch.float32, device=q.device)
    rows = max(1, _MOST_SCORES // (heads * k.shape[1]))
    keys = k.transpose(1, 2).unsqueeze(1)
    for start in range(0, count, rows):
        end = min(start + rows, count)
        part = q[:, start:end].reshape(k.shape[0], groups, -1, width)
        scores = (part @ keys[..., :end]).float() * scale
        if mask is not None:
            scores += mask.reshape(mask.shape[-2:])[start:end, :end]
        gathered[:, :end] += scores.softmax(dim=-1).sum(dim=(1, 2))
    return gathered
