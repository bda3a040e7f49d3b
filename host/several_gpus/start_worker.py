"""The worker's first file, run by its path: brings up ComfyUI's core as its main.py does, without nodes and server."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import logging
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PACK = "lowbit_worker"
_DRIVER = "libcuda.so.1"
_LOOK_FOR_PARENT = 2.0
"""Seconds; a process that ComfyUI has forked may hold the socket open after its death."""


def end_with(parent: int) -> None:
    """Ends this process once its parent is another than ComfyUI, which may die while Python imports."""
    while os.getppid() == parent:
        time.sleep(_LOOK_FOR_PARENT)
    os._exit(0)


def make_context() -> None:
    """The context of the first GPU that this process sees: it takes seconds, in which Python imports, and PyTorch finds it there."""
    with contextlib.suppress(OSError):  # no driver: PyTorch will say so
        driver, context = ctypes.CDLL(_DRIVER), ctypes.c_void_p()
        if driver.cuInit(0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)


def start_core(told: dict[str, Any], context: threading.Thread | None = None) -> None:
    """Core with the settings of ComfyUI's command line, dynamic VRAM included where ComfyUI has it, once there is a context."""
    from comfy.cli_args import PerformanceFeature, args, enables_dynamic_vram

    vars(args).update(told["settings"])
    args.fast = {PerformanceFeature(name) for name in told["fast"]}
    if enables_dynamic_vram():
        import comfy_aimdo.control

        headroom = None if args.reserve_vram is None else int(args.reserve_vram * 1024**3)
        try:
            comfy_aimdo.control.init(simple_vram_headroom=headroom, nvml_pressure=not args.disable_nvml_pressure)
        except TypeError:  # an older comfy-aimdo
            comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    if context is not None:
        context.join()
    if told["dynamic_vram"]:
        index = comfy.model_management.get_torch_device().index
        try:
            working = comfy_aimdo.control.init_devices([(index, int(args.vram_headroom * 1024**3))])
        except TypeError:  # an older comfy-aimdo
            working = comfy_aimdo.control.init_devices([index])
        if working:
            # It starts out telling Python of every weight's pages, which takes the processor's time at each of them.
            comfy_aimdo.control.set_log_warning()
            comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
            comfy.memory_management.aimdo_enabled = True


def import_pack(folder: Path, name: str) -> None:
    """The pack as a package of a name that an import statement can say."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def main() -> None:
    """Takes the numbers of its socket and of ComfyUI's process from the command line, and everything else from the socket."""
    reached = {"Python": time.time()}
    threading.Thread(target=end_with, args=(int(sys.argv[2]),), daemon=True).start()
    # What imports make stays: to look through it for garbage again and again is a fifth of their time.
    gc.disable()
    sys.path.pop(0)  # this folder, whose files would hide others
    # Ctrl-C reaches every process of a terminal; ComfyUI decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    told = json.loads(connection.recv_bytes())[0]
    context = threading.Thread(target=make_context, daemon=True) if told["cuda"] else None
    if context is not None:
        context.start()
    logging.basicConfig(level=logging.WARNING, format=f"[{told['name']}] %(message)s")
    sys.path.insert(0, told["comfyui"])
    os.chdir(told["comfyui"])
    importlib.import_module("torch")
    reached["PyTorch"] = time.time()
    start_core(told, context)
    reached["ComfyUI"] = time.time()
    import_pack(Path(told["pack"]), PACK)
    worker = importlib.import_module(f"{PACK}.host.several_gpus.worker")
    gc.freeze()
    gc.enable()
    worker.serve(connection, reached)


if __name__ == "__main__":
    main()
