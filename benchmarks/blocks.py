"""Whole transformer blocks, random weights of the real sizes, per format: bf16, ours and ComfyUI core's own path.

python benchmarks/blocks.py --out benchmarks/results/blocks.json [--only wan]
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy_kitchen as ck
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent))

import timing  # noqa: E402
from goals import write  # noqa: E402
from linear import FORMATS  # noqa: E402

from lowbit.ops.layouts import register_layouts  # noqa: E402
from lowbit.ops.linear import quantized_linear, release_scratch  # noqa: E402

register_layouts()

# multiply(x, layer name, activation) -> act(x) @ W.T + b
Multiply = Callable[[torch.Tensor, str, str | None], torch.Tensor]


@dataclass(frozen=True)
class Block:
    """A block's linears by name, (in_features, out_features), and its forward."""

    name: str
    linears: dict[str, tuple[int, int]]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    forward: Callable[..., torch.Tensor]


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(tokens, heads x 128) each, one batch; the same backend for every contender."""
    q, k, v = (t.view(1, t.shape[0], -1, 128).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(q.shape[2], -1)


def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


WAN, WAN_FFN, WAN_TOKENS, TEXT_TOKENS = 5120, 13824, 32760, 512
QWEN, QWEN_FFN, QWEN_TOKENS, QWEN_TEXT = 3072, 12288, 4096, 256


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _wan_forward(multiply: Multiply, x: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
    shift, scale, gate, shift_two, scale_two, gate_two = modulation.unbind(0)
    y = _modulated(x, shift, scale)
    q, k, v = (multiply(y, f"self_attn.{part}", None) for part in "qkv")
    x = torch.addcmul(x, multiply(_attention(q, k, v), "self_attn.o", None), gate)
    q = multiply(F.layer_norm(x, x.shape[-1:]), "cross_attn.q", None)
    k, v = (multiply(text, f"cross_attn.{part}", None) for part in "kv")
    x = x + multiply(_attention(q, k, v), "cross_attn.o", None)
    y = multiply(_modulated(x, shift_two, scale_two), "ffn.0", None)
    return torch.addcmul(x, multiply(y, "ffn.2", "gelu_tanh"), gate_two)


def _qwen_forward(multiply: Multiply, image: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    streams, outputs, projected = {"img": image, "txt": text}, [], []
    parts = {name: multiply(time, f"{name}_mod", "silu").view(6, -1).unbind(0) for name in streams}
    for name, x in streams.items():
        y = _modulated(x, parts[name][0], parts[name][1])
        projected.append([multiply(y, f"{name}.{part}", None) for part in "qkv"])
    joint = _attention(*(torch.cat(pair) for pair in zip(*projected, strict=True)))
    for (name, x), y in zip(streams.items(), joint.split([image.shape[0], text.shape[0]]), strict=True):
        mod = parts[name]
        x = torch.addcmul(x, multiply(y, f"{name}.o", None), mod[2])
        y = multiply(_modulated(x, mod[3], mod[4]), f"{name}_mlp.0", None)
        outputs.append(torch.addcmul(x, multiply(y, f"{name}_mlp.2", "gelu_tanh"), mod[5]))
    return torch.cat(outputs)


def _wan_linears() -> dict[str, tuple[int, int]]:
    square = {f"{kind}.{part}": (WAN, WAN) for kind in ("self_attn", "cross_attn") for part in "qkvo"}
    return square | {"ffn.0": (WAN, WAN_FFN), "ffn.2": (WAN_FFN, WAN)}


def _qwen_linears() -> dict[str, tuple[int, int]]:
    linears = {}
    for stream in ("img", "txt"):
        linears |= {f"{stream}_mod": (QWEN, 6 * QWEN)} | {f"{stream}.{part}": (QWEN, QWEN) for part in "qkvo"}
        linears |= {f"{stream}_mlp.0": (QWEN, QWEN_FFN), f"{stream}_mlp.2": (QWEN_FFN, QWEN)}
    return linears


BLOCKS = (
    Block(
        "wan_14b",
        _wan_linears(),
        lambda: (_random(WAN_TOKENS, WAN), _random(TEXT_TOKENS, WAN), _random(6, WAN) * 0.1),
        _wan_forward,
    ),
    Block(
        "qwen_image",
        _qwen_linears(),
        lambda: (_random(QWEN_TOKENS, QWEN), _random(QWEN_TEXT, QWEN), _random(1, QWEN)),
        _qwen_forward,
    ),
)


def _activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation is None:
        return x
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def core_linear(
    x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor, activation: str | None, fast: bool
) -> torch.Tensor:
    """What ComfyUI 0.33's quantized Linear does: dynamic scales where it has them, the activation fused for INT8."""
    layout = weight._layout_cls
    if layout == "TensorWiseINT8Layout" and fast and activation != "silu":
        options = {"convrot": weight._params.convrot, "convrot_groupsize": weight._params.convrot_groupsize}
        return ck.int8_linear(x, weight._qdata, weight._params.scale, bias, x.dtype, input_act=activation, **options)
    x = _activated(x, activation)
    if fast and layout in ("TensorCoreFP8E4M3Layout", "TensorCoreMXFP8Layout", "TensorCoreNVFP4Layout"):
        options = {} if layout == "TensorCoreMXFP8Layout" else {"scale": "recalculate"}
        x = QuantizedTensor.from_float(x, layout, **options)
    elif not fast and layout == "TensorWiseINT8Layout":
        return F.linear(x, weight.dequantize(), bias)
    return F.linear(x, weight, bias)


def contenders(block: Block, name: str, plain: dict, biases: dict) -> dict[str, Multiply]:
    """Ours and core's way to multiply with the block's weights in one format ("bf16": F.linear)."""
    if name == "bf16":
        return {
            "F.linear": lambda x, layer, activation: F.linear(_activated(x, activation), plain[layer], biases[layer])
        }
    layout, options, fast = FORMATS[name]
    stored = {layer: QuantizedTensor.from_float(weight, layout, **options) for layer, weight in plain.items()}
    return {
        "lowbit": lambda x, layer, activation: quantized_linear(
            x, stored[layer], biases[layer], fast=fast, activation=activation
        ),
        "core": lambda x, layer, activation: core_linear(x, stored[layer], biases[layer], activation, fast),
    }


@torch.no_grad()
def run(block: Block, rounds: int) -> list[dict]:
    """Time, extra peak memory and error of every format on one block."""
    plain = {layer: _random(n, k) * 0.02 for layer, (k, n) in block.linears.items()}
    biases = {layer: _random(n) * 0.02 for layer, (_, n) in block.linears.items()}
    inputs = block.inputs()
    calls, records, reference = {}, {}, None
    for name in ("bf16", *FORMATS):
        for contender, multiply in contenders(block, name, plain, biases).items():
            record = {"block": block.name, "format": name, "contender": contender}
            records[name, contender] = record
            try:
                call = lambda multiply=multiply: block.forward(multiply, *inputs)  # noqa: E731
                out = call().float()
                reference = out if reference is None else reference
                record["difference_from_bf16"] = ((out - reference).norm() / reference.norm()).item()
                release_scratch()
                record["extra_peak_mib"] = timing.extra_peak(call) / 2**20
                calls[name, contender] = lambda call=call: timing.event_times([call], 6)[2:]
            except Exception as error:
                record["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                torch.cuda.synchronize()
    for key, us in timing.interleaved(calls, rounds).items():
        records[key]["ms"] = us / 1e3
    base = records["bf16", "F.linear"]["ms"]
    for record in records.values():
        if "ms" in record:
            record["speedup_over_bf16"] = base / record["ms"]
            print(
                f"{record['block']:11s} {record['format']:24s} {record['contender']:9s} {record['ms']:8.2f} ms "
                f"{record['speedup_over_bf16']:5.2f} x  peak {record['extra_peak_mib']:8.1f} MiB  "
                f"difference {record['difference_from_bf16']:.1e}"
            )
        else:
            print(record)
    return list(records.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="blocks whose name contains this text")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # comfy-kitchen reports a cuBLAS error for every MXFP8 and NVFP4 product
    torch.manual_seed(0)
    results = []
    for block in BLOCKS:
        if arguments.only in block.name:
            results += run(block, arguments.rounds)
            torch.cuda.empty_cache()
    shapes = {block.name: {layer: list(size) for layer, size in block.linears.items()} for block in BLOCKS}
    record = {"environment": timing.environment(), "linears": shapes, "results": results}
    write(arguments.out, record)


if __name__ == "__main__":
    main()
