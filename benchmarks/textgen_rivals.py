"""What others write a text with, at the sizes of a model whose weights are drawn: transformers, compiled."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

CONTENDER = "transformers, static cache, compiled"


def sizes(width: int, feed_forward: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    """Arguments of a configuration of transformers'."""
    return {
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


def transformers_model(config: Any, device: torch.device | str) -> Any:
    """The language model of a configuration of transformers', with drawn weights, in bfloat16."""
    from transformers import AutoModelForCausalLM

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
def row(config: Any, prompt: list[int], length: int, runs: int, device: torch.device) -> dict[str, Any]:
    """The row of transformers."""
    model = transformers_model(config, device)
    return {"weights": "bf16", "contender": CONTENDER} | measure(model, prompt, length, runs, device)
