"""Times and checks every attention backend on the shapes of Wan, Qwen-Image and InfiniteTalk; writes one JSON file.

    python -m benchmarks.attention --output benchmarks/results/attention.json [--only NAME]

Needs an NVIDIA GPU. SageAttention and comfy-kitchen take part when they can be imported; the file says which did.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.goals import Goal, write
from benchmarks.timing import interleaved, settled
from lowbit.attention.backends import BACKENDS, BUDGETS, CORE, ERROR_LIMITS, AttentionCall
from lowbit.attention.candidates import AttentionInputs, Policy
from lowbit.attention.dispatch import Dispatcher
from lowbit.attention.environment import detect
from lowbit.attention.planning import TIMINGS_FILE
from lowbit.kernels.measured import MeasuredNumbers
from testing.measure import environment, relative_error

DEVICE = torch.device("cuda", 0)
TIMINGS = MeasuredNumbers(None, TIMINGS_FILE)
"""What `auto` has timed in this run."""
DATA = ("gaussian", "k_offset", "outliers")
SAMPLED_ROWS = 96
SETTLING_CALLS = 5
# ComfyUI 0.33's order of torch's kernels (comfy/ops.py).
CORE_ORDER = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Shape:
    """One attention call of a real model. flat: the model passes (batch, length, heads * head_dim), as Wan does."""

    name: str
    heads: int
    q_len: int
    kv_len: int
    head_dim: int = 128
    batch: int = 1
    kv_heads: int = 0
    mask: str | None = None
    flat: bool = True
    kind: str = "other"

    @property
    def flop(self) -> float:
        """Floating-point operations of the two products."""
        return 4.0 * self.batch * self.heads * self.q_len * self.kv_len * self.head_dim


SHAPES = (
    Shape("Wan 14B 480p self", 40, 32760, 32760, kind="wan self"),
    Shape("Wan 14B 720p self", 40, 75600, 75600, kind="wan self"),
    Shape("Wan 1.3B 480p self", 12, 32760, 32760, kind="wan self"),
    Shape("Wan 2.2 5B 704p self", 24, 27280, 27280, kind="wan self"),
    Shape("Wan 14B 480p cross", 40, 32760, 512, kind="wan cross"),
    Shape("Wan 14B 720p cross", 40, 75600, 512, kind="wan cross"),
    Shape("Wan 14B 480p image cross", 40, 32760, 257, kind="wan cross"),
    Shape("Wan 2.2 5B 704p cross", 24, 27280, 512, kind="wan cross"),
    Shape("Qwen-Image 1 MP", 24, 4608, 4608, flat=False, kind="qwen"),
    Shape("Qwen-Image 1328 x 1328, 13 text tokens", 24, 6902, 6902, flat=False, kind="qwen"),
    Shape("Qwen-Image 1328 x 1328, 13 text tokens, batch 2", 24, 6902, 6902, batch=2, flat=False, kind="qwen"),
    Shape("Qwen-Image 2 MP", 24, 8704, 8704, flat=False, kind="qwen"),
    Shape("Qwen-Image-Edit 1 MP, two references", 24, 13312, 13312, flat=False, kind="qwen"),
    Shape("Qwen-Image 1 MP, batch 2", 24, 4608, 4608, batch=2, flat=False, kind="qwen"),
    Shape("Qwen-Image 1 MP, text mask", 24, 4608, 4608, mask="float", flat=False),
    Shape("24 heads, 4352 tokens, bool mask", 24, 4352, 4352, mask="bool", flat=False),
    Shape("InfiniteTalk audio cross", 40, 1560, 32, batch=21, flat=False),
    Shape("head dim 64", 16, 8192, 8192, head_dim=64),
    Shape("head dim 80", 16, 8192, 8192, head_dim=80),
    Shape("head dim 96", 16, 8192, 8192, head_dim=96),
    Shape("head dim 256", 16, 8192, 8192, head_dim=256),
    Shape("grouped heads 32/8", 32, 8192, 8192, kv_heads=8, flat=False),
    Shape("short 24 x 1024", 24, 1024, 1024, flat=False),
)


def make(shape: Shape, data: str, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v as the model would pass them, bfloat16.

    k_offset: every channel of K is shifted by a constant of its own, of standard deviation 5. outliers: one channel in
    32 of K is eight times as large and one token in 1000 of V twenty times.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)
    kv_heads = shape.kv_heads or shape.heads
    q, k, v = (
        torch.randn(shape.batch, n, heads, shape.head_dim, device=DEVICE, dtype=torch.bfloat16, generator=generator)
        for n, heads in ((shape.q_len, shape.heads), (shape.kv_len, kv_heads), (shape.kv_len, kv_heads))
    )
    if data == "k_offset":
        k += 5 * torch.randn(1, 1, kv_heads, shape.head_dim, device=DEVICE, dtype=k.dtype, generator=generator)
    if data == "outliers":
        k[..., ::32] *= 8
        v[:, ::1000] *= 20
    if shape.flat:
        return [x.flatten(2) for x in (q, k, v)]
    return [x.transpose(1, 2).contiguous() for x in (q, k, v)]


def make_mask(shape: Shape) -> torch.Tensor | None:
    """The text mask of Qwen-Image (the first 200 of the text's tokens are padding, added), or a random bool mask."""
    if shape.mask is None:
        return None
    if shape.mask == "float":
        mask = torch.zeros(shape.batch, 1, shape.kv_len, device=DEVICE, dtype=torch.bfloat16)
        mask[..., :200] = torch.finfo(torch.bfloat16).min
        return mask
    generator = torch.Generator(DEVICE).manual_seed(7)
    return torch.rand(shape.batch, 1, 1, shape.kv_len, device=DEVICE, generator=generator) < 0.8


def heads_first(shape: Shape, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """(batch, heads, length, head_dim) views of what the model passes."""
    if not shape.flat:
        return tensors
    return [x.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for x in tensors]


def core(shape: Shape, tensors: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    """What ComfyUI's default (attention_pytorch) does with the call, reshapes included."""
    q, k, v = heads_first(shape, tensors)
    if mask is not None and mask.ndim == 3:
        mask = mask.unsqueeze(1)
    extra = {"enable_gqa": True} if shape.kv_heads else {}
    with sdpa_kernel(CORE_ORDER, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, **extra)
    return out.transpose(1, 2).reshape(shape.batch, shape.q_len, shape.heads * shape.head_dim)


def through(dispatcher: Dispatcher, shape: Shape, tensors: list[torch.Tensor], mask: torch.Tensor | None):
    """The same call through a dispatcher."""
    q, k, v = heads_first(shape, tensors)
    return dispatcher.run(
        AttentionInputs(q, k, v, mask, None, False, lambda drop: core(shape, tensors, None if drop else mask))
    )


def sampled_reference(shape: Shape, tensors: list[torch.Tensor], mask: torch.Tensor | None):
    """Float32 attention of a random sample of query rows, and which rows: (batch, rows, heads * head_dim)."""
    q, k, v = (x.float() for x in heads_first(shape, tensors))
    rows = torch.randperm(shape.q_len, device=DEVICE)[:SAMPLED_ROWS].sort().values
    if mask is not None:
        mask = mask.reshape(shape.batch, 1, 1, -1)
        mask = mask if mask.dtype == torch.bool else mask.float()
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask, enable_gqa=bool(shape.kv_heads))
    return out.transpose(1, 2).flatten(2), rows


def error_of(out: torch.Tensor, reference: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The relative error of the sampled rows."""
    want, rows = reference
    return relative_error(out[:, rows], want)


def settle(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Makes a dispatcher's checked and timed first calls."""
    for _ in range(SETTLING_CALLS):
        out = call()
    return out


def chosen(dispatcher: Dispatcher) -> str:
    """The backend that took the last calls of a dispatcher that has seen one shape."""
    (plan,) = dispatcher._plans.values()
    return plan.current.backend


def bench_shape(shape: Shape, rounds: int) -> dict:
    """Errors on three kinds of data, times on Gaussian data, and what each budget chose."""
    mask = make_mask(shape)
    row, named = time_shape(shape, make(shape, "gaussian"), mask, rounds)
    for data in DATA:
        add_errors(row, shape, data, mask, named)
    return row


def time_shape(
    shape: Shape, tensors: list[torch.Tensor], mask: torch.Tensor | None, rounds: int
) -> tuple[dict, dict[str, Dispatcher]]:
    """The row of one shape with its times and choices, and the dispatcher of each backend that ran."""
    here = detect(DEVICE)
    q, k, v = heads_first(shape, tensors)
    call = AttentionCall.of(q, k, v, mask, None)
    row = asdict(shape) | {"flop": shape.flop, "backends": {}, "budgets": {}}
    named, calls = {}, {CORE: lambda: core(shape, tensors, mask)}
    for backend in BACKENDS:
        reason = backend.why_not_here(here) or backend.why_not(call, here)
        dispatcher = Dispatcher(Policy(backend.name))
        if reason is None:
            settle(lambda d=dispatcher: through(d, shape, tensors, mask))
            if chosen(dispatcher) != backend.name:
                struck = dispatcher.report.as_dict(dispatcher.settings(DEVICE))
                reason = "; ".join(item["reason"] for item in struck["struck_off"] + struck["declined"])
        if reason is not None:
            row["backends"][backend.name] = {"why_not": str(reason)}
            continue
        named[backend.name] = dispatcher
        row["backends"][backend.name] = {"error_class": backend.error_class, "error": {}}
        calls[backend.name] = lambda d=dispatcher: through(d, shape, tensors, mask)
    budgets = {budget: Dispatcher(Policy("auto", budget), TIMINGS) for budget in BUDGETS}
    for budget, dispatcher in budgets.items():
        settle(lambda d=dispatcher: through(d, shape, tensors, mask))
        calls[f"auto {budget}"] = lambda d=dispatcher: through(d, shape, tensors, mask)
    microseconds = interleaved({name: settled(call) for name, call in calls.items()}, rounds)
    times = {name: value / 1e3 for name, value in microseconds.items()}
    row["core_ms"] = times[CORE]
    row["core_tflops"] = shape.flop / times[CORE] / 1e9
    for name in named:
        row["backends"][name] |= {"ms": times[name], "tflops": shape.flop / times[name] / 1e9}
    for budget, dispatcher in budgets.items():
        row["budgets"][budget] = {
            "chosen": chosen(dispatcher),
            "auto_ms": times[f"auto {budget}"],
            "speedup_over_core": times[CORE] / times[f"auto {budget}"],
            "errors": {},
        }
    return row, named


def add_errors(row: dict, shape: Shape, data: str, mask: torch.Tensor | None, named: dict[str, Dispatcher]) -> None:
    """Errors against float32 on one kind of data: of each backend, and of each budget with a dispatcher that is new to it."""
    tensors = make(shape, data, seed=1)
    reference = sampled_reference(shape, tensors, mask)
    for name, dispatcher in named.items():
        row["backends"][name]["error"][data] = error_of(through(dispatcher, shape, tensors, mask), reference)
    for budget in BUDGETS:
        dispatcher = Dispatcher(Policy("auto", budget), TIMINGS)
        row["budgets"][budget]["errors"][data] = error_of(through(dispatcher, shape, tensors, mask), reference)


QWEN_1328 = "Qwen-Image 1328 x 1328, 13 text tokens"
# shape, budget, TFLOP/s
RATES = (
    ("Wan 14B 480p self", "fast", 850),
    ("Wan 14B 720p self", "fast", 870),
    (QWEN_1328, "fast", 680),
    ("Qwen-Image 2 MP", "fast", 780),
    ("Wan 14B 480p self", "balanced", 660),
    ("Wan 14B 720p self", "balanced", 660),
)
# our backend, data, per cent
ERRORS = (
    ("lowbit_int8_fp8", ("gaussian",), 4.0),
    ("lowbit_int8_fp8", ("k_offset", "outliers"), 5.0),
    ("lowbit_int8_fp16", ("gaussian",), 1.3),
    ("lowbit_int8_fp16", ("k_offset", "outliers"), 2.0),
)


def goals(rows: list[dict]) -> list[dict]:
    """The numbers that were aimed at, each with what was measured; those of shapes that were left out are left out."""
    entries = []
    by_name = {row["name"]: row for row in rows}
    for name, budget, rate in RATES:
        if name in by_name:
            row = by_name[name]
            reached = row["flop"] / row["budgets"][budget]["auto_ms"] / 1e9
            entries.append(Goal(f"{budget}, {name}", rate, "TFLOP/s").judged([reached]))
    for backend, data, limit in ERRORS:
        errors = [100 * row["backends"][backend].get("error", {}).get(kind, 0.0) for row in rows for kind in data]
        name = f"{backend}, error on {' and '.join(data)}"
        entries.append(Goal(name, limit, "%", at_most=True).judged(value for value in errors if value))
    budgets = [(budget, entry) for row in rows for budget, entry in row["budgets"].items()]
    slower = Goal("any shape and budget: time beside ComfyUI's default", 1.01, "x", at_most=True)
    entries.append(slower.judged(1 / entry["speedup_over_core"] for _, entry in budgets))
    within = Goal("any shape, budget and data: error, parts of what is allowed", 1.0, "x", at_most=True)
    shares = (error / ERROR_LIMITS[budget] for budget, entry in budgets for error in entry["errors"].values())
    entries.append(within.judged(shares))
    return entries


def main() -> None:
    """Runs the benchmark and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="only shapes whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=7, help="samples per backend and shape")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    here = detect(DEVICE)
    facts = environment("ComfyUI 0.33's attention_pytorch: SDPA, flash before cuDNN")
    facts |= {"compute_capability": here.compute_capability, "cudnn": torch.backends.cudnn.version()}
    rows: list[dict] = []
    for shape in SHAPES:
        if options.only and not any(part in shape.name for part in options.only):
            continue
        rows.append(bench_shape(shape, options.rounds))
        torch.cuda.empty_cache()
        write(options.output, {"environment": facts, "shapes": rows, "goals": goals(rows)})
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
