"""Measures writing text without ComfyUI in three modes: 16-bit, INT8, and INT8 with a cache of heavy hitters.

python -m benchmarks.textgen MODEL [--out benchmarks/results/textgen.json] [--text FILE]
MODEL: a Hugging Face folder. Of `random:WIDTH,FEED_FORWARD,LAYERS,HEADS,KV_HEADS` the weights are drawn, for speed alone;
--rivals measures transformers and torchao beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import goals, textgen_rivals
from benchmarks.goals import Goal
from lowbit.ops.formats import find_format
from lowbit.text.architecture import Architecture
from lowbit.text.caches import FULL, HEAVY_HITTERS, CachePolicy
from lowbit.text.layers import LayerAttention
from lowbit.text.reading import Reader
from lowbit.text.sampling import Sampling
from lowbit.text.writer import Stopwatch, Writer, load_tokenizer
from testing.measure import environment

VOCABULARY = 152064
HEAD_DIM = 128


@dataclass(frozen=True)
class Mode:
    """One way to write: what the weights are called, their format (None: as they are), and what the cache keeps."""

    weights: str
    weight_format: str | None
    cache: str


MODES = (
    Mode("bf16", None, FULL),
    Mode("int8", "int8", FULL),
    Mode("int8", "int8", HEAVY_HITTERS),
)


class DrawnCheckpoint:
    """Stands in for a file: tensors of the shapes of a Qwen2.5-like model, drawn when they are read."""

    def __init__(self, shape: Architecture, feed_forward: int) -> None:
        self.path = Path("random")
        self.metadata: Mapping[str, str] = {}
        inner, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens": (VOCABULARY, shape.width),
            "model.norm": (shape.width,),
            "lm_head": (VOCABULARY, shape.width),
        }
        for index in range(shape.layers):
            name = f"model.layers.{index}"
            sizes |= {
                f"{name}.self_attn.q_proj": (inner, shape.width),
                f"{name}.self_attn.k_proj": (key, shape.width),
                f"{name}.self_attn.v_proj": (key, shape.width),
                f"{name}.self_attn.o_proj": (shape.width, inner),
                f"{name}.mlp.gate_proj": (feed_forward, shape.width),
                f"{name}.mlp.up_proj": (feed_forward, shape.width),
                f"{name}.mlp.down_proj": (shape.width, feed_forward),
                f"{name}.input_layernorm": (shape.width,),
                f"{name}.post_attention_layernorm": (shape.width,),
            }
        self.entries = {
            f"{name}.weight": types.SimpleNamespace(shape=size, dtype=torch.bfloat16, name=f"{name}.weight")
            for name, size in sizes.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """A drawn tensor of the right size, on the GPU where there is one."""
        size = self.entries[name].shape
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.randn(size, dtype=torch.bfloat16, device=device) / size[1] ** 0.5


def drawn_architecture(sizes: str) -> tuple[Architecture, int]:
    """(architecture, width of the feed-forward) of `WIDTH,FEED_FORWARD,LAYERS,HEADS,KV_HEADS`."""
    width, feed_forward, layers, heads, kv_heads = (int(size) for size in sizes.split(","))
    shape = Architecture(
        width, heads, kv_heads, HEAD_DIM, layers, 1e-6, 1e6, None, 1.0, (None,) * layers, "silu", HEAD_DIM**-0.5, 1.0,
        False, (),
    )  # fmt: skip
    return shape, feed_forward


def load(model: str, mode: Mode, device: torch.device) -> Writer:
    """The model in one mode."""
    weight_format = None if mode.weight_format is None else find_format(mode.weight_format)
    if not model.startswith("random:"):
        return Writer.load(Path(model), weight_format, device)
    shape, feed_forward = drawn_architecture(model.removeprefix("random:"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    checkpoint: Any = DrawnCheckpoint(shape, feed_forward)
    with torch.inference_mode():
        return Writer(Reader(checkpoint, shape, weight_format, device, dtype).model(), shape, device)


def measure(writer: Writer, prompt: list[int], length: int, policy: CachePolicy, runs: int) -> dict[str, float]:
    """Medians of the time to the first token and of the rate after it, the most memory, and the cache's bytes."""
    writer.write(prompt, 12, Sampling(), policy, stop_tokens=())
    if writer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, rate = [], []
    for _ in range(runs):
        watch = Stopwatch.start()
        writer.write(prompt, length, Sampling(), policy, stop_tokens=(), seen=watch.seen)
        first.append(watch.first)
        rate.append(watch.rate)
    caches = [layer.mixer.cache for layer in writer.model.layers if isinstance(layer.mixer, LayerAttention)]
    return {
        "tokens_per_second": statistics.median(rate),
        "first_token_seconds": statistics.median(first),
        "peak_bytes": torch.cuda.max_memory_allocated() if writer.device.type == "cuda" else 0,
        "cache_bytes": sum(cache.nbytes for cache in caches),
    }


def judged(rows: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The three modes of one model against each other."""
    plain, quantized, heavy = rows

    def ratio(above: dict[str, Any], below: dict[str, Any], key: str) -> list[float | None]:
        return [above[key] / below[key] if above.get(key) and below.get(key) else None]

    found = [
        Goal(f"{model}: INT8, tokens a second", 1.5, "x bf16").judged(ratio(quantized, plain, "tokens_per_second")),
        Goal(f"{model}: heavy hitters, tokens a second", 0.95, "x the full cache").judged(
            ratio(heavy, quantized, "tokens_per_second")
        ),
        Goal(f"{model}: heavy hitters, bytes of the cache", 1.0, "x the full cache", at_most=True).judged(
            ratio(heavy, quantized, "cache_bytes")
        ),
    ]
    if "perplexity" in plain:
        found.append(
            Goal(f"{model}: INT8, perplexity", 1.02, "x bf16", at_most=True).judged(
                ratio(quantized, plain, "perplexity")
            )
        )
    return found


def keep(path: Path, model: str, rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Write the rows and goals of one model into a results file, in place of what it has of that model in these weights."""
    record = json.loads(path.read_text()) if path.exists() else {"rows": [], "goals": []}
    record["environment"] = environment()
    made = {(model, row["weights"]) for row in rows}
    named = {goal["name"] for goal in found}
    record["rows"] = [row for row in record["rows"] if (row["model"], row["weights"]) not in made] + rows
    record["goals"] = [goal for goal in record["goals"] if goal["name"] not in named] + found
    goals.write(path, record)


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Hugging Face folder, or random:WIDTH,FEED_FORWARD,LAYERS,HEADS,KV_HEADS")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/textgen.json"))
    parser.add_argument("--name", default="", help="what the model is called in the table")
    parser.add_argument("--text", type=Path, default=None, help="a text file, for perplexity")
    parser.add_argument("--prefill", type=int, default=500, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=1000, help="tokens that are written")
    parser.add_argument("--window", type=int, default=252)
    parser.add_argument("--heavy-hitters", type=int, default=252)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rivals", action="store_true", help="transformers and torchao too, for drawn weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    text = None
    if options.text is not None:
        tokenizer = load_tokenizer(Path(options.model))
        text = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"][: options.prefill + options.decode]
    generator = torch.Generator().manual_seed(0)
    prompt = (text or torch.randint(100, 30000, (options.prefill,), generator=generator).tolist())[: options.prefill]
    model = options.name or Path(options.model).name
    rows: list[dict[str, Any]] = []
    for mode in MODES:
        writer = load(options.model, mode, device)
        policy = CachePolicy(mode.cache, options.window, options.heavy_hitters)
        row = {"model": model, "weights": mode.weights, "contender": f"lowbit, {mode.cache} cache"}
        row |= measure(writer, prompt, options.decode, policy, options.runs)
        if text is not None:
            row["perplexity"] = writer.perplexity(text, options.prefill, policy)
        print(row, flush=True)
        rows.append(row)
        del writer
    found = judged(rows, model)
    keep(options.out, model, rows, found)
    if options.rivals:
        sizes = options.model.removeprefix("random:")
        for row in textgen_rivals.rows(sizes, VOCABULARY, prompt, options.decode, options.runs, device):
            rows.append({"model": model, **row})
            print(rows[-1], flush=True)
            keep(options.out, model, rows, found)


if __name__ == "__main__":
    main()
