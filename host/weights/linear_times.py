"""Predicts how long a step of a plan takes on this GPU: each shape of its linears is timed once in each format, and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import comfy.model_management
import torch

from ...attention.environment import detect
from ...attention.measure import milliseconds
from ...kernels.measured import MeasuredNumbers
from ...ops.device_info import device_info
from ...ops.formats import FORMATS
from ...ops.keep_rules import KEEP
from ...ops.linear import quantized_linear
from ...ops.plan import QuantizationPlan
from ...ops.quantize import quantize_to_tensor
from ...ops.scratch import release_scratch
from ...ops.trade import StepProduct

logger = logging.getLogger("lowbit.host")

FILE_NAME = "linear_timings.json"
_COPY, _COPIED_BYTES = "copy from pinned memory", 1 << 28
_HEADROOM = 2 << 30

Call = Callable[[], torch.Tensor]


def step_milliseconds(
    plan: QuantizationPlan, products: list[StepProduct], *, device: torch.device, folder: Path
) -> float | None:
    """Time of a step's products; where the model is larger than the GPU, the rest streams meanwhile, if that takes longer.

    Args:
        plan: of the model.
        products: its linears.
        device: where it will run.
        folder: of quantized files, where times are kept.

    Returns:
        Milliseconds; None on a CPU, where there is too little memory to measure, or a format cannot be multiplied.
    """
    if device.type != "cuda" or plan.family.kind == "text_encoder":
        return None
    times, where = MeasuredNumbers(folder, FILE_NAME), detect(device).fingerprint()
    wanted = [(_called(product), product.weight_format) for product in products]
    calls = {name: partial(_product_call, product, device) for name, product in zip(wanted, products, strict=True)}
    calls[_COPY, _COPY] = partial(_copy_call, device)

    def known(called: str, name: str) -> float | None:
        return (times.get(where, called) or {}).get(name)

    missing = sorted(key for key in calls if known(*key) is None)
    if missing:
        comfy.model_management.free_memory(_HEADROOM, device)
        for called, name in missing:
            _measure(times, where, called, name, calls[called, name])
        release_scratch()
    found, copied = [known(*key) for key in wanted], known(_COPY, _COPY)
    if copied is None or any(time is None for time in found):
        return None
    streamed = max(plan.nbytes_after - device_info(device).memory_bytes, 0)
    return max(sum(time for time in found if time is not None), copied * streamed / _COPIED_BYTES)


def _called(product: StepProduct) -> str:
    return f"{product.rows} rows, {product.shape[1]} to {product.shape[0]}"


def _measure(times: MeasuredNumbers, where: str, called: str, name: str, make: Callable[[], Call]) -> None:
    """Adds the time of a call to what is known."""
    try:
        found, _ = milliseconds({name: make()}, torch.device("cuda"))
    except RuntimeError as error:
        # Too little memory, on the GPU or to pin: a dry run has its other columns all the same.
        logger.info("%s as %s could not be timed: %s", called, name, str(error).partition("\n")[0])
        return
    if found:
        times.put(where, {called: (times.get(where, called) or {}) | found})


def _product_call(product: StepProduct, device: torch.device) -> Call:
    rows, columns = product.shape
    weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    x = torch.randn(product.rows, columns, device=device, dtype=torch.bfloat16)
    if product.weight_format == KEEP:
        return partial(torch.nn.functional.linear, x, weight)
    row = FORMATS[product.weight_format]
    return partial(quantized_linear, x, quantize_to_tensor(weight, row), fast=row.fast)


def _copy_call(device: torch.device) -> Call:
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device)
    return partial(target.copy_, source, non_blocking=True)
