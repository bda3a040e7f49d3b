"""GGUF: how fast a file is converted, and how fast its layers then multiply, beside decoding at every call.

python -m benchmarks.gguf_files --out benchmarks/results/gguf.json [--peer COMFYUI_GGUF_FOLDER]

The peer's own `dequant.py` decodes where its folder is named; else this pack's decoder does, as its node pack would.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import torch

from benchmarks.goals import Goal, write
from benchmarks.timing import event_times
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.gguf_decode import decode
from lowbit.ops.linear import quantized_linear
from lowbit.ops.plan import make_plan
from lowbit.ops.quantize import quantize_to_tensor
from lowbit.ops.stream import quantize_checkpoint
from testing.measure import environment, relative_error

KINDS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
TARGET = "int8_convrot_fast"
ROWS = (1, 16, 32760)
LAYER = (13824, 5120)
FEW = 16
SHARES = {"Q8_0": 70}
K_SHARE = 40
COPIES = {
    "share_of_flushed_copy": "that is on the disk as well",
    "share_of_copy": "that may be in memory still",
}
"""Converting ends when the disk has the file: `cp` does not wait for that."""
ROUNDS = 3


def raw_blocks(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """Random codes under scales near those of weights."""
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = torch.randint(0, 256, (shape[0] * shape[1] // values, nbytes), dtype=torch.uint8)
    scales = {"Q8_0": (0,), "Q6_K": (208,), "Q5_K": (0, 2), "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82)}[kind]
    for start in scales:
        small = torch.full((blocks.shape[0], 1), 1e-3, dtype=torch.float16)
        blocks[:, start : start + 2] = small.view(torch.uint8)
    return blocks


def write_source(path: Path, kind: str, layers: int) -> int:
    """A file of `layers` matrices; returns the bytes of their blocks."""
    writer, total = gguf.GGUFWriter(path, "wan"), 0
    raw = raw_blocks(kind, LAYER).numpy()
    for index in range(layers):
        shaped = raw.reshape(LAYER[0], -1)
        writer.add_tensor(f"blocks.{index}.ffn.0.weight", shaped, raw_dtype=gguf.GGMLQuantizationType[kind])
        total += shaped.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call, with nothing left for the disk to do from before."""
    os.sync()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def flush(path: Path) -> None:
    """The system has the disk take all of the file, as it has of a converted one before that gets its name."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def convert(folder: Path, kind: str, layers: int, device: str) -> dict[str, float | str]:
    """Seconds of converting, of a plain copy of as many bytes as the new file has, and of one that is flushed: medians, in turns."""
    source, target, copy = folder / f"{kind}.gguf", folder / "out.safetensors", folder / "copy.safetensors"
    nbytes = write_source(source, kind, layers)
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, FORMATS[TARGET], None)
    calls: dict[str, Callable[[], object]] = {
        "seconds": lambda: quantize_checkpoint(checkpoint, plan, target, device=device),
        "copy_seconds": lambda: shutil.copyfile(target, copy),
        "flushed_copy_seconds": lambda: (shutil.copyfile(target, copy), flush(copy)),
    }
    quantize_checkpoint(checkpoint, plan, target, device=device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
            copy.unlink(missing_ok=True)
    middle = {name: statistics.median(found) for name, found in times.items()}
    row = {
        "kind": kind,
        "source_mib": nbytes / 2**20,
        "target_mib": target.stat().st_size / 2**20,
        **middle,
        "share_of_copy": 100 * middle["copy_seconds"] / middle["seconds"],
        "share_of_flushed_copy": 100 * middle["flushed_copy_seconds"] / middle["seconds"],
    }
    for path in (source, target):
        path.unlink()
    return row


def peer_decoder(folder: Path | None) -> Callable[[torch.Tensor, str, tuple[int, int]], torch.Tensor]:
    """What decodes a weight at every call."""
    if folder is None:
        return lambda raw, kind, shape: decode(raw, kind, shape).to(torch.bfloat16)
    spec = importlib.util.spec_from_file_location("comfyui_gguf_dequant", folder / "dequant.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def dequantize(raw: torch.Tensor, kind: str, shape: tuple[int, int]) -> torch.Tensor:
        return module.dequantize(raw, gguf.GGMLQuantizationType[kind], shape, dtype=None).to(torch.bfloat16)

    return dequantize


def milliseconds(call: Callable[[], torch.Tensor]) -> float:
    """Median on the GPU."""
    event_times([call], 3)
    return statistics.median(event_times([call], 15)) / 1e3


def multiply(kind: str, rows: int, peer: Callable[..., torch.Tensor]) -> dict[str, float | str | int]:
    """One layer, stored anew, beside decoding it at the call."""
    raw = raw_blocks(kind, LAYER).cuda()
    weight = decode(raw, kind, LAYER)
    x = torch.randn(rows, LAYER[1], device="cuda", dtype=torch.bfloat16)
    ours = quantize_to_tensor(weight, FORMATS[TARGET])
    exact = x.double()[:64] @ weight.double().T
    mine, theirs = quantized_linear(x, ours), torch.nn.functional.linear(x, peer(raw, kind, LAYER))
    return {
        "kind": kind,
        "rows": rows,
        "ms": milliseconds(lambda: quantized_linear(x, ours)),
        "peer_ms": milliseconds(lambda: torch.nn.functional.linear(x, peer(raw, kind, LAYER))),
        "error": relative_error(mine[:64], exact),
        "peer_error": relative_error(theirs[:64], exact),
    }


def goals(conversions: list[dict], products: list[dict]) -> list[dict]:
    """Of the issue: shares of a copy's speed, and how much faster than decoding at every call."""
    entries = []
    for row in conversions:
        for share, beside in COPIES.items():
            name = f"{row['kind']} to {TARGET}, speed beside a copy of the result {beside}"
            entries.append(Goal(name, SHARES.get(row["kind"], K_SHARE), "%").judged([row[share]]))
    for many, target in ((False, 3.0), (True, 1.3)):
        chosen = [row["peer_ms"] / row["ms"] for row in products if (row["rows"] > FEW) == many]
        name = "32,760 rows" if many else "1 and 16 rows"
        entries.append(Goal(f"a layer at {name}, beside decoding it at every call", target, "x").judged(chosen))
    return entries


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", type=Path, default=None)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        conversions = [convert(Path(folder), kind, options.layers, options.device) for kind in KINDS]
    products = []
    if options.device == "cuda":
        peer = peer_decoder(options.peer)
        products = [multiply(kind, rows, peer) for kind in ("Q8_0", "Q4_K") for rows in ROWS]
    record = {
        "environment": environment(),
        "peer": "ComfyUI-GGUF's dequant.py" if options.peer else "this pack's decoder at every call",
        "layer": LAYER,
        "conversions": conversions,
        "rows": products,
        "goals": goals(conversions, products),
    }
    write(options.out, record)
    for row in (*conversions, *products, *record["goals"]):
        print(row, flush=True)


if __name__ == "__main__":
    main()
