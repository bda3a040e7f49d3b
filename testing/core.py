"""Starts ComfyUI's core in this process as its main.py does, dynamic VRAM included, but without the server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start_core(options: list[str]) -> None:
    """Import ComfyUI with `options` and switch dynamic VRAM on where main.py would."""
    sys.path.insert(0, os.environ.get("COMFYUI_PATH") or str(Path.home() / "ComfyUI"))
    # Last: the repository's own `nodes` folder must not shadow core's module.
    sys.path.append(str(ROOT))
    sys.argv = ["main.py", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy_aimdo.control
    from comfy.cli_args import enables_dynamic_vram

    if enables_dynamic_vram():
        comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    if enables_dynamic_vram() and comfy.model_management.is_nvidia():
        devices = ((device.index, 0) for device in comfy.model_management.get_all_torch_devices())
        if comfy_aimdo.control.init_devices(devices):
            # It starts out telling Python's logging about every page fault.
            comfy_aimdo.control.set_log_info()
            comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
            comfy.memory_management.aimdo_enabled = True
