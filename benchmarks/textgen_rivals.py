"""What others write a text with, at the sizes of a model whose weights are drawn: transformers, compiled, and torchao's INT8."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

CONTENDER = "transformers, static cache, compiled"
TORCHAO = "transformers and torchao, static cache, compiled"


def transformers_model(sizes: str, vocabulary: int, device: torch.device) -> Any:
    """A Qwen2 of `WIDTH,FEED_FORWARD,LAYERS,HEADS,KV_HEADS`, with drawn weights, in bfloat16."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    width, feed_forward, layers, heads, kv_heads = (int(size) for size in sizes.split(","))
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def measure(model: Any, prompt: list[int], length: int, runs: int, device: torch.device) -> dict[str, float]:
    """Medians, as benchmarks/textgen.py takes its own. transformers compiles the step by itself where the cache is static."""
    ids = torch.tensor([prompt], device=device)

    def seconds(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            cache_implementation="static",
            pad_token_id=0,
        )
        made.tolist()
        return time.perf_counter() - start

    seconds(length)
    seconds(1)
    first = statistics.median(seconds(1) for _ in range(runs))
    whole = statistics.median(seconds(length) for _ in range(runs))
    return {"tokens_per_second": (length - 1) / (whole - first), "first_token_seconds": first}


@torch.no_grad()
def rows(
    sizes: str, vocabulary: int, prompt: list[int], length: int, runs: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One row of each that imports."""
    model = transformers_model(sizes, vocabulary, device)
    yield {"weights": "bf16", "contender": CONTENDER} | measure(model, prompt, length, runs, device)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        print(f"torchao is left out: {error}", flush=True)
        return
    torch.compiler.reset()
    quantize_(model, Int8WeightOnlyConfig())
    yield {"weights": "int8", "contender": TORCHAO} | measure(model, prompt, length, runs, device)
