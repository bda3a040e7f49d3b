"""What a quantized linear takes of the processor, by stage, beside ComfyUI's own 16-bit one; and so a whole step.

    python -m benchmarks.launch --out benchmarks/results/launch.json [--before OTHER.json]

Linears and steps are those of a Qwen-Image model of real width that ComfyUI has loaded, with dynamic VRAM and without.
The GPU's work is not waited for. Without a GPU the model is tiny and nothing is launched: products return what they
would have written, so only what Python does before counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.checkpoints import write_checkpoint
from benchmarks.goals import Goal, write
from benchmarks.steps import DEVICE, Case, core_in_memory, sample
from lowbit.ops.formats import FORMATS as ALL_FORMATS
from testing.measure import environment
from testing.tiny import qwen_image

HEADS, LAYERS, JOINT = (24, 2, 3584) if DEVICE == "cuda" else (2, 2, 64)
LINEAR = "transformer_blocks.0.attn.to_out.0"
LORA_RANK = 16
ROWS = (1, 512, 4096)
BF16 = "bf16"
FORMATS = tuple(name for name, row in ALL_FORMATS.items() if row.fast)
STEPS, FIRST_TIMED = 8, 3
LATENT = (1, 16, 1, 16, 16)
"""So small that a step waits for the processor."""
ROUNDS, CALLS = 15, 20


@dataclass(frozen=True)
class Row:
    """Microseconds of the processor for one linear called once; stages are parts of `call`, as far as they can be told."""

    format: str
    dynamic: bool
    rows: int
    call: float
    stages: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """As it is written."""
        stages = {name: round(us, 2) for name, us in self.stages.items()}
        return {"format": self.format, "dynamic": self.dynamic, "rows": self.rows, "call": self.call, "stages": stages}


def wait() -> None:
    """For the GPU, where there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def microseconds(call: Callable[[], object]) -> float:
    """What `call` takes to return: the least median of some rounds, since another program's turn makes others slower.

    The GPU's queue never runs full.
    """
    for _ in range(10):
        call()
    rounds = []
    for _ in range(ROUNDS):
        wait()
        times = []
        for _ in range(CALLS):
            started = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - started)
        rounds.append(statistics.median(times))
    wait()
    return round(min(rounds) / 1e3, 2)


def nothing(*_: Any) -> None:
    """In the place of what launches."""


def done(*_: Any) -> bool:
    """In the place of what launches again."""
    return True


@contextlib.contextmanager
def nothing_launched() -> Iterator[None]:
    """Without a GPU: every path is chosen as on a GPU of cc 9.0, and what is compiled does nothing."""
    if DEVICE == "cuda":
        yield
        return
    from lowbit.kernels import launch, matmul_hopper, matmul_rows
    from lowbit.ops import linear, linear_8bit, linear_few_rows, scratch
    from lowbit.ops.linear_table import Gpu

    compiled = launch._Launch(nothing, (None,) * 9, (), (None,) * 3)
    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (launch, "_launch_by_triton", lambda *_: compiled),
        (launch, "make_tensordesc_arg", lambda *_: [None] * 5),
        (torch._C, "_cuda_getDevice", lambda: 0),
        (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
        (linear, "_gpu", lambda device: Gpu((9, 0), True)),
        (scratch, "INTERPRETED", True),  # kept, as a GPU's is
        (linear_8bit, "_takes_scaled_mm", lambda call: not linear_8bit._own_is_as_fast(call)),
        (linear_few_rows, "multiprocessor_count", lambda index: 132),
        (matmul_rows, "multiprocessor_count", lambda index: 132),
        (matmul_hopper, "multiprocessor_count", lambda index: 132),
        (matmul_hopper, "compute_capability", lambda index: (9, 0)),
        (
            torch,
            "_scaled_mm",
            lambda q, codes, *_, out_dtype, **__: q.new_empty(q.shape[0], codes.shape[1], dtype=out_dtype),
        ),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, stand_in, create=True))
        yield


@contextlib.contextmanager
def launches_left_out() -> Iterator[None]:
    """Nothing is launched again, and cuBLAS is not called."""
    from lowbit.kernels import launch

    multiplied = torch.empty(0)

    def scaled_mm(q: torch.Tensor, codes: torch.Tensor, *_: Any, out_dtype: torch.dtype, **__: Any) -> torch.Tensor:
        nonlocal multiplied
        if multiplied.shape != (q.shape[0], codes.shape[1]):
            multiplied = q.new_empty(q.shape[0], codes.shape[1], dtype=out_dtype)
        return multiplied

    with (
        mock.patch.object(launch.Replay, "again", done),
        mock.patch.object(torch, "_scaled_mm", scaled_mm),
    ):
        yield


def linear_row(choice: str, dynamic: bool, module: Any, rows: int) -> Row:
    """One linear as it is called, and its stages; ours has more of them."""
    from lowbit.host.weights.resident import weight_for
    from lowbit.ops.linear import quantized_linear
    from lowbit.ops.side_product import LowRankUpdate, SideProduct

    def held_for_nothing(module: Any, x: torch.Tensor) -> None:
        _, _, release = weight_for(module, x)
        if release is not None:
            release()

    dtype = module.weight.dtype if choice == BF16 else torch.bfloat16
    x = torch.randn(1, rows, module.in_features, device=DEVICE, dtype=dtype)
    call = microseconds(lambda: module(x))
    if choice == BF16:
        return Row(choice, dynamic, rows, call, {})
    stages = {"weight": microseconds(lambda: held_for_nothing(module, x))}
    weight, bias, release = weight_for(module, x)
    linear = microseconds(lambda: quantized_linear(x, weight, bias))
    without_bias = microseconds(lambda: quantized_linear(x, weight, None))
    with launches_left_out():
        prepared = microseconds(lambda: quantized_linear(x, weight, bias))
    if release is not None:
        release()
    stages |= {"choose and prepare": prepared, "launches": linear - prepared, "bias": linear - without_bias}
    stages["module"] = call - linear - stages["weight"]
    factors = [torch.randn(shape) for shape in ((module.out_features, LORA_RANK), (LORA_RANK, module.in_features))]
    module.side_product = SideProduct([LowRankUpdate(*factors, 0.5, 0)])
    module.side_product.keep(x.device, x.dtype)
    stages["LoRA"] = microseconds(lambda: module(x)) - call
    module.side_product = None
    return Row(choice, dynamic, rows, call, stages)


def step_milliseconds(model: Any, case: Case) -> float:
    """A whole step, between ComfyUI's sampler and its callback, that the GPU has next to nothing to do in."""
    times = sample(model, case, STEPS)[1]
    return round(1e3 * min(times[FIRST_TIMED:]), 2)


def rows_of(choice: str, dynamic: bool, path: Path, case: Case) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one format, and its step."""
    import comfy.model_management
    import comfy.sd

    from lowbit.host.weights.loading import load_diffusion_model
    from lowbit.host.weights.preparing import Request, plan_diffusion_model, prepared_file

    if choice == BF16:
        model = comfy.sd.load_diffusion_model(str(path), disable_dynamic=not dynamic)
    else:
        file = prepared_file(plan_diffusion_model(path, Request(choice)))
        model = load_diffusion_model(str(file), disable_dynamic=not dynamic)
    step = step_milliseconds(model, case)
    comfy.model_management.load_models_gpu([model])
    module = model.model.diffusion_model.get_submodule(LINEAR)
    if DEVICE != "cuda" and choice != BF16:
        # On a multiple of 16 bytes, and in bfloat16, as a GPU's are.
        module.weight._qdata = module.weight._qdata.clone()
        module.bias = torch.nn.Parameter(module.bias.bfloat16(), requires_grad=False)
    rows = [linear_row(choice, dynamic, module, count) for count in ROWS]
    comfy.model_management.unload_all_models()
    return rows, {"format": choice, "dynamic": dynamic, "step": step}


def goals(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Halved against `before`, where there is one, and no more than ComfyUI's own 16-bit linear and 10 us."""
    calls = {(row["format"], row["dynamic"], row["rows"]): row["call"] for row in record["rows"]}
    before = {(row["format"], row["dynamic"], row["rows"]): row["call"] for row in record.get("before", [])}
    entries = []
    for dynamic in sorted({row["dynamic"] for row in record["rows"]}):
        where = "dynamic VRAM" if dynamic else "no dynamic VRAM"
        for choice in FORMATS:
            ours = {rows: calls[choice, dynamic, rows] for rows in ROWS if (choice, dynamic, rows) in calls}
            more = [us - calls[BF16, dynamic, rows] for rows, us in ours.items() if (BF16, dynamic, rows) in calls]
            if more:
                entries.append(Goal(f"{choice}, {where}: more than bf16", 10, "us", at_most=True).judged(more))
            old = [us / before[choice, dynamic, rows] for rows, us in ours.items() if (choice, dynamic, rows) in before]
            if old:
                entries.append(Goal(f"{choice}, {where}: beside before", 0.5, "x", at_most=True).judged(old))
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="results of an earlier version, measured on the same machine")
    parser.add_argument("--format", nargs="*", choices=(BF16, *FORMATS), default=[BF16, *FORMATS])
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    record: dict[str, Any] = {"launched": DEVICE == "cuda", "rows": [], "steps": []}
    if arguments.before:
        earlier = json.loads(arguments.before.read_text())
        record |= {"before": earlier["rows"], "steps_before": earlier["steps"]}
    config = qwen_image.QwenImageConfig(heads=HEADS, layers=LAYERS, joint=JOINT)
    case = Case(f"Qwen-Image, {LAYERS} blocks", qwen_image.shapes(config), {"format": "pt"}, LATENT, (32, JOINT))
    with core_in_memory(DEVICE) as folder, nothing_launched():
        if DEVICE != "cuda":
            import testing.shims  # noqa: F401  ComfyUI then takes the tiny model's width
        path = write_checkpoint(folder / "qwen.safetensors", case.shapes, case.metadata)
        for dynamic in (True, False) if DEVICE == "cuda" else (False,):
            for choice in arguments.format:
                rows, step = rows_of(choice, dynamic, path, case)
                record["rows"] += [row.as_dict() for row in rows]
                record["steps"].append(step)
                for row in (*rows, step):
                    print(row, flush=True)
                write(out, record | {"environment": environment(), "goals": goals(record)})


if __name__ == "__main__":
    main()
