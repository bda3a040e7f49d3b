"""Models in two processes on the CPU: one worker for every test of the folder, and what one process makes of the same run."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from testing import tiny

HEADS = 5
"""Which two processes cannot share evenly."""
WAN = {"dim": 160, "ffn": 320, "heads": HEADS, "text": 64}
CONFIGS = {
    "wan": tiny.wan.WanConfig(**WAN),
    "wan_i2v": tiny.wan.WanConfig(**WAN, in_channels=36, image_embedding=True),
    "wan_5b": tiny.wan.WanConfig(**WAN, in_channels=48, out_channels=48),
}
CPUS = (torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(scope="package")
def host(core_modules, tmp_path_factory):
    """The host's modules, and a folder of tiny checkpoints."""

    from lowbit.host import dividing, model_copy
    from lowbit.host.several_gpus import forward, process, team
    from lowbit.host.weights import loading, preparing
    from testing.shims import detection

    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        tiny.write_file(folder / f"{name}.safetensors", tiny.draw(tiny.wan.shapes(config)), config.metadata())
    qwen = tiny.qwen_image.QwenImageConfig(heads=3, layers=2)
    tensors = tiny.draw(tiny.qwen_image.shapes(qwen))
    tiny.write_file(folder / "qwen.safetensors", tensors)
    marked = tensors | {"__index_timestep_zero__": torch.zeros(0)}
    tiny.write_file(folder / "qwen_edit.safetensors", marked)
    talk = tiny.infinitetalk.InfiniteTalkConfig()
    matching = tiny.infinitetalk.matching_wan(talk)
    tiny.write_file(folder / "talk.safetensors", tiny.draw(tiny.wan.shapes(matching)), matching.metadata())
    tiny.write_file(folder / "talk_patch.safetensors", tiny.draw(tiny.infinitetalk.shapes(talk)))
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setenv("LOWBIT_CACHE_DIR", str(folder / "cache"))
        patch.setenv("LOWBIT_TEST_FAULT", str(folder / "fault"))
        patch.setattr(process, "_START", Path(__file__).with_name("start_tiny_worker.py"))
        detection.install(patch.setattr)
        yield types.SimpleNamespace(
            folder=folder,
            dividing=dividing,
            model_copy=model_copy,
            forward=forward,
            team=team,
            process=process,
            loading=loading,
            preparing=preparing,
        )
        for workers in dividing._TEAMS.values():
            workers.close()
        dividing._TEAMS.clear()


@pytest.fixture(scope="package")
def load(host) -> Callable[..., object]:
    """Loads a tiny model by name, once, so that its worker lives as long."""
    loaded: dict[tuple[str, str | None], object] = {}

    def load(name: str, weights: str | None = None):
        if (name, weights) not in loaded:
            path = host.folder / f"{name}.safetensors"
            if weights is not None:
                planned = host.preparing.plan_diffusion_model(path, host.preparing.Request(weights))
                path = host.preparing.prepared_file(planned)
            loaded[name, weights] = host.loading.load_diffusion_model(str(path))
        return loaded[name, weights].clone()

    yield load
    loaded.clear()
    gc.collect()


@pytest.fixture
def divide(host):
    """A model on two processes of the CPU; what it says to the user is in `divide.said`."""
    said: list[str] = []

    def divide(model, split: str = "sequence"):
        return host.dividing.divide(model, CPUS, split, said.append)

    divide.said = said
    return divide


@pytest.fixture
def workers(host):
    """The one team of these tests."""
    return lambda: host.dividing._TEAMS[CPUS]


@pytest.fixture
def parts(host, monkeypatch):
    """What the other process was given to do, as the names of groups."""
    given: list[str] = []
    send = host.team.Team.send

    def counted(self, model, call, part):
        given.append(part.split)
        send(self, model, call, part)

    monkeypatch.setattr(host.team.Team, "send", counted)
    return given
