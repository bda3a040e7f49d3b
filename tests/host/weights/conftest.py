"""The host modules on ComfyUI's CPU setting, for tests that need core's classes but no server."""

from __future__ import annotations

import types

import pytest
import torch

from testing import tiny


@pytest.fixture(scope="module")
def host(core_modules, tmp_path_factory):
    """The host modules with ComfyUI on its CPU setting, and a folder with tiny checkpoints and a cache of its own."""
    from lowbit.host.weights import feed_forward, folders, loading, operations, patching, preparing, quantizing, saving

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
                loading=loading,
                operations=operations,
                patching=patching,
                preparing=preparing,
                quantizing=quantizing,
                saving=saving,
            )
