"""Which GPUs the node takes, and what it does where there is one."""

from __future__ import annotations

import types

import pytest
import torch

from lowbit.errors import CapabilityError

OWN = torch.device("cuda:1")
PRESENT = [torch.device(f"cuda:{index}") for index in range(4)]


@pytest.fixture
def devices_of(core_modules, monkeypatch):
    import comfy.model_management

    from lowbit.host import dividing

    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *_, **__: PRESENT)
    return dividing.devices_of


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [("auto", [1, 0, 2, 3]), ("", [1, 0, 2, 3]), ("0, 1", [1, 0]), ("3", [1, 3]), (" 1 ", [1]), ("2;2;0", [1, 2, 0])],
)
def test_the_models_own_gpu_comes_first(devices_of, gpus, expected):
    assert [device.index for device in devices_of(gpus, OWN)] == expected


@pytest.mark.parametrize(("gpus", "named"), [("0, 7", "7"), ("all", "all"), ("cuda:0", "cuda:0"), ("0-2", "0-2")])
def test_a_gpu_that_is_not_there_is_named(devices_of, gpus, named):
    with pytest.raises(CapabilityError, match=rf'no GPU "{named}", since ComfyUI sees 0, 1, 2, 3'):
        devices_of(gpus, OWN)


def test_one_device_changes_nothing_and_says_so(host, load, divide):
    said = []
    model = load("wan")
    divided = host.dividing.divide(model, [torch.device("cpu")], "auto", said.append)
    assert divided.wrappers == model.wrappers
    assert said == ["Several GPUs: there is one device to sample on, so nothing is changed."]


def test_the_node_on_a_cpu_changes_nothing(host, load, monkeypatch, caplog):
    from lowbit.nodes.several_gpus import SeveralGPUs

    monkeypatch.setattr(SeveralGPUs, "hidden", types.SimpleNamespace(unique_id=None))
    model = load("wan")
    (divided,) = SeveralGPUs.execute(model, "auto", "auto").args
    assert divided is not model
    assert divided.wrappers == model.wrappers
    assert "there is one device to sample on, so nothing is changed" in caplog.text


def test_a_pytorch_without_nccl_changes_nothing_and_says_so(core_modules, monkeypatch):
    from lowbit.host import dividing

    assert dividing.why_not([torch.device("cpu")] * 2) is None
    monkeypatch.setattr(dividing.distributed, "is_nccl_available", lambda: False)
    assert "no NCCL" in dividing.why_not(PRESENT)


def test_every_worker_ends_before_python_does(core_modules, monkeypatch):
    """tests/gpu has a ComfyUI that ends with a group of GPUs."""
    from lowbit.host import dividing

    closed = []
    teams = {name: types.SimpleNamespace(close=lambda name=name: closed.append(name)) for name in ("two", "four")}
    monkeypatch.setattr(dividing, "_TEAMS", teams)
    dividing.close_all()
    assert closed == ["two", "four"]
