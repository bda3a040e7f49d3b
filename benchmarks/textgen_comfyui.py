"""Measures Generate Text in ComfyUI, its own loop beside ours, on text encoders of 7 and 8 B parameters with drawn weights.

python -m benchmarks.textgen_comfyui [--out benchmarks/results/textgen.json] [--models a,b] [--weights none,int8,...]
What follows -- goes to ComfyUI, for instance --disable-dynamic-vram. Needs a GPU and ComfyUI (COMFYUI_PATH).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen3Config

from benchmarks.goals import Goal
from benchmarks.textgen import keep
from benchmarks.textgen_rivals import sizes, transformers_model
from testing.core import start_core

CORE_TOKENS, TOKENS, RUNS, LONG = 24, 600, 3, 8000


@dataclass(frozen=True)
class Encoder:
    """A text encoder: its sizes as transformers has them, what ComfyUI is to take it for, and what its output head is called."""

    config: Any
    clip_type: str
    head: str


ENCODERS = {
    "Qwen2.5-VL 7B": Encoder(Qwen2Config(**sizes(3584, 18944, 28, 28, 4, 152064)), "QWEN_IMAGE", "lm_head"),
    "Qwen3 8B": Encoder(Qwen3Config(**sizes(4096, 12288, 36, 32, 8, 151936)), "FLUX2", "model.lm_head"),
}

SPEEDS = {
    "none": (200.0, "bf16"),
    "int8": (330.0, "INT8"),
    "fp8_e4m3fn_scaled": (330.0, "FP8"),
    "fp4_scaled": (400.0, "NVFP4"),
}
"""Format -> the tokens a second aimed at, and what it is called."""


class Drawn:
    """Drawn tensors of an encoder in one format; layers of one shape share their bytes until the GPU has them."""

    def __init__(self, encoder: Encoder, weights: str) -> None:
        self.encoder, self.weights = encoder, weights
        self._linears: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def _linear(self, rows: int, columns: int) -> dict[str, torch.Tensor]:
        from lowbit.ops.formats import find_format, storage_for
        from lowbit.ops.quantize import quantize_weight

        if (rows, columns) not in self._linears:
            values = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) / columns**0.5
            if self.weights == "none":
                parts = {"weight": values.cpu()}
            else:
                parts = quantize_weight(values, storage_for(find_format(self.weights), columns))
            self._linears[rows, columns] = {name: part.cpu() for name, part in parts.items()}
        return self._linears[rows, columns]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state dict of the file."""
        torch.manual_seed(0)
        made: dict[str, torch.Tensor] = {}
        for name, tensor in transformers_model(self.encoder.config, "meta").state_dict().items():
            layer, _, suffix = name.rpartition(".")
            layer = self.encoder.head if layer == "lm_head" else layer
            if suffix == "bias":
                made[name] = torch.randn(tensor.shape).bfloat16() / 50
            elif tensor.dim() == 1:
                made[name] = torch.ones(tensor.shape).bfloat16()
            elif layer.endswith("embed_tokens"):
                made[name] = torch.randn(tensor.shape, device="cuda", dtype=torch.bfloat16).cpu()
            else:
                made |= {f"{layer}.{part}": found for part, found in self._linear(*tensor.shape).items()}
        return made


def load(encoder: Encoder, weights: str) -> Any:
    """The encoder as a CLIP of this ComfyUI, through the pack's multiply, without its vision tower and stop tokens."""
    import comfy.sd
    from comfy.text_encoders.llama import BaseGenerate

    from lowbit.host.text import generating
    from lowbit.host.weights.loading import take_over
    from lowbit.host.weights.output_head import attach_output_head, output_head_tensors

    tensors = Drawn(encoder, weights).tensors()
    heads = [output_head_tensors(tensors)]
    clip = comfy.sd.load_text_encoder_state_dicts([tensors], clip_type=getattr(comfy.sd.CLIPType, encoder.clip_type))
    for module in list(clip.cond_stage_model.modules()):
        if hasattr(module, "visual"):
            module.visual = torch.nn.Identity()
        if isinstance(module, BaseGenerate):
            module.model.config.stop_tokens = []
    clip.patcher.size = 0
    attach_output_head(clip, heads)
    take_over(clip.cond_stage_model)
    generating.STOP_TOKENS.clear()
    for module in clip.cond_stage_model.modules():
        if isinstance(module, BaseGenerate) and hasattr(module.model, "lm_head"):
            # Core's own multiplies by the embeddings where the head is not cast.
            module.logits = lambda x, head=module.model.lm_head: head(x[:, -1:])
    return clip


def tokens_of(clip: Any, count: int) -> dict[str, Any]:
    """A drawn prompt, as the tokenizer would give it."""
    drawn = torch.randint(100, 150000, (count,), generator=torch.Generator().manual_seed(3)).tolist()
    return {clip.cond_stage_model.clip_name: [[(token, 1.0) for token in drawn]]}


def seconds(clip: Any, tokens: dict[str, Any], length: int) -> float:
    """How long a text of so many tokens takes."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    clip.generate(tokens, do_sample=False, max_length=length)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(clip: Any, prompt: int, length: int) -> dict[str, float]:
    """Medians: the time to the first token, and the rate after it, everything between the two counted."""
    tokens, runs = tokens_of(clip, prompt), RUNS if prompt < LONG else 1
    seconds(clip, tokens, 12)
    first = statistics.median(seconds(clip, tokens, 1) for _ in range(runs))
    torch.cuda.reset_peak_memory_stats()
    whole = statistics.median(seconds(clip, tokens, length) for _ in range(runs if length > CORE_TOKENS else 1))
    return {
        "prompt_tokens": prompt,
        "tokens_per_second": (length - 1) / (whole - first),
        "first_token_seconds": first,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def rows_of(name: str, weights: str, prompts: list[int]) -> list[dict[str, Any]]:
    """One encoder in one format: core's loop and ours."""
    import comfy.model_management

    from lowbit.host.text import route
    from lowbit.host.text.generating import TextGeneration
    from lowbit.text.caches import HEAVY_HITTERS, CachePolicy

    clip = load(ENCODERS[name], weights)
    ours = route.install_settings(clip, TextGeneration())
    heavy = route.install_settings(clip, TextGeneration(cache=CachePolicy(HEAVY_HITTERS)))
    contenders = [("ComfyUI", clip, CORE_TOKENS, prompts[:1]), ("lowbit", ours, TOKENS, prompts[:1])]
    contenders.append(("lowbit, heavy hitters", heavy, TOKENS, prompts))
    rows = []
    for contender, one, length, lengths in contenders:
        for prompt in lengths:
            row = {"model": name, "weights": weights, "contender": contender, **measure(one, prompt, length)}
            print(row, flush=True)
            rows.append(row)
    del clip, ours, heavy
    comfy.model_management.unload_all_models()
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def judged(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals of one encoder."""
    found = []
    for weights, (target, called) in SPEEDS.items():
        mine = {row["contender"]: row for row in rows if row["weights"] == weights and row["prompt_tokens"] == 1000}
        if "lowbit" in mine:
            rate = mine["lowbit"]["tokens_per_second"]
            found.append(Goal(f"{name}: {called}, 1,000 token prompt", target, "tokens/s").judged([rate]))
            late = mine["lowbit"]["first_token_seconds"] / mine["ComfyUI"]["first_token_seconds"]
            found.append(Goal(f"{name}: {called}, first token", 1.0, "x ComfyUI's time", at_most=True).judged([late]))
    heavy = {row["prompt_tokens"]: row["tokens_per_second"] for row in rows if "heavy" in row["contender"]}
    if len(heavy) > 1:
        ratio = heavy[max(heavy)] / heavy[min(heavy)]
        found.append(Goal(f"{name}: heavy hitters at {max(heavy):,} tokens", 0.95, "x at 1,000").judged([ratio]))
    return found


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/textgen.json"))
    parser.add_argument("--models", default=",".join(ENCODERS))
    parser.add_argument("--weights", default=",".join(SPEEDS))
    parser.add_argument("--prompts", default="1000", help="lengths of prompts; heavy hitters take all of them")
    parser.add_argument("--suffix", default="", help="behind the models' names, such as ', legacy'")
    parser.add_argument("core", nargs="*", help="options of ComfyUI")
    options = parser.parse_args()
    start_core(options.core)
    with torch.inference_mode():
        for name in options.models.split(","):
            rows = []
            for weights in options.weights.split(","):
                rows += rows_of(name, weights, [int(length) for length in options.prompts.split(",")])
            title = name + options.suffix
            for row in rows:
                row["model"] = title
            keep(options.out, title, rows, judged(title, rows))


if __name__ == "__main__":
    main()
