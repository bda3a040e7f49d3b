"""Adds a branch to the residual stream and normalizes the sum (RMSNorm), the one row of a decoding step in one launch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .launch import launch
from .runtime import kernels_run_on, power_of_two, tl, triton


def add_norm_reference(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    branch_weight: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_norm` in plain torch, rounded where core rounds."""
    if branch is not None:
        if branch_weight is not None:
            branch = F.rms_norm(branch, branch_weight.shape, branch_weight, eps)
        x = x + branch
    return x, F.rms_norm(x, weight.shape, weight, eps)


@triton.jit
def _add_norm_kernel(
    x_ptr,
    branch_ptr,
    branch_weight_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    eps,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    NORMS_BRANCH: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64) * K
    lane = tl.arange(0, BLOCK_K)
    inside = lane < K
    element: tl.constexpr = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + lane, mask=inside, other=0.0)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + row + lane, mask=inside, other=0.0).to(tl.float32)
        if NORMS_BRANCH:
            scale = 1.0 / tl.sqrt(tl.sum(branch * branch, axis=0) / K + eps)
            branch_weight = tl.load(branch_weight_ptr + lane, mask=inside, other=0.0).to(tl.float32)
            branch = (branch * scale * branch_weight).to(element).to(tl.float32)
        x = (x.to(tl.float32) + branch).to(element)
        tl.store(sum_ptr + row + lane, x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / K + eps)
    weight = tl.load(weight_ptr + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + lane, (wide * scale * weight).to(element), mask=inside)


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    branch_weight: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + branch, RMSNorm(x + branch) * weight) for rows (M, K).

    Args:
        x: (M, K) contiguous residual stream.
        branch: (M, K) contiguous, added to it; None: nothing is, and x itself is the first result.
        branch_weight: (K,) weight of an RMSNorm of the branch before it is added (Gemma), or None.
        weight: (K,), with any offset of the model in it already.
        eps: added to the mean square.

    Returns:
        two (M, K) tensors in x's dtype.
    """
    if not kernels_run_on(x):
        return add_norm_reference(x, branch, branch_weight, weight, eps)
    rows, columns = x.shape
    out = torch.empty_like(x)
    total = x if branch is None else torch.empty_like(x)
    launch(
        _add_norm_kernel,
        (rows, 1, 1),
        (
            x,
            x if branch is None else branch,
            weight if branch_weight is None else branch_weight,
            weight,
            total,
            out,
            eps,
        ),
        {
            "K": columns,
            "BLOCK_K": power_of_two(columns),
            "HAS_BRANCH": branch is not None,
            "NORMS_BRANCH": branch_weight is not None,
        },
        warps=8,
    )
    return total, out
