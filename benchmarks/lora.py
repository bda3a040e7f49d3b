"""A LoRA on quantized weights: merged first and then quantized, as this pack adds it, and as ComfyUI itself patches them.

    python -m benchmarks.lora --out benchmarks/results/lora.json [--format NAME ...]

The error is that of the latent beside bf16 weights with the same LoRA. Weights are random, at the scale of a trained model's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import write_checkpoint
from benchmarks.goals import Goal, write
from benchmarks.steps import DEVICE, Case, clean, core_in_memory, sample
from testing.measure import environment, relative_error
from testing.tiny import wan

FORMATS = ("fp8_e4m3fn_scaled", "mxfp8", "int8", "int8_convrot_fast", "fp4_scaled", "int4_asym_fast")
MERGED, HERE, STOCK = "merged", "here", "stock"
RANK = 16
EFFECT = 0.22
"""How much the LoRA changes the latent: its strength is chosen for that."""
STEPS = 2

CONFIG = wan.WanConfig(dim=1024, ffn=4096, heads=8, layers=4, text=512)
CASE = Case("Wan, 1,024 channels, 4 blocks", wan.shapes(CONFIG), CONFIG.metadata(), (1, 16, 3, 20, 20), (64, 512))


def write_lora(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A LoRA of rank 16 of every Linear in the blocks, as diffusers' tools write one."""
    generator = torch.Generator().manual_seed(7)
    factors = {}
    for name, shape in shapes.items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            factors[f"{layer}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * shape[1] ** -0.5
            factors[f"{layer}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * RANK**-0.5
    save_file(factors, path)
    return path


def write_merged(path: Path, source: Path, lora: Path, strength: float) -> Path:
    """The bf16 file with the LoRA in its weights."""
    tensors, factors = load_file(source), load_file(lora)
    for name in tensors:
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in factors:
            update = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
            tensors[name] = (tensors[name].float() + strength * update).to(tensors[name].dtype)
    save_file(tensors, path, metadata=CASE.metadata)
    return path


def latent(file: Path, stock: bool, lora: Path | None = None, strength: float = 0.0) -> torch.Tensor:
    """What a file's model makes, loaded by ComfyUI itself or by this pack, with the LoRA or without."""
    import comfy.sd

    from lowbit.host.weights.loading import load_diffusion_model

    model = (comfy.sd.load_diffusion_model if stock else load_diffusion_model)(str(file))
    if lora is not None:
        model, _ = comfy.sd.load_lora_for_models(model, None, load_file(lora), strength, 0)
    made, _ = sample(model, CASE, STEPS)
    del model
    clean()
    return made


def quantized(source: Path, choice: str) -> Path:
    """The file as the loaders quantize it."""
    from lowbit.host.weights.preparing import Request, plan_diffusion_model, prepared_file

    return prepared_file(plan_diffusion_model(source, Request(choice)))


def measured(folder: Path, formats: list[str]) -> dict[str, Any]:
    """The LoRA's effect, and the rows of the formats."""
    source = write_checkpoint(folder / "model.safetensors", CASE.shapes, CASE.metadata)
    lora = write_lora(folder / "lora.safetensors", CASE.shapes)
    plain, strength = latent(source, stock=True), 0.1
    for _ in range(3):
        exact = latent(source, True, lora, strength)
        effect = relative_error(exact, plain)
        if abs(effect - EFFECT) < 0.02:
            break
        strength *= EFFECT / effect
    merged = write_merged(folder / "merged.safetensors", source, lora, strength)
    rows = {}
    for choice in formats:
        file = quantized(source, choice)
        rows[choice] = {
            MERGED: relative_error(latent(quantized(merged, choice), stock=False), exact),
            HERE: relative_error(latent(file, False, lora, strength), exact),
            STOCK: relative_error(latent(file, True, lora, strength), exact),
        }
        print(choice, rows[choice], flush=True)
    return {"model": CASE.title, "effect": effect, "rows": rows}


def goals(rows: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A LoRA beside the weight errs hardly more than one that was merged before they were quantized."""
    goal = Goal("error with a LoRA beside merged first, every format", 1.1, "x", at_most=True)
    return [goal.judged(row[HERE] / row[MERGED] for row in rows.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--format", nargs="*", choices=FORMATS, default=[*FORMATS])
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    with core_in_memory(DEVICE) as folder:
        record = measured(folder, arguments.format)
    write(out, {"environment": environment()} | record | {"goals": goals(record["rows"])})


if __name__ == "__main__":
    main()
