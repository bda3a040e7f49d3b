"""The quantized linear in plain torch: what every kernel is compared with, and what runs on a CPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..kernels.decode import decode_int8_reference, decode_reference, is_integer_grid
from ..kernels.quantize_rows import apply_activation, quantize_rows_reference
from ..kernels.stored_weight import StoredWeight


def linear_reference(
    x: torch.Tensor,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    *,
    fast: bool,
    activation: str | None,
) -> torch.Tensor:
    """act(x) @ W.T + bias in plain torch, (..., K) -> (..., N) in x's dtype.

    Integer kinds run W8A8 when `fast`; every other case decodes the weight to x's dtype and multiplies.
    """
    if fast and is_integer_grid(weight) and x.dtype != torch.float64 and not _needs_grad(x, bias):
        return _int8_linear(x, weight, bias, activation)
    decoded = decode_reference(weight, x.dtype)
    return F.linear(apply_activation(x, activation), decoded, None if bias is None else bias.to(x.dtype))


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _int8_linear(
    x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    rows = x.reshape(-1, weight.columns)
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], weight.rows))
    quantized, row_scale = quantize_rows_reference(rows, torch.int8, weight.rotation, activation)
    grid = decode_int8_reference(weight).contiguous()
    product = _int8_matmul(quantized, grid).float() * row_scale.unsqueeze(1) * weight.scale.float().reshape(1, -1)
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype).reshape(*x.shape[:-1], weight.rows)


def _int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(M, K) x (N, K) int8 -> (M, N), the exact integers, in whatever dtype holds them."""
    if a.device.type == "cpu":
        return _int_mm(a, b) if _cpu_has_int_mm() else float_int8_matmul(a, b)
    aligned = a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0
    if aligned and torch.cuda.get_device_capability(a.device) >= (7, 5):
        rows = a.shape[0]
        # It refuses fewer than 17 rows.
        padded = F.pad(a, (0, 0, 0, 32 - rows)) if rows <= 16 else a
        return _int_mm(padded, b)[:rows]
    return a.double() @ b.double().t()


def _int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(a, b.t())


def float_int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(M, K) x (N, K) int8 on a CPU -> (M, N), the exact integers: by float32 products of so few columns that none rounds.

    float32 holds every integer up to 2^24, and each partial sum stays below that. One product's sums are float32, those
    of several int32.
    """
    columns = a.shape[1]
    if 0 in (columns, a.shape[0], b.shape[0]):
        return torch.zeros(a.shape[0], b.shape[0])
    step = max(1, _FLOAT32_EXACT // max(1, _largest(a) * _largest(b)))
    if step >= columns:
        return a.float() @ b.float().t()
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32)
    for start in range(0, columns, step):
        part = slice(start, start + step)
        total += (a[:, part].float() @ b[:, part].float().t()).int()
    return total


_FLOAT32_EXACT = 1 << 24


def _largest(codes: torch.Tensor) -> int:
    """The largest magnitude among int8 codes."""
    least, most = codes.aminmax()
    return max(-int(least), int(most))


@functools.lru_cache(maxsize=1)
def _cpu_has_int_mm() -> bool:
    """Whether `torch._int_mm` is right on this CPU, and no slower than float32: it is where there are VNNI instructions.

    Without them oneDNN adds pairs of products in 16 bits, which overflow (its documentation, "Nuances of int8
    computations"); where oneDNN has no int8 products PyTorch multiplies number by number.
    """
    a, b = torch.full((256, 512), 127, dtype=torch.int8), torch.full((256, 512), 127, dtype=torch.int8)
    a[::2], b[:, ::3] = -128, 126
    try:
        right = torch.equal(_int_mm(a, b).long(), float_int8_matmul(a, b).long())
    except RuntimeError:
        return False
    return right and _seconds(_int_mm, a, b) <= _seconds(float_int8_matmul, a, b)


def _seconds(matmul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> float:
    """The fastest of a few calls: another program's turn makes others slower."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        matmul(a, b)
        times.append(time.perf_counter() - started)
    return min(times)
