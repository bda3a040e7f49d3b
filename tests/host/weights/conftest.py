"""The host modules on ComfyUI's CPU setting, for tests that need core's classes but no server."""

from __future__ import annotations

import types

import pytest
import torch

from testing import tiny


@pytest.fixture(scope="module")
def host(core_modules, tmp_path_factory):
    """The host modules with ComfyUI on its CPU setting, and a folder with tiny checkpoints and a cache of its own."""
    from lowbit.host.weights import (
        feed_forward,
        folders,
        input_groups,
        loading,
        opaque_layer,
        operations,
        patching,
        preparing,
        quantizing,
        resident,
        saving,
    )

    folder = tmp_path_factory.mktemp("models")
    for name in ("wan_t2v.safetensors", "qwen_image.safetensors"):
        tiny.write(f"diffusion_models/{name}", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_CACHE_DIR", str(folder / "cache"))
        with torch.inference_mode():
            yield types.SimpleNamespace(
                folder=folder / "diffusion_models",
                feed_forward=feed_forward,
                folders=folders,
                input_groups=input_groups,
                loading=loading,
                opaque_layer=opaque_layer,
                operations=operations,
                patching=patching,
                preparing=preparing,
                quantizing=quantizing,
                resident=resident,
                saving=saving,
            )


@pytest.fixture
def umt5(host, monkeypatch, tmp_path):
    """Loads the tiny UMT5 in a format through the host's loader."""
    import comfy.sd

    from testing.shims import detection

    detection.install(monkeypatch.setattr)

    def load(name: str):
        source = tiny.write("text_encoders/umt5.safetensors", tmp_path)
        planned = host.preparing.plan_diffusion_model(source, host.preparing.Request(name))
        return host.loading.load_text_encoder([str(host.preparing.prepared_file(planned))], comfy.sd.CLIPType.WAN)

    return load
