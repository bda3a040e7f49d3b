"""Quantized linears side by side: ours, F.linear, comfy-kitchen, torchao and gemlite, on the shapes of real models.

python -m benchmarks.linear --out benchmarks/results/linear.json [--only TEXT]
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from benchmarks import timing
from benchmarks.goals import write
from lowbit.ops.layouts import register_layouts
from lowbit.ops.linear import quantized_linear
from lowbit.ops.scratch import release_scratch
from testing.measure import environment, relative_error

register_layouts()

# format name: layout, options of its quantize, whether our fast product is measured
CONVROT = {"per_channel": True, "convrot": True}
FORMATS = {
    "fp8_e4m3fn_scaled": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}, False),
    "fp8_e4m3fn_scaled_fast": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}, True),
    "fp8_e5m2_scaled": ("TensorCoreFP8E5M2Layout", {"scale": "recalculate"}, False),
    "int8": ("TensorWiseINT8Layout", {"per_channel": True}, False),
    "int8_fast": ("TensorWiseINT8Layout", {"per_channel": True}, True),
    "int8_convrot_fast": ("TensorWiseINT8Layout", CONVROT, True),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, False),
    "mxfp8_fast": ("TensorCoreMXFP8Layout", {}, True),
    "fp4_scaled": ("TensorCoreNVFP4Layout", {}, False),
    "fp4_scaled_fast": ("TensorCoreNVFP4Layout", {}, True),
    "int4_convrot_fast": ("TensorCoreConvRotW4A4Layout", {}, True),
    "int4_asym_fast": ("AsymW4A8Int8Layout", {}, True),
}


@dataclass(frozen=True)
class Case:
    """One shape: what it stands for, M, K (in_features), N (out_features)."""

    name: str
    m: int
    k: int
    n: int


CASES = (
    Case("wan_qkv", 32760, 5120, 5120),
    Case("wan_ffn_up", 32760, 5120, 13824),
    Case("wan_ffn_down", 32760, 13824, 5120),
    Case("qwen_mlp_up", 4352, 3072, 12288),
    Case("qwen_mlp_down", 4352, 12288, 3072),
    Case("wan_text_kv", 512, 5120, 5120),
    Case("decode", 1, 4096, 14336),
    Case("decode", 16, 4096, 14336),
    Case("decode_down", 1, 14336, 4096),
    Case("decode_down", 16, 14336, 4096),
    Case("qwen_modulation", 1, 3072, 18432),
    Case("qwen_modulation", 2, 3072, 18432),
)


ERROR_ROWS = 128
"""The first ones, beside float64 with the unquantized weight."""
PEER_CASES = (("wan_qkv", 32760), ("decode", 1))
"""Cases (name, M) on which torchao and gemlite are measured too: they compile and tune for a minute for each."""


@dataclass
class Result:
    """One contender on one case; missing numbers are None and `note` says why."""

    case: str
    m: int
    k: int
    n: int
    format: str
    contender: str
    us: float | None = None
    tflops: float | None = None
    weight_bytes_per_second: float | None = None
    ratio_to_bf16: float | None = None
    extra_peak_mib: float | None = None
    relative_error: float | None = None
    note: str = ""


def activations(m: int, k: int) -> torch.Tensor:
    """bfloat16 Gaussians with one channel in 128 thirty times as large, as diffusion transformers have them.

    Evenly spread, so that comfy-kitchen's errors are known: 5.8e-2 of INT8 by rows, 1.2e-2 of convrot.
    """
    x = _drawn(m, k)
    x[:, random.randrange(128) :: 128] *= 30
    return x


def weights(case: Case) -> list[torch.Tensor]:
    """bfloat16 weights; for small M as many as it takes to fall out of the L2 cache."""
    count = 1 if case.m > 512 else 4
    return [_drawn(case.n, case.k) * 0.02 for _ in range(count)]


@functools.cache
def _generator() -> torch.Generator:
    """Not PyTorch's own, which draws no more once a peer has failed to be captured."""
    return torch.Generator("cuda").manual_seed(0)


def _drawn(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=_generator(), device="cuda", dtype=torch.bfloat16)


def kitchen_call(x: torch.Tensor, weight: QuantizedTensor, fast: bool) -> Callable[[], torch.Tensor]:
    """What ComfyUI's Linear does with this weight: quantize x in the layout with a dynamic scale, or hand x over."""
    if fast and weight._layout_cls in ("TensorCoreFP8E4M3Layout", "TensorCoreMXFP8Layout", "TensorCoreNVFP4Layout"):
        options = {"scale": "recalculate"} if weight._layout_cls != "TensorCoreMXFP8Layout" else {}
        return lambda: F.linear(QuantizedTensor.from_float(x, weight._layout_cls, **options), weight)
    if fast or weight._layout_cls not in ("TensorWiseINT8Layout",):
        return lambda: F.linear(x, weight)
    return lambda: F.linear(x, weight.dequantize())


def plain_linear(weight: torch.Tensor) -> torch.nn.Linear:
    """What the peers quantize."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="cuda", dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    return linear


def torchao_linear(name: str, weight: torch.Tensor) -> torch.nn.Module | None:
    """The same kind of linear by torchao, compiled as its users run it; None where it has none.

    Its Int8WeightOnlyConfig (0.18, compiled) took 1.9 s for one 32760 x 5120 x 5120 product, so it is left out.
    """
    quantization = importlib.import_module("torchao.quantization")
    configs = {
        "fp8_e4m3fn_scaled_fast": lambda: quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow()
        ),
        "fp8_e4m3fn_scaled": quantization.Float8WeightOnlyConfig,
        "int8_fast": quantization.Int8DynamicActivationInt8WeightConfig,
    }
    if name not in configs:
        return None
    holder = torch.nn.Sequential(plain_linear(weight))
    quantization.quantize_(holder, configs[name]())
    return torch.compile(holder, fullgraph=False)


def gemlite_linear(name: str, weight: torch.Tensor) -> torch.nn.Module | None:
    """The same kind of linear by gemlite; None where it has none that is safe on this GPU."""
    helper = importlib.import_module("gemlite.helper")
    processors = {
        "fp8_e4m3fn_scaled": helper.A16W8_FP8,
        "fp8_e4m3fn_scaled_fast": helper.A8W8_FP8_dynamic,
        "int8": helper.A16W8_INT8,
        "int8_fast": helper.A8W8_INT8_dynamic,
    }
    if name not in processors:
        return None
    return processors[name](device="cuda:0", dtype=weight.dtype).from_linear(plain_linear(weight), del_orig=False)


class Bench:
    """Measures the cases one by one and keeps the results."""

    def __init__(self, peers: tuple[str, ...]) -> None:
        self.peers = peers
        self.results: list[Result] = []
        self.refused: dict[str, str] = {}

    def run(self, case: Case) -> None:
        """Every format and contender of `case`, measured in turn."""
        x, plain = activations(case.m, case.k), weights(case)
        calls = {("bf16", "F.linear"): [lambda w=w: F.linear(x, w) for w in plain]}
        for name, (layout, options, fast) in FORMATS.items():
            stored = [QuantizedTensor.from_float(w, layout, **options) for w in plain]
            calls[name, "lowbit"] = [lambda w=w, f=fast: quantized_linear(x, w, fast=f) for w in stored]
            calls[name, "comfy-kitchen"] = [kitchen_call(x, w, fast) for w in stored]
            for peer, make in (("torchao", torchao_linear), ("gemlite", gemlite_linear)):
                if peer in self.peers and (case.name, case.m) in PEER_CASES:
                    self._add_peer(calls, peer, make, name, x, plain)
        results = {key: self._first_call(case, *key, call, x, plain) for key, call in calls.items()}
        calls = {key: call for key, call in calls.items() if results[key].note == ""}
        self._time(case, calls, results)
        self.results += results.values()

    def _add_peer(self, calls: dict, peer: str, make: Callable, name: str, x: torch.Tensor, plain: list) -> None:
        if peer in self.refused:
            return
        try:
            modules = [make(name, w) for w in plain]
            if modules[0] is not None:
                calls[name, peer] = [lambda module=module: module(x) for module in modules]
        except Exception as error:
            self.refused[peer] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    def _first_call(
        self, case: Case, name: str, contender: str, calls: list, x: torch.Tensor, plain: list[torch.Tensor]
    ) -> Result:
        result = Result(case.name, case.m, case.k, case.n, name, contender)
        try:
            with torch.no_grad():
                exact = x[:ERROR_ROWS].double() @ plain[0].double().t()
                result.relative_error = relative_error(calls[0]()[:ERROR_ROWS], exact)
                result.extra_peak_mib = timing.extra_peak(calls[0]) / 2**20
        except Exception as error:
            result.note = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return result

    def _time(self, case: Case, calls: dict, results: dict[tuple[str, str], Result]) -> None:
        measures = {}
        for key, call in calls.items():
            try:
                with torch.no_grad():
                    if case.m > 1024:
                        count = max(12, int(1e5 / max(timing.event_times(call, 3))))
                        measures[key] = lambda call=call, count=count: timing.event_times(call, count)[count // 2 :]
                    else:
                        graph, count = timing.capture(call)
                        measures[key] = lambda graph=graph, count=count: timing.replay_times(graph, count, 5)
            except Exception as error:
                results[key].note = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                torch.cuda.synchronize()
        # For large products a round lasts 100 ms and only its second half counts: a GPU that has just cooled down while
        # another contender waited for memory is faster for a few milliseconds than it will ever be again.
        with torch.no_grad():
            medians = timing.interleaved(measures, rounds=4)
            if case.m > 1024:
                self._pair(calls, results)
        for key, us in medians.items():
            result = results[key]
            result.us = us
            result.tflops = 2e-6 * case.m * case.k * case.n / us
            result.weight_bytes_per_second = case.k * case.n * _bits(key[0]) / 8 / (us * 1e-6)
            if case.m <= 1024:
                result.ratio_to_bf16 = us / medians["bf16", "F.linear"]

    def _pair(self, calls: dict, results: dict[tuple[str, str], Result]) -> None:
        """Time over bf16's, the two called in turn, so that both run at the clocks the power limit leaves them."""
        plain = calls["bf16", "F.linear"][0]
        for key, call in calls.items():
            if key[1] == "lowbit" and not results[key].note:
                times = timing.event_times([plain, call[0]], 32)[8:]
                results[key].ratio_to_bf16 = statistics.median(times[1::2]) / statistics.median(times[::2])


def _bits(name: str) -> float:
    """Stored bits of a weight, block scales among them."""
    return 16 if name == "bf16" else 4.5 if name.startswith("fp4") else 4 if name.startswith("int4") else 8


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose name or M contains this text")
    parser.add_argument("--peers", default="torchao,gemlite", help="peers beside comfy-kitchen, by comma; '' for none")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # comfy-kitchen reports a cuBLAS error for every MXFP8 and NVFP4 product
    random.seed(0)
    bench = Bench(tuple(filter(None, arguments.peers.split(","))))
    for case in CASES:
        if arguments.only not in f"{case.name} {case.m}":
            continue
        began = time.monotonic()
        bench.run(case)
        print(f"{case}: {time.monotonic() - began:.0f} s", flush=True)
        release_scratch()
        torch.cuda.empty_cache()
        record = {
            "environment": environment(),
            "refused_peers": bench.refused,
            "results": [asdict(r) for r in bench.results],
        }
        write(arguments.out, record)


if __name__ == "__main__":
    main()
