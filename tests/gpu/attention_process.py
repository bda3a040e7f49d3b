"""Runs a Wan of this process's ComfyUI on the GPU with the attention node's dispatcher, and writes what each choice did.

    python tests/gpu/attention_process.py OUT.json [ComfyUI options, e.g. --disable-dynamic-vram]

9,216 tokens of head dim 128: enough for every backend present to be worth a try.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import comfy_process  # noqa: E402

LATENT = (1, 16, 9, 64, 64)
STEPS = 2


def sample(patcher) -> torch.Tensor:
    """Two Euler steps from fixed noise."""
    import comfy.sample

    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(LATENT, generator=generator)
    conditioning = [[torch.randn(1, 512, 256, generator=generator), {}]]
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(
        patcher, noise, STEPS, 1.0, "euler", "simple", conditioning, conditioning, latent, seed=5
    ).float()


def run(patcher, reference: torch.Tensor, folder: Path, backend: str, budget: str, **schedule) -> dict:
    """One policy: the error against core's attention on the same weights, twice, and the report."""
    from lowbit.attention.candidates import Policy
    from lowbit.attention.schedule import Schedule
    from lowbit.host.attention.installing import find_override, install_override

    patched, _ = install_override(patcher, Policy(backend, budget), Schedule(**schedule), True, folder)
    errors = [comfy_process.relative_error(sample(patched), reference) for _ in range(2)]
    override = find_override(patched)
    return {"errors": errors, "report": override.report(), "text": override.text()}


def main() -> None:
    out, options = Path(sys.argv[1]).resolve(), sys.argv[2:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LOWBIT_CACHE_DIR"] = str(folder / "cache")
        comfy_process.start_core([*options, "--base-directory", name])
        from lowbit.host.weights.loading import load_diffusion_model
        from lowbit.host.weights.preparing import Request, plan_diffusion_model, prepared_file

        model, _ = comfy_process.write_models(folder)
        patcher = load_diffusion_model(str(model))
        reference = sample(patcher)
        rows = {
            "exact": run(patcher, reference, folder, "auto", "exact"),
            "fast": run(patcher, reference, folder, "auto", "fast"),
            "fast again": run(patcher, reference, folder, "auto", "fast"),
            "fast, last step exact": run(patcher, reference, folder, "auto", "fast", last_steps=1),
            "comfy_kitchen_int8": run(patcher, reference, folder, "comfy_kitchen_int8", "exact"),
        }
        eight_bits = load_diffusion_model(str(prepared_file(plan_diffusion_model(model, Request("fp8_e4m3fn_scaled")))))
        rows["fp8 weights"] = run(eight_bits, sample(eight_bits), folder, "auto", "balanced")
        for row_name, row in rows.items():
            print(f"== {row_name}: errors {row['errors']}\n{row['text']}")
        dynamic = patcher.is_dynamic()
        out.write_text(json.dumps({"options": options, "dynamic": dynamic, "rows": rows}, indent=1))


if __name__ == "__main__":
    # As core's executor runs every node.
    with torch.inference_mode():
        main()
