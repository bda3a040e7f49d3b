"""A worker that knows the tiny checkpoints' dimensions and fails when a file says so, and otherwise starts as every worker does."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
START = ROOT / "host" / "several_gpus" / "start_worker.py"

spec = importlib.util.spec_from_file_location("start_worker", START)
start_worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(start_worker)
start_core = start_worker.start_core


def start_tiny_core(told, context) -> None:
    start_core(told, context)
    sys.path.append(str(ROOT))
    from testing.shims import detection

    detection.install()
    fail_on_demand()


def fail_on_demand() -> None:
    """Wan's forward fails once, as the file LOWBIT_TEST_FAULT says."""
    import torch
    from comfy.ldm.wan.model import WanModel

    forward = WanModel.forward_orig
    errors = {"memory": torch.OutOfMemoryError("CUDA out of memory."), "error": ValueError("a broken weight")}

    def failing(self, *args, **kwargs):
        fault = Path(os.environ["LOWBIT_TEST_FAULT"])
        if fault.exists():
            name = fault.read_text()
            fault.unlink()
            raise errors[name]
        return forward(self, *args, **kwargs)

    WanModel.forward_orig = failing


start_worker.start_core = start_tiny_core
start_worker.main()
