"""Samples with all weights streaming, fetched block by block and layer by layer, in a ComfyUI of this process on the GPU.

    python tests/gpu/fetch_process.py OUT.json

Written as JSON: whether the latents are equal to the bit, how many blocks were fetched, seconds of the runs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from types import MappingProxyType

import torch

sys.path.insert(0, str(Path(__file__).parent))

from comfy_process import sample, start_core, with_lora, write_models  # noqa: E402


def streaming_policies() -> None:
    """Two policies more: no weight stays on the GPU, and blocks are fetched `ahead` or not (`behind`)."""
    from lowbit.memory import policies

    rows = {
        name: dataclasses.replace(policies.POLICIES["auto"], name=name, resident_fraction=0.0, fetches_ahead=ahead)
        for name, ahead in (("ahead", True), ("behind", False))
    }
    policies.POLICIES = MappingProxyType({**policies.POLICIES, **rows})


def counting() -> list[int]:
    """Counts the blocks that are fetched from here on."""
    import comfy.model_prefetch

    pop, count = comfy.model_prefetch.prefetch_queue_pop, [0]

    def counted(queue, device, module, *args, **kwargs):
        count[0] += module is not None
        return pop(queue, device, module, *args, **kwargs)

    comfy.model_prefetch.prefetch_queue_pop = counted
    return count


def timed(patcher) -> tuple[torch.Tensor, float]:
    """A second run's latent and seconds: the first one loads."""
    sample(patcher)
    torch.cuda.synchronize()
    start = time.perf_counter()
    latent = sample(patcher)
    torch.cuda.synchronize()
    return latent, time.perf_counter() - start


def strangers(patcher, others) -> list:
    """In the middle of each block, layers of another model that stream too, as those of a model patch do."""
    linears = [module for module in others.model.diffusion_model.modules() if hasattr(module, "_v")]
    linears = [module for module in linears if getattr(module, "in_features", None) == 1024][:3]
    assert len(linears) == 3

    def run(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        for linear in linears:
            linear(x[..., :1024])

    return [block.self_attn.register_forward_hook(run) for block in patcher.model.diffusion_model.blocks]


def compare(patcher, count: list[int]) -> dict:
    """The same sampling both ways."""
    from lowbit.host.memory.manager import manage
    from lowbit.memory.policies import Settings

    found = {}
    for name in ("behind", "ahead"):
        before = count[0]
        found[name] = (*timed(manage(patcher, None, None, Settings(policy=name), "1")[0]), count[0] - before)
    return {
        "equal": torch.equal(found["ahead"][0], found["behind"][0]),
        "finite": bool(found["ahead"][0].isfinite().all()),
        "fetched": [found[name][2] for name in ("behind", "ahead")],
        "seconds": [found[name][1] for name in ("behind", "ahead")],
    }


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        start_core(["--base-directory", folder])
        import comfy.model_management

        from lowbit.host.weights.loading import load_diffusion_model
        from lowbit.host.weights.preparing import Request, plan_diffusion_model, prepared_file
        from testing.shims import detection

        detection.install()
        streaming_policies()
        model, lora = write_models(Path(folder))
        count, rows = counting(), {}
        for name in ("none", "int8_convrot_fast", "fp8_e4m3fn_scaled"):
            path = model if name == "none" else prepared_file(plan_diffusion_model(model, Request(name)))
            patcher = load_diffusion_model(str(path))
            resident, _ = timed(patcher)
            rows[name] = compare(patcher, count)
            rows[name]["as_resident"] = torch.equal(sample(patcher), resident)
            rows[f"{name}, LoRA"] = compare(with_lora(patcher, lora), count)
            others = load_diffusion_model(str(model))
            comfy.model_management.load_models_gpu([others])
            others._vbar_get().set_watermark(0)
            hooks = strangers(patcher, others)
            rows[f"{name}, strangers"] = compare(patcher, count)
            for hook in hooks:
                hook.remove()
            comfy.model_management.unload_all_models()
        out.write_text(json.dumps(rows, indent=1))
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
