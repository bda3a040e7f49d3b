"""Runs Wan and UMT5 in a ComfyUI of this process, on the GPU, in every format: resident, streamed, with a LoRA.

    python tests/gpu/comfy_process.py OUT.json [ComfyUI options, e.g. --disable-dynamic-vram --novram]

It starts core as main.py does (dynamic VRAM included) but without the server, and writes what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from testing.core import start_core  # noqa: E402
from testing.measure import relative_error  # noqa: E402

STEPS = 2
LORA_STRENGTH = 1.0


def write_models(folder: Path) -> tuple[Path, Path]:
    """A Wan of 1024 channels and a LoRA for it."""
    from safetensors.torch import save_file

    from testing.tiny import lora, wan
    from testing.tiny.tensors import draw, linear_names, write

    config = wan.WanConfig(dim=1024, ffn=4096, heads=8, layers=4, text=256)
    tensors = draw(wan.shapes(config))
    model = write(folder / "wan.safetensors", tensors, config.metadata())
    layers = [
        name for name in linear_names(tensors) if name.endswith(("self_attn.q", "cross_attn.v", "ffn.0", "ffn.2"))
    ]
    save_file(lora.make(tensors, layers), folder / "lora.safetensors")
    return model, folder / "lora.safetensors"


def sample(patcher) -> torch.Tensor:
    """Two Euler steps from fixed noise."""
    import comfy.sample

    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 16, 3, 16, 16, generator=generator)
    conditioning = [[torch.randn(1, 32, 256, generator=generator), {}]]
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(
        patcher, noise, STEPS, 1.0, "euler", "simple", conditioning, conditioning, latent, seed=5
    ).float()


def with_peak(function, *arguments) -> tuple[torch.Tensor, float]:
    """The result, and the most MiB that torch held meanwhile (dynamic VRAM's weights lie outside its counters)."""
    if not torch.cuda.is_available():
        return function(*arguments), 0.0
    torch.cuda.reset_peak_memory_stats()
    result = function(*arguments)
    return result, torch.cuda.max_memory_allocated() / 2**20


def with_lora(patcher, path: Path):
    import comfy.sd
    import comfy.utils

    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    return comfy.sd.load_lora_for_models(patcher, None, tensors, LORA_STRENGTH, 0)[0]


def run_format(
    name: str, model: Path, merged: Path, lora: Path, reference: torch.Tensor, reference_delta: torch.Tensor
) -> dict:
    """One format: its error, the LoRA's delta under it, and whether it multiplies as before once the LoRA is gone."""
    import comfy.model_management

    from lowbit.host.weights.loading import load_diffusion_model
    from lowbit.host.weights.operations import QuantizedLinear
    from lowbit.host.weights.preparing import Request, plan_diffusion_model, prepared_file

    planned = plan_diffusion_model(model, Request(name))
    patcher = load_diffusion_model(str(prepared_file(planned)))
    linears = [module for module in patcher.model.modules() if isinstance(module, QuantizedLinear)]
    first = sample(patcher)
    start = time.perf_counter()
    again, peak = with_peak(sample, patcher)
    seconds = time.perf_counter() - start
    patched, lora_peak = with_peak(sample, with_lora(patcher, lora))
    after = sample(patcher)
    row = {
        "format": planned.choice.split(":")[0],
        "linears": len(linears),
        "expected_linears": sum(layer.action == "quantize" for layer in planned.plan.layers.values()),
        "dynamic": patcher.is_dynamic(),
        "error": relative_error(first, reference),
        "repeat_error": relative_error(again, first),
        "lora_error": relative_error(patched, reference + reference_delta),
        "lora_delta_error": relative_error(patched - first, reference_delta),
        "after_lora_error": relative_error(after, first),
        "resident_mib": patcher.loaded_size() / 2**20,
        "model_mib": patcher.model_size() / 2**20,
        "peak_mib": peak,
        "lora_peak_mib": lora_peak,
        "seconds": seconds,
        "finite": bool(torch.isfinite(patched).all() and torch.isfinite(after).all()),
    }
    comfy.model_management.unload_all_models()
    merged_first = sample(load_diffusion_model(str(prepared_file(plan_diffusion_model(merged, Request(name))))))
    row["merged_error"] = relative_error(merged_first, reference + reference_delta)
    comfy.model_management.unload_all_models()
    return row


def run_preset(name: str, model: Path, lora: Path, reference: torch.Tensor, reference_delta: torch.Tensor) -> dict:
    """The one node's preset behind core's own loader, with a LoRA before and behind it."""
    import comfy.model_management
    import comfy.sd

    from lowbit.host.optimizing import PRESETS, optimize

    loaded = comfy.sd.load_diffusion_model(str(model))
    done = optimize(loaded, None, None, PRESETS[name], "1")
    first = sample(done.model)
    behind = sample(with_lora(done.model, lora))
    before = sample(optimize(with_lora(loaded, lora), None, None, PRESETS[name], "1").model)
    row = {
        "text": done.text,
        "dynamic": done.model.is_dynamic(),
        "error": relative_error(first, reference),
        "behind_error": relative_error(behind, reference + reference_delta),
        "before_error": relative_error(before, reference + reference_delta),
        "model_mib": done.model.model_size() / 2**20,
        "loaded_mib": loaded.model_size() / 2**20,
    }
    comfy.model_management.unload_all_models()
    return row


def run_text_encoder(folder: Path, name: str) -> dict:
    """UMT5 in one format: how many linears quantize their input, freshly built and loaded by the patcher."""
    import comfy.model_management
    import comfy.sd

    from lowbit.host.weights.loading import load_text_encoder
    from lowbit.host.weights.operations import QuantizedLinear
    from lowbit.host.weights.preparing import Request, plan_text_encoder, prepared_file
    from testing import tiny

    source = tiny.write("text_encoders/umt5.safetensors", folder)

    def encode(clip) -> torch.Tensor:
        return clip.encode_from_tokens(clip.tokenize("a red train in the snow")).float().cpu()

    reference = encode(load_text_encoder([str(source)], comfy.sd.CLIPType.WAN))
    clip = load_text_encoder([str(prepared_file(plan_text_encoder(source, Request(name))))], comfy.sd.CLIPType.WAN)
    linears = [module for module in clip.cond_stage_model.modules() if isinstance(module, QuantizedLinear)]
    built = sum(module.fast for module in linears)
    error = relative_error(encode(clip), reference)
    row = {
        "linears": len(linears),
        "dynamic": clip.patcher.is_dynamic(),
        "fast_when_built": built,
        "fast_when_loaded": sum(module.fast for module in linears),
        "error": error,
    }
    comfy.model_management.unload_all_models()
    return row


def main() -> None:
    out, options = Path(sys.argv[1]).resolve(), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOWBIT_CACHE_DIR"] = str(Path(folder) / "cache")
        start_core([*options, "--base-directory", folder])
        import comfy.model_management

        from lowbit.host.optimizing import PRESETS
        from lowbit.host.weights.loading import load_diffusion_model
        from lowbit.host.weights.saving import save_diffusion_model
        from lowbit.ops.formats import FORMATS
        from testing.shims import detection

        detection.install()
        model, lora = write_models(Path(folder))
        patcher = load_diffusion_model(str(model))
        reference = sample(patcher)
        patched = with_lora(patcher, lora)
        delta = sample(patched) - reference
        merged = save_diffusion_model(patched, "merged")
        comfy.model_management.unload_all_models()
        rows = {}
        for name in (*FORMATS, "auto", "none"):
            rows[name] = run_format(name, model, merged, lora, reference, delta)
            print(
                name, {key: round(value, 4) if isinstance(value, float) else value for key, value in rows[name].items()}
            )
        presets = {name: run_preset(name, model, lora, reference, delta) for name in PRESETS}
        print(json.dumps(presets, indent=1))
        encoders = {name: run_text_encoder(Path(folder), name) for name in FORMATS}
        device = comfy.model_management.get_torch_device()
        result = {
            "device": str(device),
            "options": options,
            "delta": relative_error(reference + delta, reference),
            "rows": rows,
            "presets": presets,
            "text_encoders": encoders,
        }
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    # As core's executor runs every node.
    with torch.inference_mode():
        main()
