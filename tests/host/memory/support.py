"""What the tests of the memory hooks share: the host modules on the CPU, a fake device, and patchers loaded on it."""

from __future__ import annotations

import types

import pytest
import torch

from lowbit.memory.components import AUDIO_ENCODER, DIFFUSION_MODEL, MODEL_PATCH, TEXT_ENCODER, VAE
from lowbit.memory.devices import Reading
from lowbit.memory.policies import Settings

from ...memory.fakes import FakeDevice

GIB = 1 << 30


@pytest.fixture(scope="module")
def host(core_modules):
    """The host modules, with ComfyUI on its CPU setting."""
    import comfy.memory_management
    import comfy.model_base
    import comfy.model_management

    from lowbit.host.memory import (
        decoding,
        encoding,
        limit,
        loaded_models,
        meter,
        preflight,
        release,
        room,
        sampling,
        session,
    )

    return types.SimpleNamespace(
        Reading=Reading,
        core=comfy.model_management,
        core_memory=comfy.memory_management,
        base_model=comfy.model_base.BaseModel,
        components=loaded_models,
        decoding=decoding,
        encoding=encoding,
        limit=limit,
        meter=meter,
        preflight=preflight,
        release=release,
        room=room,
        sampling=sampling,
        session=session,
    )


@pytest.fixture
def device(host):
    """A fake device that the session measures."""
    fake = FakeDevice(24 * GIB)
    current = host.session._SESSIONS[host.session._HANDLER] = host.session.Session(fake)
    yield fake
    current.limit.remove()
    host.session._SESSIONS.clear()


class FakePatcher:
    """A patcher with 2 GiB of weights on its device, pinned in main memory; its calls are written down."""

    def __init__(self, model, load_device, size=2 * GIB, dynamic=True):
        self.model, self.load_device, self.offload_device = model, load_device, torch.device("cpu")
        self.size, self.loaded, self.pinned, self.calls, self.dynamic = size, size, size, [], dynamic

    def model_size(self):
        return self.size

    def loaded_size(self):
        return self.loaded

    def is_dynamic(self):
        return self.dynamic

    def partially_unload(self, device, nbytes):
        self.calls.append((device, nbytes))
        freed = min(self.loaded, nbytes)
        self.loaded -= freed
        return freed

    def partially_unload_ram(self, nbytes):
        raise AssertionError("pinned memory must stay")

    def detach(self, *args):
        raise AssertionError("a release keeps the model in core's list")


def stepping(dynamic):
    """What core's sampler calls for a step, as far as the hooks look at it."""
    patcher = types.SimpleNamespace(
        model=torch.nn.Module(),
        load_device=torch.device("meta"),
        is_dynamic=lambda: dynamic,
        get_nested_additional_models=list,
        model_patches_models=list,
    )
    return types.SimpleNamespace(current_patcher=patcher)


def model_of(host, component):
    """An object of a class that core would make for this component."""
    homes = {
        TEXT_ENCODER: ("comfy.text_encoders.wan", "WanT5Model"),
        AUDIO_ENCODER: ("comfy.audio_encoders.wav2vec2", "Wav2Vec2Model"),
        MODEL_PATCH: ("comfy_extras.nodes_model_patch", "MultiTalkModelPatch"),
        VAE: ("comfy.ldm.wan.vae", "WanVAE"),
    }
    if component == DIFFUSION_MODEL:
        model = object.__new__(host.base_model)
        torch.nn.Module.__init__(model)
        return model
    module, name = homes[component]
    return type(name, (torch.nn.Module,), {"__module__": module})()


@pytest.fixture
def loaded(host, device, monkeypatch):
    """One loaded model of each component on the device."""
    patchers = {
        name: FakePatcher(model_of(host, name), device.torch_device)
        for name in (DIFFUSION_MODEL, TEXT_ENCODER, AUDIO_ENCODER, MODEL_PATCH, VAE)
    }
    books = [types.SimpleNamespace(model=patcher) for patcher in patchers.values()]
    monkeypatch.setattr(host.core, "current_loaded_models", books)

    def count():
        device.allocated = device.reserved = sum(patcher.loaded for patcher in patchers.values())
        return FakeDevice.read(device)

    monkeypatch.setattr(device, "read", count)
    return patchers


def hooks(host, **settings):
    return host.sampling.MemoryHooks(Settings(**settings), "7")
