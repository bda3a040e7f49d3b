"""Writes text with a tiny Qwen2.5-VL in a ComfyUI of this process, on the GPU: as a graph, kernel by kernel, and as core does.

python tests/gpu/text_process.py OUT.json [ComfyUI options, e.g. --disable-dynamic-vram --novram]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from comfy_process import relative_error, start_core

FORMATS = ("none", "int8", "fp8_e4m3fn_scaled", "fp4_scaled", "int8_convrot_fast")
GREEDY = {"do_sample": False, "max_length": 40}
SAMPLED = {"do_sample": True, "max_length": 40, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 3}
PROMPTS = 500


def forced_logits(clip: Any, model: Any, generate: Any, tokens: Any) -> list[torch.Tensor]:
    """Logits of every step of our loop while a given text is written, so that one token's luck does not spread."""
    from lowbit.text.sampling import Sampler

    text = torch.randint(100, 150000, (12,), generator=torch.Generator().manual_seed(9)).tolist()
    seen: list[torch.Tensor] = []

    def draw(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.float().clone())
        return torch.tensor([[text[len(seen) - 1]]], device=logits.device)

    original = Sampler.draw
    Sampler.draw = lambda self, logits: draw(logits)  # type: ignore[method-assign]
    model.sample_token = lambda logits, *args, **kwargs: draw(logits)
    try:
        generate(clip, tokens, do_sample=False, max_length=10)
    finally:
        Sampler.draw = original  # type: ignore[method-assign]
        del model.sample_token
    return seen


def run_format(name: str, source: Path) -> dict[str, Any]:
    """One format: graph against eager, logits against core's loop, and whether memory grows over many prompts."""
    import comfy.model_management
    import comfy.sd
    from comfy.text_encoders.llama import BaseGenerate, Qwen25_7BVLI

    from lowbit.host.text import route
    from lowbit.host.text.generating import TextGeneration
    from lowbit.host.weights.loading import load_text_encoder
    from lowbit.host.weights.preparing import Request, plan_text_encoder, prepared_file
    from lowbit.text.caches import HEAVY_HITTERS, CachePolicy

    clip = load_text_encoder(
        [str(prepared_file(plan_text_encoder(source, Request(name))))], comfy.sd.CLIPType.QWEN_IMAGE
    )
    model = next(module for module in clip.cond_stage_model.modules() if isinstance(module, Qwen25_7BVLI))
    tokens = clip.tokenize("a red train in the snow, seen from a bridge")
    graph, eager = (route.install_settings(clip, TextGeneration(cuda_graph=on)) for on in (True, False))
    heavy = [
        route.install_settings(clip, TextGeneration(cuda_graph=on, cache=CachePolicy(HEAVY_HITTERS, 8, 8)))
        for on in (True, False)
    ]
    row: dict[str, Any] = {"dynamic": clip.patcher.is_dynamic()}
    for kind, options in (("greedy", GREEDY), ("sampled", SAMPLED)):
        texts = [one.generate(tokens, **options) for one in (graph, graph, eager)]
        row[f"{kind}_equal"] = texts[0] == texts[1] == texts[2]
        row[f"{kind}_distinct"] = len(set(texts[0]))
    row["heavy_equal"] = heavy[0].generate(tokens, **GREEDY) == heavy[1].generate(tokens, **GREEDY)
    model.model.config.stop_tokens = []
    model.logits = lambda x: model.model.lm_head(x[:, -1:])
    route_text = route.generate_text
    ours = forced_logits(eager, model, lambda one, *args, **kw: one.generate(*args, **kw), tokens)
    route.generate_text = lambda owner, settings, *args, **kw: BaseGenerate.generate(owner, *args, **kw)
    core = forced_logits(eager, model, lambda one, *args, **kw: one.generate(*args, **kw), tokens)
    route.generate_text = route_text
    row["logit_errors"] = [relative_error(a, b) for a, b in zip(ours, core, strict=True)]
    graph.generate(tokens, **GREEDY)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(PROMPTS if name == "int8" else 5):
        graph.generate(tokens, do_sample=False, max_length=6)
    torch.cuda.synchronize()
    row["grown_bytes"] = torch.cuda.memory_allocated() - before[0]
    row["reserved_grown_bytes"] = torch.cuda.memory_reserved() - before[1]
    comfy.model_management.unload_all_models()
    return row


def main() -> None:
    out, options = Path(sys.argv[1]).resolve(), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOWBIT_CACHE_DIR"] = str(Path(folder) / "cache")
        start_core([*options, "--base-directory", folder])
        from testing import tiny
        from testing.shims import detection

        detection.install()
        source = tiny.write("text_encoders/qwen25_vl_writing.safetensors", Path(folder))
        rows = {}
        for name in FORMATS:
            rows[name] = run_format(name, source)
            print(name, rows[name], flush=True)
        out.write_text(json.dumps({"options": options, "rows": rows}, indent=1))


if __name__ == "__main__":
    # As core's executor runs every node.
    with torch.inference_mode():
        main()
