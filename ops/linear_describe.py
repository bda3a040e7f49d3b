"""Says how a layout will be multiplied on a GPU: natively, through a fallback, or emulated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.runtime import ADA, AMPERE, BLACKWELL, TRITON_FOUND
from ..kernels.stored_weight import FP8, INT4, INT4_CODEBOOK, INT8, MXFP8, NVFP4
from .linear_table import FP8_ROWS, INT8_ROWS, KITCHEN, PATHS, REFERENCE, Gpu, choose_path
from .linear_weight import LAYOUT_KINDS

NATIVE = "native"
FALLBACK = "fallback"
EMULATED = "emulated"


@dataclass(frozen=True)
class LinearDescription:
    """How a layout runs.

    Attributes:
        support: "native" (the tensor cores take the stored codes, or the product was meant to be 16-bit), "fallback"
            (a low-precision product by another route), or "emulated" (decoded and multiplied in 16 bits, though a fast
            product was asked for, or in plain torch).
        path: key into `linear_table.PATHS`, for a large input.
        sentence: for people.
    """

    support: str
    path: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def describe_linear(
    layout_name: str,
    *,
    fast: bool,
    cc: tuple[int, int] | None,
    triton: bool = TRITON_FOUND,
    kitchen_cuda: bool = True,
) -> LinearDescription:
    """How weights of `layout_name` are multiplied on compute capability `cc` (None: a CPU).

    Args:
        layout_name: comfy-kitchen layout.
        fast: the format quantizes activations too.
        cc: compute capability, (major, minor).
        triton: Triton is installed.
        kitchen_cuda: comfy-kitchen's CUDA backend is loaded.

    Raises:
        KeyError: the layout is not one the linears know.
    """
    kind = LAYOUT_KINDS[layout_name]
    gpu = Gpu(cc or (0, 0), triton and cc is not None, kitchen_cuda and cc is not None)
    path = choose_path(kind, fast, 4096, 4096, 4096, torch.bfloat16, gpu)
    support, why = _support(kind, fast, path, gpu)
    return LinearDescription(support, path, f"{support}: {why}")


def _support(kind: str, fast: bool, path: str, gpu: Gpu) -> tuple[str, str]:
    if path == REFERENCE:
        integers = kind in (INT8, INT4, INT4_CODEBOOK)
        where = "a CPU" if gpu.cc == (0, 0) else f"a GPU of compute capability {gpu.cc[0]}.{gpu.cc[1]} without Triton"
        if gpu.triton and gpu.cc < AMPERE:
            where = f"a GPU of compute capability {gpu.cc[0]}.{gpu.cc[1]}"
        how = "multiplied as INT8 in plain torch" if fast and integers else "decoded in plain torch at every call"
        return EMULATED, f"on {where} the weight is {how}"
    if not fast or path == KITCHEN or (path, kind) in ((FP8_ROWS, FP8), (INT8_ROWS, INT8)):
        return NATIVE, PATHS[path]
    if path == FP8_ROWS:
        return (
            FALLBACK,
            "this GPU has no block-scaled tensor cores: the weight becomes e4m3 in scratch, the product is FP8",
        )
    if path == INT8_ROWS:
        return FALLBACK, PATHS[path]
    needed = {FP8: ADA, MXFP8: BLACKWELL, NVFP4: BLACKWELL}.get(kind, AMPERE)
    return EMULATED, (
        f"a fast product needs compute capability {needed[0]}.{needed[1]}; here the weight is decoded into a shared buffer "
        "and the product is 16-bit (int8_convrot_fast is faster on this GPU)"
    )
