"""Custom nodes for tests: a fake GPU, out-of-memory errors on purpose, a leak, and facts about ComfyUI's memory state.

The fake GPU is main memory that is counted as if it were a card's: models that ComfyUI calls loaded count as on it, and
so does working memory while a model runs. Its name in reports says what it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import os
import sys
from collections import Counter
from pathlib import Path

import comfy.model_management
import folder_paths
import psutil
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

FAKE_NAME = "fake device (host memory)"
MIB = 1 << 20
ANY = "*"


class _Any(str):
    def __ne__(self, other):
        return False


ANY = _Any("*")


@functools.cache
def pack_module(name):
    """A module of the pack, which ComfyUI has imported by path."""
    return next(module for key, module in sys.modules.items() if key.endswith(f"lowbit.{name}"))


class FakeGpu:
    """A device whose numbers follow ComfyUI's books: resident weights, plus `working` bytes and `idle` ones."""

    name = FAKE_NAME
    torch_device = torch.device("cpu")
    holds_models = True

    def __init__(self, total):
        self._total, self.working, self.idle, self._peak, self.clearings = total, 0, 0, 0, 0
        self.kept = []

    def read(self):
        module = pack_module("host.memory.loaded_models")
        weights = sum(module.component_bytes(self.torch_device).values())
        allocated = weights + self.working + sum(tensor.nbytes for tensor in self.kept)
        self._peak = max(self._peak, allocated)
        reserved = allocated + self.idle
        reading = pack_module("memory.devices").Reading
        return reading(allocated, reserved, self._peak, max(0, self._total - reserved))

    def reset_peak(self):
        self._peak = 0

    def total(self):
        return self._total

    def clear(self):
        self.idle = 0
        self.clearings += 1


class TestDevice:
    """From here on the pack measures a fake GPU of `mib`, or the real device with 0. Passes the value on."""

    CATEGORY, FUNCTION, RETURN_TYPES = "lowbit/test", "use", (ANY,)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": (ANY,), "mib": ("FLOAT", {"max": 1e6}), "idle_mib": ("FLOAT", {"max": 1e6})}}

    @classmethod
    def IS_CHANGED(cls, **inputs):  # noqa: N802
        return float("nan")

    def use(self, value, mib, idle_mib):
        sessions = pack_module("host.memory.session")
        sessions.session().limit.remove()
        core_device = sessions._core_device()
        current = sessions.Session(FakeGpu(int(mib * MIB)) if mib else core_device)
        sessions._SESSIONS[sessions._HANDLER] = current
        if mib:
            current.device.idle = int(idle_mib * MIB)
        return (value,)


@contextlib.contextmanager
def _little_memory(nbytes):
    """PyTorch may take no more than this of the GPU beside what it holds, so that it runs out by itself."""
    torch.cuda.empty_cache()
    most = torch.cuda.memory_reserved() + nbytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / torch.cuda.mem_get_info()[1]))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class _Faults:
    """Raises while it has errors left, once its call number has come; with `real`, lets the call run out by itself."""

    def __init__(self, at, times, real=False):
        self.at, self.left, self.calls, self.batches, self.real = at, times, 0, [], real

    def __deepcopy__(self, memo):
        return self

    def is_due(self):
        self.calls += 1
        due = self.calls >= self.at and self.left > 0
        self.left -= due
        return due

    def maybe(self):
        if self.is_due():
            raise torch.OutOfMemoryError("CUDA out of memory. (injected by a test)")

    def apply_model(self, executor, x, *args, **kwargs):
        self.batches.append(x.shape[0])
        device = pack_module("host.memory.session").session().device
        working = x.shape[0] * 3 * MIB
        if isinstance(device, FakeGpu):
            device.working += working
            device.read()
        try:
            if self.real and self.is_due():
                with _little_memory(96 * MIB):
                    return executor(x, *args, **kwargs)
            if not self.real:
                self.maybe()
            return executor(x, *args, **kwargs)
        finally:
            if isinstance(device, FakeGpu):
                device.working -= working

    def on_load(self, *args):
        self.maybe()


class TestOutOfMemory:
    """The model runs out of memory `times` times: when it loads, or from model call `call` on. Counts batch sizes.

    `real` (needs a GPU): not by an error that is raised, but in the middle of the call, by too little memory.
    """

    CATEGORY, FUNCTION, RETURN_TYPES = "lowbit/test", "patch", ("MODEL",)
    made: dict = {}

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        at = ("load", "call", "real", "nowhere")
        return {
            "required": {
                "model": ("MODEL",),
                "at": (at,),
                "call": ("INT", {"max": 999}),
                "times": ("INT", {"max": 999}),
                "name": ("STRING", {}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **inputs):  # noqa: N802
        return float("nan")

    def patch(self, model, at, call, times, name):
        faults = _Faults(call if at in ("call", "real") else 1, times if at != "nowhere" else 0, at == "real")
        self.made[name] = faults
        model = model.clone()
        if at == "load":
            # What is loaded already would not load again.
            comfy.model_management.unload_all_models()
            model.add_callback_with_key(CallbacksMP.ON_LOAD, "test", faults.on_load)
        else:
            model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", faults.apply_model)
        return (model,)


class TestOutOfMemoryEncoder:
    """The text encoder runs out of memory `times` times when it encodes."""

    CATEGORY, FUNCTION, RETURN_TYPES = "lowbit/test", "patch", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"clip": ("CLIP",), "times": ("INT", {"max": 999})}}

    @classmethod
    def IS_CHANGED(cls, **inputs):  # noqa: N802
        return float("nan")

    def patch(self, clip, times):
        model, faults = clip.cond_stage_model, _Faults(1, times)
        original = type(model).encode_token_weights.__get__(model)

        def encode_token_weights(*args, **kwargs):
            faults.maybe()
            return original(*args, **kwargs)

        model.encode_token_weights = encode_token_weights
        return (clip,)


class TestOutOfMemoryVAE:
    """The VAE's decoder runs out of memory `times` times: at any latent of more than `most` pixels along its width."""

    CATEGORY, FUNCTION, RETURN_TYPES = "lowbit/test", "patch", ("VAE",)
    made: dict = {}

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {
            "required": {
                "vae": ("VAE",),
                "times": ("INT", {"max": 999}),
                "most": ("INT", {"max": 999}),
                "name": ("STRING", {}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **inputs):  # noqa: N802
        return float("nan")

    def patch(self, vae, times, most, name):
        model = vae.first_stage_model
        original = type(model).decode.__get__(model)
        faults = _Faults(1, times)
        self.made[name] = faults

        def decode(z, *args, **kwargs):
            faults.batches.append(z.shape[-1])
            if z.shape[-1] > most:
                faults.maybe()
            return original(z, *args, **kwargs)

        model.decode = decode
        return (vae,)


class TestLeak:
    """Keeps `mib` of tensors more each time it runs, on the fake GPU's account."""

    CATEGORY, FUNCTION, RETURN_TYPES = "lowbit/test", "leak", (ANY,)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": (ANY,), "mib": ("FLOAT", {"max": 1e6})}}

    @classmethod
    def IS_CHANGED(cls, **inputs):  # noqa: N802
        return float("nan")

    def leak(self, value, mib):
        device = pack_module("host.memory.session").session().device
        device.kept.append(torch.ones(int(mib * MIB), dtype=torch.uint8))
        return (value,)


class Mallinfo(ctypes.Structure):
    """The C library's account of its heap (mallinfo2 of glibc 2.33)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def allocated_bytes() -> int:
    """What the process has allocated and not freed; where the C library does not say, what is resident."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if os.name == "posix" else None
    if mallinfo is None:
        return psutil.Process().memory_info().rss
    mallinfo.restype = Mallinfo
    heap = mallinfo()
    return heap.uordblks + heap.hblkhd


class TestMemoryState:
    """Writes output/{name}.json: what ComfyUI's accounting is set to and what is loaded.

    With `count`, garbage is collected first and the pack's objects that live are counted.
    """

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "lowbit/test", "write", (), True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": (ANY,), "name": ("STRING", {}), "count": ("BOOLEAN", {})}}

    @classmethod
    def IS_CHANGED(cls, **inputs):  # noqa: N802
        return float("nan")

    def write(self, value, name, count):
        if count:
            gc.collect()
        management = comfy.model_management
        components = pack_module("host.memory.loaded_models")
        session = pack_module("host.memory.session").session()
        living = Counter(map(type, gc.get_objects())) if count else {}
        kinds = {kind.__name__: number for kind, number in living.items() if ".host.memory" in str(kind.__module__)}
        state = {
            "hooked": [
                n
                for n in ("get_free_memory", "get_total_memory")
                if "host.memory.limit" in getattr(management, n).__module__
            ],
            "free": management.get_free_memory(torch.device("cpu")),
            "reserve": management.EXTRA_RESERVED_VRAM,
            "limit": session.limit.nbytes,
            "loaded": components.component_bytes(session.device.torch_device),
            "allocated": allocated_bytes(),
            "objects": kinds,
            "batches": {key: faults.batches for key, faults in TestOutOfMemory.made.items()},
            "decoded": {key: faults.batches for key, faults in TestOutOfMemoryVAE.made.items()},
            "clearings": getattr(session.device, "clearings", None),
            "overridden": [
                type(patcher.model).__name__
                for patcher in components.loaded_patchers()
                if "get_free_memory" in vars(patcher)
            ],
        }
        path = Path(folder_paths.get_output_directory()) / f"{name}.json"
        path.write_text(json.dumps(state))
        return {"ui": {"state": [str(path)]}}


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        TestDevice,
        TestOutOfMemory,
        TestOutOfMemoryEncoder,
        TestOutOfMemoryVAE,
        TestLeak,
        TestMemoryState,
    )
}
