"""Samples on two GPUs in a ComfyUI of this process: formats, a LoRA, an interrupt, a worker that dies.

    python tests/gpu/several_gpus_process.py OUT.json [ComfyUI options, e.g. --disable-dynamic-vram]

It starts core as main.py does (dynamic VRAM included) but without the server, and writes what it saw as JSON. A stage that
fails does not keep the next from its turn; one that hangs ends with the stacks of every process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from testing.core import start_core  # noqa: E402
from testing.in_the_middle import in_the_middle  # noqa: E402

STEPS = 3
CFG = 3.0
LATENT = (1, 16, 5, 32, 52)
FORMATS = (None, "int8", "int8_convrot_fast", "fp8_e4m3fn_scaled_fast", "fp4_scaled")
LONGEST_STAGE = 120.0
"""Seconds: a worker starts and both processes compile their kernels."""
DUMPED = 3.0
GONE = 20.0


class Stages:
    """What was found, written down after each stage.

    Args:
        out: the JSON file.
        found: filled by the stages.
    """

    def __init__(self, out: Path, found: dict[str, Any]):
        self._out, self._found = out, found
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Runs a stage. What it raises is written down, and ends nothing but the stage."""
        print(f"{time.perf_counter() - self._began:7.1f} s: {name}", file=sys.stderr, flush=True)
        limit = threading.Timer(LONGEST_STAGE, self._hung, [name])
        limit.daemon = True
        limit.start()
        try:
            yield
        except Exception:
            text = traceback.format_exc()
            print(text, file=sys.stderr, flush=True)
            self._found["failed"][name] = text
        finally:
            limit.cancel()
            self._write()

    def _hung(self, name: str) -> None:
        """Ends this process: its workers say where they are and go, then it does."""
        from lowbit.host.dividing import _TEAMS

        print(f"{name} took longer than {LONGEST_STAGE:.0f} s", file=sys.stderr, flush=True)
        for worker in [worker for team in _TEAMS.values() for worker in team.workers]:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGABRT)
        time.sleep(DUMPED)
        faulthandler.dump_traceback(all_threads=True)
        self._found["failed"][name] = f"hung for {LONGEST_STAGE:.0f} s"
        self._write()
        os._exit(1)

    def _write(self) -> None:
        self._out.write_text(json.dumps(self._found))


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


def sample(model: Any, steps: int = STEPS, nudge: float = 1.0) -> torch.Tensor:
    """Some Euler steps from fixed noise, with two prompts. nudge: what the noise is multiplied by."""
    import comfy.sample

    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(LATENT, generator=generator) * nudge
    prompts = [[[torch.randn(1, 32, 256, generator=generator), {}]] for _ in range(2)]
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(
        model, noise, steps, CFG, "euler", "simple", *prompts, latent, seed=5, disable_pbar=True
    ).float().cpu()  # fmt: skip


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def failure(model: Any, act: Any) -> dict[str, Any]:
    """What sampling raises when `act` happens in the middle of a step, and how long that took."""
    began, raised = time.perf_counter(), None
    try:
        with in_the_middle(model, act):
            sample(model)
    except BaseException as error:  # noqa: BLE001
        raised = [type(error).__name__, str(error)]
    return {"raised": raised, "seconds": time.perf_counter() - began}


def _after(meeting: Any, pid: int) -> Any:
    """The meeting, when the process is gone that is to be met."""

    def late(groups: Any) -> Any:
        os.kill(pid, signal.SIGKILL)
        return meeting(groups)

    return late


def run(stages: Stages, found: dict[str, Any], paths: dict[str, Path], folder: Path, left: list[Any]) -> None:
    """Everything that the tests look at. left: a model that stays for the end of the process."""
    import comfy.model_management as management

    from lowbit.host.dividing import _TEAMS, divide
    from lowbit.host.several_gpus import process_group

    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    models: list[Any] = []  # as long as one is there, so are the workers
    for weights in FORMATS:
        for strength in (0.0, 0.6):
            with stages.stage(f"{weights or 'bf16'}, LoRA {strength}, one GPU"):
                model = load(paths["wan"], weights, folder)
                models.append(with_lora(model, strength) if strength else model)
                alone = sample(models[-1])
                # What a trifle in the input comes to is the noise of the format.
                noise = error(sample(models[-1], nudge=1 + 1e-6), alone)
            for split in ("sequence", "cfg"):
                with stages.stage(f"{weights or 'bf16'}, LoRA {strength}, {split}"):
                    divided = divide(models[-1], devices, split, found["said"].append)
                    row = {"weights": weights, "lora": strength, "split": split, "noise": noise}
                    row |= {"error": error(sample(divided), alone), "again": error(sample(divided), alone)}
                    found["rows"].append(row)
                    print(row, file=sys.stderr, flush=True)
    team = _TEAMS[tuple(devices)]
    alone, divided = sample(models[0]), divide(models[0], devices, "sequence", found["said"].append)
    with stages.stage("interrupt"):
        sample(divided)
        pid = team.workers[0].process.pid
        found["interrupt"] = failure(divided, lambda: management.interrupt_current_processing(True))
        found["interrupt"] |= {"after": error(sample(divided), alone), "same": team.workers[0].process.pid == pid}
    with stages.stage("a worker that dies"):
        pid = team.workers[0].process.pid
        found["death"] = failure(divided, lambda: os.kill(pid, signal.SIGKILL))
        found["death"] |= {"after": error(sample(divided), alone), "same": team.workers[0].process.pid == pid}
    with stages.stage("a worker that dies while processes meet"):
        pid = team.workers[0].process.pid
        team.leave()
        with patch.object(process_group, "Meeting", side_effect=_after(process_group.Meeting, pid)):
            found["death while meeting"] = failure(divided, lambda: None)
        found["death while meeting"] |= {"after": error(sample(divided), alone)}
    with stages.stage("the last model goes"):
        process = team.workers[0].process
        del model, divided
        models.clear()
        management.unload_all_models()
        gc.collect()
        found["gone"] = process.wait(GONE)
    with stages.stage("one is there at the end"):
        left.append(divide(load(paths["wan"], None, folder), devices, "auto", found["said"].append))
        sample(left[0])


def main() -> None:
    out, *options = sys.argv[1:]
    faulthandler.enable()
    os.environ["PYTHONFAULTHANDLER"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOWBIT_CACHE_DIR"] = str(Path(folder) / "cache")
        start_core(["--base-directory", folder, *options])
        import comfy.memory_management

        found: dict[str, Any] = {"dynamic": comfy.memory_management.aimdo_enabled, "rows": [], "said": [], "failed": {}}
        left: list[Any] = []
        with torch.inference_mode():
            run(Stages(Path(out), found), found, write_models(Path(folder)), Path(folder), left)


if __name__ == "__main__":
    main()
