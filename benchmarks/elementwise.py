"""What stands between the linears of a block beside what ComfyUI calls for it: PyTorch and comfy-kitchen, and a plain copy.

    python -m benchmarks.elementwise --out benchmarks/results/elementwise.json

Inputs are drawn anew for every run and lie in memory, not in the cache, when a call begins.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.goals import Goal, write
from benchmarks.timing import event_times, interleaved
from testing.measure import environment, relative_error

SHARE = 80.0
"""Percent of the rate of a copy."""
ROUNDS, CALLS = 7, 5
CHECKED = 64
"""Rows of each sample, or of each head, that are compared with float64."""


@dataclass(frozen=True)
class Case:
    """Activations of a block. wide_freqs: rotary frequencies in float32, else in `dtype`; heads_first: how it turns them."""

    title: str
    batch: int
    tokens: int
    heads: int
    dtype: torch.dtype
    wide_freqs: bool
    heads_first: bool


CASES = (
    Case("Wan, 832x480x81", 2, 32760, 40, torch.float16, wide_freqs=True, heads_first=False),
    Case("Qwen-Image, 1328x1328", 2, 6889, 24, torch.bfloat16, wide_freqs=False, heads_first=True),
    Case("Flux, 1024x1024", 1, 4096, 24, torch.bfloat16, wide_freqs=True, heads_first=True),
)
HEAD_DIM, TEXTS = 128, 128
EPS = 1e-6
TINY = 1e-12


@dataclass(frozen=True)
class Operation:
    """One kernel. nbytes: read and written; checked: what `exact` is the float64 reference of."""

    name: str
    ours: Callable[[], torch.Tensor]
    theirs: Callable[[], torch.Tensor]
    exact: Callable[[], torch.Tensor]
    checked: Callable[[torch.Tensor], torch.Tensor]
    nbytes: int


def _normalized(x: torch.Tensor, weight: torch.Tensor | None, centered: bool) -> torch.Tensor:
    wide = x.double()
    wide = wide - wide.mean(-1, keepdim=True) if centered else wide
    out = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return out if weight is None else out * weight.double()


def operations(case: Case) -> Iterator[Operation]:
    """Those of a block of the case, on new numbers."""
    import comfy_kitchen

    from lowbit.kernels.join_heads import join_heads
    from lowbit.kernels.modulate_rows import modulate_rows
    from lowbit.kernels.normalize import normalize
    from lowbit.kernels.rope import rope

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    x, branch = (draw(case.batch, case.tokens, case.heads * HEAD_DIM) for _ in range(2))
    shift, factor = draw(case.batch, 6, x.shape[2]).chunk(6, dim=1)[:2]
    size = x.nbytes

    def rows(out: torch.Tensor) -> torch.Tensor:
        return out[:, :CHECKED]

    for name, base, moved in (("modulation", shift, 2), ("gate", branch, 3)):
        yield Operation(
            name,
            lambda base=base: modulate_rows(base, x, factor),
            lambda base=base: torch.addcmul(base, x, factor),
            lambda base=base: base[:, :CHECKED].double() + rows(x).double() * factor.double(),
            rows,
            moved * size,
        )
    wide, short = draw(x.shape[2]), draw(HEAD_DIM)
    yield Operation(
        "LayerNorm",
        lambda: normalize(x, None, None, EPS, centered=True),
        lambda: F.layer_norm(x, x.shape[2:], None, None, EPS),
        lambda: _normalized(rows(x), None, True),
        rows,
        2 * size,
    )
    yield Operation(
        "RMSNorm",
        lambda: normalize(x, wide, None, EPS, centered=False),
        lambda: F.rms_norm(x, x.shape[2:], wide, EPS),
        lambda: _normalized(rows(x), wide, False),
        rows,
        2 * size,
    )
    # As a projection gives them. ComfyUI puts heads in front in memory before it normalizes them.
    given = x.view(case.batch, case.tokens, case.heads, HEAD_DIM)
    given = given.transpose(1, 2) if case.heads_first else given
    heads = given.contiguous()
    yield Operation(
        "RMSNorm of heads",
        lambda: normalize(given, short, None, EPS, centered=False),
        lambda: F.rms_norm(given.contiguous(), (HEAD_DIM,), short, EPS),
        lambda: _normalized(rows(heads), short, False),
        rows,
        2 * size,
    )
    if case.heads_first:
        texts = draw(case.batch, TEXTS, case.heads, HEAD_DIM).transpose(1, 2)
        yield Operation(
            "heads of texts and image joined",
            lambda: join_heads(texts, given),
            lambda: torch.cat((texts, given), dim=2),
            lambda: torch.cat((texts, given), dim=2).double(),
            lambda out: out,
            2 * (size + texts.nbytes),
        )
    freqs = draw(1, case.tokens, HEAD_DIM // 2, 2, 2, dtype=torch.float32 if case.wide_freqs else case.dtype)
    freqs = freqs.unsqueeze(1 if case.heads_first else 2)
    some = freqs if case.heads_first else freqs[:, :CHECKED]
    yield Operation(
        "rotary embedding",
        lambda: rope(heads, freqs),  # type: ignore[arg-type, return-value]
        lambda: comfy_kitchen.apply_rope1(heads, freqs),
        lambda: (some.double() * rows(heads).double().unflatten(-1, (-1, 1, 2))).sum(-1).flatten(-2),
        rows,
        2 * size,
    )


def measure(case: Case) -> Iterator[dict[str, Any]]:
    """A row for each operation."""
    between = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def cold(call: Callable[[], object]) -> Callable[[], list[float]]:
        def times() -> list[float]:
            found = []
            for _ in range(CALLS):
                between.zero_()
                found += event_times([call], 1)
            return found

        return times

    for operation in operations(case):
        source = torch.empty(operation.nbytes // 2, dtype=torch.uint8, device="cuda").random_()
        calls = {"us": operation.ours, "comfyui_us": operation.theirs, "copy_us": source.clone}
        for call in calls.values():
            call()
        times = interleaved({name: cold(call) for name, call in calls.items()}, ROUNDS)
        want = operation.exact()
        yield {
            "case": case.title,
            "operation": operation.name,
            **times,
            "terabytes_per_second": operation.nbytes / times["us"] / 1e6,
            "share_of_copy": 100 * times["copy_us"] / times["us"],
            "error": relative_error(operation.checked(operation.ours()), want),
            "comfyui_error": relative_error(operation.checked(operation.theirs()), want),
        }


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rate of every kernel, and its error."""
    shares = [row["share_of_copy"] for row in rows if not row["case"].startswith("Flux")]
    # What copies has no error.
    exact = [(row["error"] + TINY) / (row["comfyui_error"] + TINY) for row in rows]
    return [
        Goal("Wan and Qwen-Image: every kernel, of a copy's rate", SHARE, "%").judged(shares),
        Goal("error beside ComfyUI's", 1.01, "x", at_most=True).judged(exact),
    ]


def main() -> None:
    """Every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = []
    with torch.inference_mode():
        for case in CASES:
            for row in measure(case):
                print(row, flush=True)
                rows.append(row)
    write(out, {"environment": environment(), "rows": rows, "goals": goals(rows)})


if __name__ == "__main__":
    main()
