"""Multiplies a few rows straight from the stored codes: the weight is read once and never copied."""

from __future__ import annotations

import torch

from ..kernels.launch import Replay, addresses_of
from ..kernels.matmul_blocks import ROWS_PER_TILE, block_splits, matmul_blocks
from ..kernels.matmul_decode import matmul_decode, matvec_decode
from ..kernels.matmul_split import matmul_split, split_rows, term_count
from ..kernels.quantize_rows import apply_activation
from ..kernels.rotate_rows import rotate_rows
from ..kernels.runtime import ADA, HOPPER, INTERPRETED, multiprocessor_count
from ..kernels.stored_weight import FP8, INT4, INT4_CODEBOOK, INT8, MXFP8, NVFP4, StoredWeight, WeightTraits
from .linear_call import LinearCall, Product, straight
from .linear_table import Gpu
from .scratch import Spec, scratch_here


def _choose_splits(tiles: int, nbytes_per_row: int, device: torch.device) -> int:
    """Parts of K so that about two programs meet on every multiprocessor, each with at least 1 KiB of a row."""
    wanted = 1.6 * multiprocessor_count(device.index or 0)
    splits = 1
    while tiles * splits < wanted and nbytes_per_row // (2 * splits) >= 1024 and splits < 16:
        splits *= 2
    return splits


def _splits(method: str, call: LinearCall) -> int:
    weight = call.weight
    if method == "matvec":
        return 1
    if method == "blocks":
        return block_splits(weight.columns)
    return _choose_splits(-(-weight.rows // (32 if method == "decode" else 64)), weight.shape[1], call.device)


def _method(call: LinearCall) -> str:
    kind = call.weight.kind
    if kind == INT4_CODEBOOK:
        return "blocks"
    if call.dtype == torch.float32:
        return "matvec"
    if kind == NVFP4 and call.weight.alignment >= 8:
        return "blocks"
    if kind in (FP8, INT8) and not call.weight.rotation and call.rows == 1 and call.activation is None:
        return "matvec"
    if kind in (INT8, INT4) or (kind == FP8 and call.gpu.cc >= ADA):
        return "split"
    return "matvec" if call.rows <= 2 else "decode"


def _split_tile(lines: int, weight: WeightTraits, splits: int, gpu: Gpu) -> tuple[int, int]:
    """(bytes of a row in a step, steps in flight) for `lines` split rows, as measured on an H200."""
    if lines > 64:
        return 128, 2
    if gpu.cc[0] != HOPPER[0]:
        return 128, 3
    one_row = lines <= 2 and splits == 1
    return (128, 6) if one_row or weight.kind == INT4 else (256, 4)


class FewRows(Product):
    """A few rows are multiplied straight from the stored codes."""

    def __init__(self, call: LinearCall) -> None:
        super().__init__(call)
        self.method = _method(call)
        self.splits = _splits(self.method, call)
        self.specs = self._specs()
        # What decodes in registers takes its input as it is.
        self.first = call.activation if self.method in ("matvec", "decode") and not call.weight.rotation else None
        self.launches = Replay()

    def _specs(self) -> tuple[Spec, ...]:
        """Of x rotated, of its terms, of their scales, of the sums over parts of K, and of the codes row by row."""
        rows, columns, weight = self.rows, self.columns, self.call.weight
        integer, split = weight.kind != FP8, self.method == "split"
        # A rotated row can be 16 times as large as x, which is more than float16 holds.
        rotated = torch.float32 if self.dtype == torch.float16 else self.dtype
        q_shape = (term_count(self.dtype, integer) if split else 0, rows, columns)
        partial = self.splits > 1 or self.method == "blocks"
        return (
            ((rows, columns), rotated) if weight.rotation and not split else None,
            (q_shape, torch.int8 if integer else torch.float8_e4m3fn) if split else None,
            ((rows,), torch.float32) if split else None,
            ((self.splits, rows, self.count), torch.float32) if partial else None,
            self.call.codes_spec(8 if weight.kind == INT4_CODEBOOK else 1),
        )

    def __call__(self, x, weight, bias, group="", out=None):
        out = self.new_output()
        cut = scratch_here(self.device).take(self.specs, self.device)
        weight, x = straight(weight, cut.tensors[-1]), apply_activation(x, self.first)
        places = addresses_of(cut.addresses, x, out, bias, *weight.tensors)
        if not self.launches.again(places):
            self.launches.record(places, self._multiply, x, weight, bias, out, *cut.tensors[:-1])
        return out

    def _multiply(self, x, weight, bias, out, rotated, q, row_scale, partial):
        x, out, activation = self._as_rows(x), self._as_rows(out), self.call.activation
        if self.method == "split":
            self._multiply_split(x, weight, bias, activation, out, q, row_scale, partial)
            return
        if weight.rotation:
            rotate_rows(x, rotated, None, weight.rotation, activation)
            x, activation = rotated, None
        if self.method == "blocks":
            self._multiply_blocks(x, weight, bias, activation, out, partial)
        else:
            self._multiply_decoded(x, weight, bias, out, partial)

    def _multiply_split(self, x, weight, bias, activation, out, q, row_scale, partial):
        """x as a sum of 8-bit terms, each multiplied with the stored codes on 8-bit tensor cores."""
        overlap, splits, planes = self.call.overlaps, self.splits, 2 if weight.kind == INT4 else 1
        if weight.rotation:
            rotate_rows(x, q, row_scale, weight.rotation, activation, planes, overlap)
        else:
            split_rows(x, q, row_scale, activation, planes, overlap)
        step, stages = _split_tile(q.shape[0] * self.rows, self.call.weight, splits, self.call.gpu)
        options = {"splits": splits, "assembly": not INTERPRETED, "overlap": overlap, "step": step, "stages": stages}
        matmul_split(q, row_scale, weight, bias, out, partial, **options)

    def _multiply_blocks(self, x, weight, bias, activation, out, partial):
        """4-bit codes decoded sixteen at a time, in as many parts of K as `splits`."""
        options = {"assembly": not INTERPRETED, "hardware_e4m3": self.call.hardware_e4m3}
        options |= {"tiles": _tiles_per_program(weight, self.splits, x.device), "activation": activation}
        matmul_blocks(x, weight, bias, out, partial, overlap=self.call.overlaps, **options)

    def _multiply_decoded(self, x, weight, bias, out, partial):
        """Codes decoded in registers: sums along K for one or two rows ("matvec"), else 16-bit tensor cores ("decode")."""
        hardware = self.call.hardware_e4m3
        as_bytes = weight.code_name in ("e5m2", "e2m1", "int4") or (not hardware and weight.kind in (FP8, MXFP8))
        stored = weight.data.view(torch.uint8) if as_bytes else weight.data
        if self.method == "matvec":
            matvec_decode(x, weight, stored, bias, out, hardware_e4m3=hardware)
            return
        options = {"splits": self.splits, "hardware_e4m3": hardware, "assembly": not INTERPRETED}
        matmul_decode(x, weight, stored, bias, out, partial, **options)


def _tiles_per_program(weight: StoredWeight, splits: int, device: torch.device) -> int:
    """Two, as long as two programs meet on every multiprocessor."""
    programs = splits * -(-weight.rows // ROWS_PER_TILE)
    return 2 if programs >= 4 * multiprocessor_count(device.index or 0) else 1
