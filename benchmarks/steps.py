"""Whole steps of ComfyUI itself at real dimensions with fewer blocks: stock, stock with quantized files, and this pack.

    python -m benchmarks.steps --out benchmarks/results/steps.json [--model wan480 wan720 qwen] [--only NAME ...]
    python -m benchmarks.steps --compile --out benchmarks/results/compile.json --model qwen

Everything runs in one process, without the server. Weights are random at the scale of a trained model's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import write_checkpoint
from benchmarks.goals import Goal, write
from testing.core import start_core
from testing.measure import environment, relative_error
from testing.tiny import qwen_image, wan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 5
FIRST_TIMED = 2
CFG = 5.0
KERNELS_LISTED = 12


@dataclass(frozen=True)
class Case:
    """A model with fewer blocks, and what it samples. context: tokens and width of the text."""

    title: str
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    latent: tuple[int, ...]
    context: tuple[int, int]


def wan_case(size: str, layers: int, latent: tuple[int, ...]) -> Case:
    """Wan 14B with fewer blocks."""
    config = wan.WanConfig(dim=5120, ffn=13824, heads=40, layers=layers, text=4096)
    title = f"Wan 14B, {size}, {layers} of 40 blocks"
    return Case(title, wan.shapes(config), config.metadata(), latent, (512, 4096))


def _qwen(title: str, layers: int, latent: tuple[int, ...]) -> Case:
    config = qwen_image.QwenImageConfig(heads=24, layers=layers, joint=3584)
    return Case(title, qwen_image.shapes(config), {"format": "pt"}, latent, (128, 3584))


CASES: dict[str, Callable[[], Case]] = {
    "wan480": lambda: wan_case("832x480x81", 8, (1, 16, 21, 60, 104)),
    "wan720": lambda: wan_case("1280x720x81", 4, (1, 16, 21, 90, 160)),
    "qwen": lambda: _qwen("Qwen-Image, 1328x1328, 15 of 60 blocks", 15, (1, 16, 1, 166, 166)),
}


@dataclass(frozen=True)
class Contender:
    """A model as somebody would load it.

    Attributes:
        weights: a format of the loaders, None for the bf16 file.
        stock: ComfyUI's own loader.
        attention: the error budget of Attention (Lowbit), None without it.
        profiled: list its kernels.
        dynamic: with dynamic VRAM.
        compiled: "model" as ComfyUI's TorchCompileModel does it, which switches dynamic VRAM off; "blocks" one by one.
    """

    name: str
    weights: str | None
    stock: bool
    attention: str | None = None
    profiled: bool = False
    dynamic: bool = True
    compiled: str = ""


FP8, INT8 = "fp8_e4m3fn_scaled_fast", "int8_convrot_fast"
STOCK, STOCK_FP8 = "stock, bf16", "stock, our FP8 file"
CONTENDERS = (
    Contender(STOCK, None, True, profiled=True),
    Contender(STOCK_FP8, FP8, True),
    Contender("stock, our INT8 file", INT8, True),
    Contender("bf16, attention fast", None, True, "fast"),
    Contender("auto", "auto", False),
    Contender("auto, attention exact", "auto", False, "exact"),
    Contender("auto, attention fast", "auto", False, "fast", profiled=True),
    Contender("FP8, attention fast", FP8, False, "fast", profiled=True),
)
WITHOUT_DYNAMIC, COMPILED, BY_BLOCK = ", no dynamic VRAM", ", compiled", ", compiled by block"
INT8_FAST = Contender("INT8, attention fast", INT8, False, "fast", profiled=True)
VARIED = (CONTENDERS[0], CONTENDERS[-1], INT8_FAST)
CONTENDERS_COMPILED = tuple(
    replace(contender, name=contender.name + suffix, **options)
    for suffix, options, contenders in (
        ("", {}, VARIED),
        # Of stock, compiling takes minutes: its own layers end a graph, every one of them.
        (BY_BLOCK, {"compiled": "blocks"}, VARIED[1:]),
        (WITHOUT_DYNAMIC, {"dynamic": False}, VARIED),
        (COMPILED, {"compiled": "model"}, VARIED[::-1]),
    )
    for contender in contenders
)
"""For `--compile`."""
# model, contender, beside, times as fast
GOALS = (
    ("wan480", "auto, attention fast", "stock, bf16", 2.2),
    ("wan480", "FP8, attention fast", "stock, bf16", 2.0),
    ("wan480", "FP8, attention fast", "stock, our FP8 file", 1.75),
    ("wan720", "auto, attention fast", "stock, bf16", 2.3),
    ("wan720", "FP8, attention fast", "stock, our FP8 file", 2.0),
    ("qwen", "auto, attention fast", "stock, bf16", 1.75),
    ("qwen", "FP8, attention fast", "stock, bf16", 1.75),
    *(
        (model, name + suffix, name, factor)
        for model, factor in (("qwen", 1.15), ("wan480", 1.05))
        for name in ("FP8, attention fast", "INT8, attention fast")
        for suffix in (COMPILED, BY_BLOCK)
    ),
)


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals of the models that were run."""
    seconds = {(row["case"], row["contender"]): row["seconds"] for row in rows if "seconds" in row}
    entries = []
    for model, contender, beside, factor in GOALS:
        ours, theirs = seconds.get((model, contender)), seconds.get((model, beside))
        if ours and theirs:
            entries.append(Goal(f"{model}, {contender}, beside {beside}", factor, "x").judged([theirs / ours]))
    return entries


def load(contender: Contender, path: Path, timings: Path) -> Any:
    """The model as the contender's loader and attention node make it, and the name of its format."""
    import comfy.sd

    from lowbit.attention.candidates import Policy
    from lowbit.attention.schedule import Schedule
    from lowbit.host.attention.installing import install_override
    from lowbit.host.weights.loading import load_diffusion_model
    from lowbit.host.weights.preparing import Request, plan_diffusion_model, prepared_file

    choice = "bf16"
    if contender.weights is not None:
        planned = plan_diffusion_model(path, Request(contender.weights))
        path, choice = prepared_file(planned), planned.choice.split(":")[0]
    load_file = comfy.sd.load_diffusion_model if contender.stock else load_diffusion_model
    model = load_file(str(path), disable_dynamic=not contender.dynamic)
    if contender.attention is not None:
        model = install_override(model, Policy("auto", contender.attention), Schedule(), True, timings)[0]
    return compiled(model, contender.compiled), choice


def compiled(model: Any, what: str) -> Any:
    """A clone of which "model" or "blocks" are compiled, by ComfyUI's own function; "": the model itself."""
    if not what:
        return model
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    clone = model.clone(disable_dynamic=what == "model")
    network, keys = clone.model.diffusion_model, ["diffusion_model"]
    if what == "blocks":
        name = next(name for name in ("transformer_blocks", "blocks") if hasattr(network, name))
        keys = [f"diffusion_model.{name}.{index}" for index in range(len(getattr(network, name)))]
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(clone, backend="inductor", options=options, keys=keys)
    return clone


def with_speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with how many times as fast as the stock rows of its case it is."""
    seconds = {(row["case"], row["contender"]): row["seconds"] for row in rows if "seconds" in row}
    for row in rows:
        for key, beside in (("speedup", STOCK), ("speedup_over_fp8", STOCK_FP8)):
            theirs = seconds.get((row["case"], beside))
            if theirs and "seconds" in row:
                row[key] = round(theirs / row["seconds"], 3)
    return rows


def sample(model: Any, case: Case, steps: int) -> tuple[torch.Tensor, list[float]]:
    """The latent, and the seconds of each step, from one callback to the next."""
    import comfy.sample

    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(case.latent, generator=generator)
    texts = [[[torch.randn(1, *case.context, generator=generator), {}]] for _ in range(2)]
    ends: list[float] = []

    def ended(*_: Any) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    ended()
    latent = comfy.sample.sample(
        model, noise, steps, CFG, "euler", "simple", *texts, torch.zeros_like(noise), seed=5, callback=ended,
        disable_pbar=True,
    )  # fmt: skip
    return latent.float().cpu(), [after - before for before, after in zip(ends, ends[1:], strict=False)]


def kernels(model: Any, case: Case) -> dict[str, float]:
    """Milliseconds of GPU time by kernel in two steps, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        sample(model, case, 2)
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        spent[event.key] += event.self_device_time_total / 1e3
    ordered = sorted(((name, ms) for name, ms in spent.items() if ms), key=lambda item: -item[1])
    table = {name[:100]: round(ms, 2) for name, ms in ordered[:KERNELS_LISTED]}
    return {"all": round(sum(ms for _, ms in ordered), 2)} | table


@contextlib.contextmanager
def core_in_memory(device: str) -> Iterator[Path]:
    """ComfyUI's core in this process, and a folder for it, in main memory where the system has one there."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        os.environ["LOWBIT_CACHE_DIR"] = str(Path(folder) / "cache")
        start_core(["--base-directory", folder, *([] if device == "cuda" else ["--cpu"])])
        with torch.inference_mode():
            yield Path(folder)


def clean() -> None:
    """No model stays in this process's GPU."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def run(
    name: str, case: Case, contender: Contender, path: Path, folder: Path, exact: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """One row of the results. exact: the latent of stock bf16 by case, filled when it is that one's turn."""
    from lowbit.host.attention.installing import find_override

    started = time.perf_counter()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, choice = load(contender, path, folder)
    latent, times = sample(model, case, STEPS)
    want = exact.setdefault(name, latent) if contender.name == STOCK else exact.get(name)
    row: dict[str, Any] = {
        "case": name,
        "model": case.title,
        "contender": contender.name,
        "weights": choice,
        "seconds": statistics.median(times[FIRST_TIMED:]),
        "first_step": times[0],
        "steps": times,
        "error": None if want is None else relative_error(latent, want),
    }
    if contender.compiled:
        counters = torch._dynamo.utils.counters
        breaks = {reason.splitlines()[0]: count for reason, count in counters["graph_break"].items()}
        row |= {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}
    if DEVICE == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    override = find_override(model)
    if override is not None:
        row["attention"] = override.report()["calls"]
    if contender.profiled and DEVICE == "cuda":
        row["kernels_of_two_steps_ms"] = kernels(model, case)
    row["whole"] = time.perf_counter() - started
    del model, override
    clean()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--compile", action="store_true", help="with and without torch.compile and dynamic VRAM")
    parser.add_argument("--only", nargs="*", help="names of contenders")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    # What was measured of other models stays.
    before = json.loads(out.read_text())["rows"] if out.exists() else []
    rows: list[dict[str, Any]] = [row for row in before if row["case"] not in arguments.model]
    exact: dict[str, torch.Tensor] = {}
    with core_in_memory(DEVICE) as folder:
        for name in arguments.model:
            case = CASES[name]()
            path = write_checkpoint(folder / f"{name}.safetensors", case.shapes, case.metadata)
            for contender in CONTENDERS_COMPILED if arguments.compile else CONTENDERS:
                if arguments.only and contender.name not in arguments.only:
                    continue
                try:
                    row = run(name, case, contender, path, folder, exact)
                except Exception as error:
                    row = {"case": name, "contender": contender.name, "failed": f"{type(error).__name__}: {error}"}
                rows.append(row)
                print(json.dumps(row), flush=True)
                rows = with_speedups(rows)
                record = {"environment": environment(), "rows": rows, "goals": goals(rows)}
                write(out, record)
            path.unlink()


if __name__ == "__main__":
    main()
