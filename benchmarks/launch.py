"""What a quantized linear takes of the processor, by stage, beside ComfyUI's own 16-bit one; and so a whole step.

    python -m benchmarks.launch --out benchmarks/results/launch.json [--before OTHER.json]

Linears and steps are those of a Qwen-Image model of real width that ComfyUI has loaded, with dynamic VRAM and without.
The GPU's work is not waited for. Without a GPU the model is tiny and nothing is launched: products return what they
would have written, so only what Python does before counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
    """Microseconds of the processor for one linear called once; stages are parts of `call`, as far as they can be told.

    bf16: ComfyUI's own linear in 16 bits, by turns with this one; None without a GPU, where it is multiplied.
    """

    format: str
    dynamic: bool
    rows: int
    call: float
    bf16: float | None
    stages: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """As it is written."""
        stages = {name: round(us, 2) for name, us in self.stages.items()}
        return dataclasses.asdict(self) | {"stages": stages}


def wait() -> None:
    """For the GPU, where there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def microseconds(*calls: Callable[[], object]) -> list[float]:
    """What each of `calls` takes to return: the least median of some rounds, since another program's turn makes others slower.

    They take turns, so that a slower minute is everybody's. The GPU's queue never runs full.
    """
    medians: list[list[float]] = [[] for _ in calls]
    for number in range(-1, ROUNDS):
        for call, found in zip(calls, medians, strict=True):
            wait()
            times = []
            for _ in range(CALLS):
                started = time.perf_counter_ns()
                call()
                times.append(time.perf_counter_ns() - started)
            if number >= 0:
                found.append(statistics.median(times))
    wait()
    return [round(min(found) / 1e3, 2) for found in medians]


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
    from lowbit.kernels import join_heads, launch, matmul_hopper, matmul_rows, modulate_rows, normalize, rope
    from lowbit.ops import linear, linear_8bit, linear_few_rows, scratch
    from lowbit.ops.linear_table import Gpu

    compiled = launch._Launch(nothing, (None,) * 9, (), (None,) * 3)
    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (launch, "_DIRECT", True),
        (launch, "_hooked", lambda: False),
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
    elementwise = (join_heads, modulate_rows, normalize, rope)
    stand_ins += tuple((module, "kernels_run_on", lambda x: True) for module in elementwise)
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


def linear_row(choice: str, dynamic: bool, module: Any, core: Any, rows: int) -> Row:
    """One linear as it is called, and its stages; ours has more of them. core: ComfyUI's own of the same sizes, or None."""
    from lowbit.host.weights.resident import weight_for
    from lowbit.ops.linear import quantized_linear
    from lowbit.ops.side_product import LowRankUpdate, SideProduct

    def held_for_nothing() -> None:
        _, _, release = weight_for(module, x)
        if release is not None:
            release()

    dtype = module.weight.dtype if choice == BF16 else torch.bfloat16
    x = torch.randn(1, rows, module.in_features, device=DEVICE, dtype=dtype)
    if choice == BF16:
        (call,) = microseconds(lambda: module(x))
        return Row(choice, dynamic, rows, call, call, {})
    weight, bias, release = weight_for(module, x)
    call, held, linear, without_bias, *others = microseconds(
        lambda: module(x),
        held_for_nothing,
        lambda: quantized_linear(x, weight, bias),
        lambda: quantized_linear(x, weight, None),
        *([] if core is None else [lambda: core(x)]),
    )
    with launches_left_out():
        (prepared,) = microseconds(lambda: quantized_linear(x, weight, bias))
    if release is not None:
        release()
    stages = {"weight": held, "choose and prepare": prepared, "launches": linear - prepared}
    stages |= {"bias": linear - without_bias, "module": call - linear - held}
    factors = [torch.randn(shape) for shape in ((module.out_features, LORA_RANK), (LORA_RANK, module.in_features))]
    module.side_product = SideProduct([LowRankUpdate(*factors, 0.5, 0)])
    module.side_product.keep(x.device, x.dtype)
    stages["LoRA"] = microseconds(lambda: module(x))[0] - call
    module.side_product = None
    return Row(choice, dynamic, rows, call, others[0] if others else None, stages)


def step_of(model: Any, case: Case) -> dict[str, Any]:
    """Milliseconds of a whole step, between ComfyUI's sampler and its callback, that the GPU has next to nothing to do in.

    anew: how often what launches went the long way, through Triton's front end, in a run after the first.
    """
    from lowbit.kernels import launch

    # The first run's file is looked through for what are no numbers, beside its steps.
    sample(model, case, 1)
    with mock.patch.object(launch.Replay, "record", autospec=True, side_effect=launch.Replay.record) as recorded:
        times = sample(model, case, STEPS)[1]
    return {"step": round(1e3 * min(times[FIRST_TIMED:]), 2), "anew": recorded.call_count}


def lay_as_on_a_gpu(model: torch.nn.Module) -> None:
    """Every weight on a multiple of 16 bytes, as a GPU's are and a file's are not."""
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            if not hasattr(weight, "_qdata"):
                module._parameters[name] = torch.nn.Parameter(weight.clone(), requires_grad=False)
                continue
            params = {key: value for key, value in vars(weight._params).items() if isinstance(value, torch.Tensor)}
            weight._qdata = weight._qdata.clone()
            weight._params = dataclasses.replace(
                weight._params, **{key: value.clone() for key, value in params.items()}
            )


def rows_of(choice: str, dynamic: bool, path: Path, case: Case) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one format, and its step."""
    import comfy.model_management
    import comfy.sd

    from lowbit.host.weights.loading import load_diffusion_model
    from lowbit.host.weights.preparing import Request, plan_diffusion_model, prepared_file

    load_core = partial(comfy.sd.load_diffusion_model, str(path), disable_dynamic=not dynamic)
    if choice == BF16:
        model = load_core()
    else:
        file = prepared_file(plan_diffusion_model(path, Request(choice)))
        model = load_diffusion_model(str(file), disable_dynamic=not dynamic)
    if DEVICE != "cuda":
        lay_as_on_a_gpu(model.model.diffusion_model)
    step = step_of(model, case)
    core = model if choice == BF16 else load_core()
    comfy.model_management.load_models_gpu([model, core])
    module, plain = (one.model.diffusion_model.get_submodule(LINEAR) for one in (model, core))
    if DEVICE != "cuda" and choice != BF16:
        # In bfloat16, as a GPU's is.
        module.bias = torch.nn.Parameter(module.bias.bfloat16(), requires_grad=False)
    rows = [linear_row(choice, dynamic, module, plain if DEVICE == "cuda" else None, count) for count in ROWS]
    comfy.model_management.unload_all_models()
    return rows, {"format": choice, "dynamic": dynamic, **step}


def goals(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Halved against `before`, where there is one; no more than ComfyUI's own 16-bit linear and 10 us; nothing anew."""
    before = {(row["format"], row["dynamic"], row["rows"]): row["call"] for row in record.get("before", [])}
    entries = []
    for dynamic in sorted({row["dynamic"] for row in record["rows"]}):
        where = "dynamic VRAM" if dynamic else "no dynamic VRAM"
        for choice in FORMATS:
            rows = [row for row in record["rows"] if (row["format"], row["dynamic"]) == (choice, dynamic)]
            more = [row["call"] - row["bf16"] for row in rows if row["bf16"] is not None]
            if more:
                entries.append(Goal(f"{choice}, {where}: more than bf16", 10, "us", at_most=True).judged(more))
            keys = [(choice, dynamic, row["rows"]) for row in rows]
            old = [row["call"] / before[key] for row, key in zip(rows, keys, strict=True) if key in before]
            if old:
                entries.append(Goal(f"{choice}, {where}: beside before", 0.5, "x", at_most=True).judged(old))
    anew = [step["anew"] for step in record.get("steps", []) if "anew" in step]
    if anew:
        entries.append(Goal("launches of a later run that are looked for anew", 0, "", at_most=True).judged(anew))
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
