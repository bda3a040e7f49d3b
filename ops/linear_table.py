"""Which path multiplies a quantized weight: rules as data, with the crossovers measured by benchmarks/linear.py."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from ..errors import CapabilityError
from ..kernels.runtime import ADA, AMPERE, BLACKWELL, FLOATS, HALF, HOPPER, TRITON_FOUND, TURING
from ..kernels.stored_weight import FP8, INT4, INT4_CODEBOOK, INT8, KINDS, MXFP8, NVFP4

REFERENCE = "reference"
SCRATCH = "scratch"
FEW_ROWS = "few_rows"
FP8_ROWS = "fp8_rows"
INT8_ROWS = "int8_rows"
KITCHEN = "kitchen"

PATHS = {
    REFERENCE: "plain torch: the weight is decoded whole, or multiplied as int8, with temporary copies",
    SCRATCH: "the weight is decoded into one shared buffer, then a 16-bit matmul",
    FEW_ROWS: "the weight is decoded inside the matmul, read once and never copied",
    FP8_ROWS: "x is quantized to e4m3 row by row, then an FP8 matmul",
    INT8_ROWS: "x is quantized to int8 row by row (rotated first for convrot), then an INT8 matmul",
    KITCHEN: "comfy-kitchen's own kernel for this format",
}

FORCE_VARIABLE = "LOWBIT_LINEAR_PATH"

ANY_CC = (0, 0)
NO_CC = (99, 0)


@dataclass(frozen=True, eq=False)
class Gpu:
    """What the choice depends on besides shapes: compute capability (0, 0 for a CPU), Triton, comfy-kitchen's CUDA."""

    cc: tuple[int, int]
    triton: bool = TRITON_FOUND
    kitchen: bool = False


@dataclass(frozen=True)
class PathRule:
    """One line of the table; the first that fits a call wins.

    Attributes:
        path: key into `PATHS`.
        kinds: storage kinds (kernels/stored_weight.py).
        fast: True or False; None: either.
        rows: least and most M.
        cc: least compute capability, and the first that is too new.
        dtypes: dtypes of x.
        triton: needs Triton.
        kitchen: needs comfy-kitchen's CUDA backend.
        multiple: K and N must be multiples of it.
        corrected: takes an int4_codebook weight with `correction`.
    """

    path: str
    kinds: tuple[str, ...]
    fast: bool | None
    rows: tuple[int, int] = (1, 1 << 40)
    cc: tuple[tuple[int, int], tuple[int, int]] = (ANY_CC, NO_CC)
    dtypes: tuple[torch.dtype, ...] = FLOATS
    triton: bool = True
    kitchen: bool = False
    multiple: int = 1
    corrected: bool = False

    def fits(self, kind: str, fast: bool, rows: int, n: int, k: int, dtype: torch.dtype, gpu: Gpu) -> bool:
        """Whether this rule takes the call."""
        return (
            kind in self.kinds
            and self.fast in (None, fast)
            and self.rows[0] <= rows <= self.rows[1]
            and self.cc[0] <= gpu.cc < self.cc[1]
            and dtype in self.dtypes
            and (gpu.triton or not self.triton)
            and (gpu.kitchen or not self.kitchen)
            and n % self.multiple == 0
            and k % self.multiple == 0
        )


RULES = (
    # Few rows: reading the weight is all the time there is, so the stored bytes go straight into the product.
    PathRule(FEW_ROWS, (FP8, INT8, INT4), False, rows=(1, 64), cc=(AMPERE, NO_CC), dtypes=HALF),
    PathRule(FEW_ROWS, (FP8, INT8, INT4, MXFP8, NVFP4), None, rows=(1, 32), cc=(AMPERE, NO_CC), dtypes=HALF),
    PathRule(FEW_ROWS, (INT4_CODEBOOK,), None, rows=(1, 32), cc=(AMPERE, NO_CC), dtypes=(torch.bfloat16,)),
    PathRule(FEW_ROWS, (FP8, INT8, MXFP8, NVFP4, INT4), None, rows=(1, 2), cc=(AMPERE, NO_CC)),
    PathRule(
        KITCHEN, (INT4_CODEBOOK,), True, rows=(1, 2), cc=(HOPPER, BLACKWELL), triton=False, kitchen=True, multiple=16
    ),
    # Block formats where the tensor cores take them as they are. comfy-kitchen's NVFP4 quantizer checks no bounds: it
    # writes past its output unless (rows, padded to 16) x K is a multiple of 512, hence K by 32.
    PathRule(KITCHEN, (NVFP4, MXFP8), True, cc=(BLACKWELL, NO_CC), dtypes=HALF, triton=False, multiple=32),
    # 8-bit products. comfy-kitchen's INT8 kernel is tuned for every GPU but Hopper.
    PathRule(KITCHEN, (INT8, INT4), True, cc=(TURING, HOPPER), triton=False, kitchen=True, multiple=16),
    PathRule(KITCHEN, (INT4_CODEBOOK,), True, cc=(AMPERE, HOPPER), triton=False, kitchen=True, multiple=16),
    PathRule(
        KITCHEN, (INT8, INT4, INT4_CODEBOOK), True, cc=(BLACKWELL, NO_CC), triton=False, kitchen=True, multiple=16
    ),
    PathRule(FP8_ROWS, (FP8,), True, cc=(ADA, NO_CC)),
    PathRule(FP8_ROWS, (FP8,), True, cc=(ADA, NO_CC), dtypes=(torch.bfloat16,), triton=False, multiple=16),
    PathRule(FP8_ROWS, (MXFP8, NVFP4), True, cc=(ADA, BLACKWELL)),
    PathRule(INT8_ROWS, (INT8, INT4, INT4_CODEBOOK), True, cc=(AMPERE, NO_CC)),
    PathRule(SCRATCH, KINDS, None, cc=(AMPERE, NO_CC)),
    PathRule(REFERENCE, KINDS, None, triton=False, dtypes=(*FLOATS, torch.float64), corrected=True, rows=(0, 1 << 40)),
)


@functools.lru_cache(maxsize=1)
def forced_path() -> str | None:
    """The path named by LOWBIT_LINEAR_PATH when the process started, for debugging.

    Raises:
        CapabilityError: there is no path of that name.
    """
    name = os.environ.get(FORCE_VARIABLE) or None
    if name is not None and name not in PATHS:
        raise CapabilityError(f"{FORCE_VARIABLE} is '{name}', which is no path: choose one of {', '.join(PATHS)}.")
    return name


@functools.lru_cache(maxsize=4096)
def choose_path(
    kind: str, fast: bool, rows: int, n: int, k: int, dtype: torch.dtype, gpu: Gpu, corrected: bool = False
) -> str:
    """The path of the first rule that fits; the forced path goes first when any of its rules takes the call.

    Args:
        kind: storage kind.
        fast: whether activations may be quantized.
        rows: M, rows of x.
        n, k: out_features and in_features.
        dtype: of x.
        gpu: what the call runs on.
        corrected: the weight has a `correction` per group (asymmetric 4-bit weights).
    """
    fitting = [
        rule.path
        for rule in RULES
        if rule.fits(kind, fast, rows, n, k, dtype, gpu) and (rule.corrected or not corrected)
    ]
    forced = forced_path()
    return forced if forced in fitting else fitting[0]
