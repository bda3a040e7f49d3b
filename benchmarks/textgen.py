"""Measures writing text without ComfyUI in three modes: 16-bit, INT8, and INT8 with a cache of heavy hitters.

python -m benchmarks.textgen MODEL [--out benchmarks/results/textgen.json]
MODEL: a Hugging Face folder. Of `random:WIDTH,FEED_FORWARD,LAYERS,HEADS,KV_HEADS` the weights are drawn, for speed alone;
--rivals measures transformers beside them.
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
from benchmarks.textgen_rivals import sizes, transformers_model
from lowbit.ops.formats import find_format
from lowbit.text.architecture import read_architecture
from lowbit.text.caches import FULL, HEAVY_HITTERS, CachePolicy
from lowbit.text.layers import LayerAttention
from lowbit.text.sampling import Sampling
from lowbit.text.writer import Stopwatch, Writer
from testing.measure import environment

VOCABULARY = 152064


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
    """Stands in for a file: the tensors of a language model, drawn when they are read."""

    def __init__(self, config: Any) -> None:
        self.path = Path("random")
        self.metadata: Mapping[str, str] = {}
        self.entries = {
            name: types.SimpleNamespace(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
            for name, tensor in transformers_model(config, "meta").state_dict().items()
        }

    def read(self, name: str) -> torch.Tensor:
        """A drawn matrix of the right size, on the GPU where there is one; ones for a norm, zeros for a bias."""
        size = self.entries[name].shape
        if len(size) == 1:
            return torch.full(size, float(name.endswith(".weight")), dtype=torch.bfloat16)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.randn(size, dtype=torch.bfloat16, device=device) / size[1] ** 0.5


def drawn_config(numbers: str) -> Any:
    """transformers' configuration of a Qwen2 of `WIDTH,FEED_FORWARD,LAYERS,HEADS,KV_HEADS`."""
    from transformers import Qwen2Config

    return Qwen2Config(**sizes(*map(int, numbers.split(",")), VOCABULARY), tie_word_embeddings=False)


def load(model: str, mode: Mode, device: torch.device) -> Writer:
    """The model in one mode."""
    weight_format = None if mode.weight_format is None else find_format(mode.weight_format)
    if not model.startswith("random:"):
        return Writer.load(Path(model), weight_format, device)
    config = drawn_config(model.removeprefix("random:"))
    shape = read_architecture(config.to_dict(), model)
    checkpoint: Any = DrawnCheckpoint(config)
    return Writer.build(checkpoint, shape, weight_format, device)


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

    return [
        Goal(f"{model}: INT8, tokens a second", 1.5, "x bf16").judged(ratio(quantized, plain, "tokens_per_second")),
        Goal(f"{model}: heavy hitters, tokens a second", 0.95, "x the full cache").judged(
            ratio(heavy, quantized, "tokens_per_second")
        ),
        Goal(f"{model}: heavy hitters, bytes of the cache", 1.0, "x the full cache", at_most=True).judged(
            ratio(heavy, quantized, "cache_bytes")
        ),
    ]


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
    parser.add_argument("--prefill", type=int, default=500, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=1000, help="tokens that are written")
    parser.add_argument("--window", type=int, default=252)
    parser.add_argument("--heavy-hitters", type=int, default=252)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rivals", action="store_true", help="transformers too, for drawn weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(100, 30000, (options.prefill,), generator=generator).tolist()
    model = options.name or Path(options.model).name
    rows: list[dict[str, Any]] = []
    for mode in MODES:
        writer = load(options.model, mode, device)
        policy = CachePolicy(mode.cache, options.window, options.heavy_hitters)
        row = {"model": model, "weights": mode.weights, "contender": f"lowbit, {mode.cache} cache"}
        row |= measure(writer, prompt, options.decode, policy, options.runs)
        print(row, flush=True)
        rows.append(row)
        del writer
    found = judged(rows, model)
    keep(options.out, model, rows, found)
    if options.rivals:
        config = drawn_config(options.model.removeprefix("random:"))
        row = textgen_rivals.row(config, prompt, options.decode, options.runs, device)
        rows.append({"model": model, **row})
        print(rows[-1], flush=True)
        keep(options.out, model, rows, found)


if __name__ == "__main__":
    main()
