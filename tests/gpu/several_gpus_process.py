"""Samples on two GPUs in a ComfyUI of this process: formats, a LoRA, an interrupt, a worker that dies.

    python tests/gpu/several_gpus_process.py OUT.json [ComfyUI options, e.g. --disable-dynamic-vram]

It starts core as main.py does (dynamic VRAM included) but without the server, and writes what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from testing.core import start_core  # noqa: E402

STEPS = 3
CFG = 3.0
LATENT = (1, 16, 5, 32, 52)
FORMATS = (None, "int8", "int8_convrot_fast", "fp8_e4m3fn_scaled_fast", "fp4_scaled")


def write_models(folder: Path) -> dict[str, Path]:
    """A Wan of 768 channels in 6 heads."""
    from testing.tiny import wan
    from testing.tiny.tensors import draw, write

    config = wan.WanConfig(dim=768, ffn=3072, heads=6, layers=4, text=256)
    return {"wan": write(folder / "wan.safetensors", draw(wan.shapes(config)), config.metadata())}


def load(path: Path, weights: str | None, folder: Path) -> Any:
    """The model in a format, with this pack's exact attention."""
    from lowbit.attention.candidates import Policy
    from lowbit.attention.schedule import Schedule
    from lowbit.host.attention.installing import install_override
    from lowbit.host.weights.loading import load_diffusion_model
    from lowbit.host.weights.preparing import Request, plan_diffusion_model, prepared_file

    if weights is not None:
        path = prepared_file(plan_diffusion_model(path, Request(weights)))
    return install_override(load_diffusion_model(str(path)), Policy("auto", "exact"), Schedule(), False, folder)[0]


def with_lora(model: Any, strength: float) -> Any:
    """A LoRA on every query, through core's own loader."""
    import comfy.sd

    from testing.tiny import lora

    blocks = model.model.diffusion_model.blocks
    shapes = {f"blocks.{index}.self_attn.q.weight": block.self_attn.q.weight for index, block in enumerate(blocks)}
    tensors = lora.make(shapes, [name.removesuffix(".weight") for name in shapes])
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


def sample(model: Any, steps: int = STEPS) -> torch.Tensor:
    """Some Euler steps from fixed noise, with two prompts."""
    import comfy.sample

    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(LATENT, generator=generator)
    prompts = [[[torch.randn(1, 32, 256, generator=generator), {}]] for _ in range(2)]
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(
        model, noise, steps, CFG, "euler", "simple", *prompts, latent, seed=5, disable_pbar=True
    ).float().cpu()  # fmt: skip


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def in_the_middle(model: Any, act: Any) -> Any:
    """A hook that acts once, when the second block begins."""
    left = [act]
    block = model.model.diffusion_model.blocks[1]
    return block.register_forward_pre_hook(lambda *_: left.pop()() if left else None)


def failure(model: Any, act: Any) -> dict[str, Any]:
    """What sampling raises when `act` happens in the middle of a step, and how long that took."""
    hook, began = in_the_middle(model, act), time.perf_counter()
    try:
        sample(model)
        raised = None
    except BaseException as error:  # noqa: BLE001
        raised = [type(error).__name__, str(error)]
    finally:
        hook.remove()
    return {"raised": raised, "seconds": time.perf_counter() - began}


def results(paths: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Everything that the tests look at."""
    import comfy.memory_management
    import comfy.model_management as management

    from lowbit.host.dividing import _TEAMS, divide

    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    out: dict[str, Any] = {"dynamic": comfy.memory_management.aimdo_enabled, "rows": [], "said": []}
    for weights in FORMATS:
        for strength in (0.0, 0.6):
            model = load(paths["wan"], weights, folder)
            model = with_lora(model, strength) if strength else model
            alone = sample(model)
            noise = error(sample(model), alone)
            for split in ("sequence", "cfg"):
                divided = divide(model, devices, split, out["said"].append)
                row = {"weights": weights, "lora": strength, "split": split, "error": error(sample(divided), alone)}
                out["rows"].append(row | {"again": error(sample(divided), alone), "repeat_alone": noise})
    model = load(paths["wan"], None, folder)
    alone, divided = sample(model), divide(model, devices, "sequence", out["said"].append)
    sample(divided)
    team = _TEAMS[tuple(devices)]
    pid = team.workers[0].process.pid
    out["interrupt"] = failure(divided, lambda: management.interrupt_current_processing(True))
    out["interrupt"] |= {"after": error(sample(divided), alone), "same": team.workers[0].process.pid == pid}
    out["death"] = failure(divided, lambda: os.kill(pid, signal.SIGKILL))
    out["death"] |= {"after": error(sample(divided), alone), "same": team.workers[0].process.pid == pid}
    return out


def main() -> None:
    out, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOWBIT_CACHE_DIR"] = str(Path(folder) / "cache")
        start_core(["--base-directory", folder, *options])
        with torch.inference_mode():
            found = results(write_models(Path(folder)), Path(folder))
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
