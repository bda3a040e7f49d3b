"""Claims about the time of a step: measured once a shape and format, kept, and never made up."""

from __future__ import annotations

import types

import pytest
import torch

from lowbit.ops.device_info import DeviceInfo
from lowbit.ops.trade import StepProduct

pytestmark = pytest.mark.headless

CUDA = torch.device("cuda", 0)
PRODUCTS = [
    StepProduct(4096, (512, 256), "int8_convrot_fast"),
    StepProduct(4096, (512, 256), "int8_convrot_fast"),
    StepProduct(4096, (256, 512), "int4_asym_fast"),
    StepProduct(1, (64, 64), "keep"),
]
MEMORY = 16 << 30


def plan(nbytes: int, kind: str = "diffusion_model"):
    return types.SimpleNamespace(nbytes_after=nbytes, family=types.SimpleNamespace(kind=kind))


@pytest.fixture
def gpu(core_modules, monkeypatch):
    """A GPU on which every product takes 2 ms, and the copy 10: what was timed."""
    import comfy.model_management

    from lowbit.host.weights import linear_times

    timed = []

    def milliseconds(calls, device):
        timed.extend(calls)
        return {name: call() for name, call in calls.items()}, {}

    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *given: None)
    monkeypatch.setattr(linear_times, "detect", lambda device: types.SimpleNamespace(fingerprint=lambda: "this GPU"))
    monkeypatch.setattr(linear_times, "device_info", lambda device: DeviceInfo("GPU", (8, 9), MEMORY))
    monkeypatch.setattr(linear_times, "milliseconds", milliseconds)
    monkeypatch.setattr(linear_times, "_product_call", lambda product, device: lambda: 2.0)
    monkeypatch.setattr(linear_times, "_copy_call", lambda device: lambda: 10.0)
    return types.SimpleNamespace(module=linear_times, timed=timed)


def test_a_step_is_the_sum_of_its_products_each_timed_once(gpu, tmp_path):
    def step(products=PRODUCTS):
        return gpu.module.step_milliseconds(plan(MEMORY), products, device=CUDA, folder=tmp_path)

    assert step() == pytest.approx(8.0)
    assert len(gpu.timed) == 4, "three shapes and the copy"
    assert step() == pytest.approx(8.0)
    assert len(gpu.timed) == 4, "they are kept"
    assert step([*PRODUCTS, StepProduct(1, (64, 64), "int8")]) == pytest.approx(10.0)
    assert len(gpu.timed) == 5
    assert [path.name for path in tmp_path.iterdir()] == [gpu.module.FILE_NAME]


def test_what_does_not_fit_streams_meanwhile(gpu, tmp_path):
    def step(nbytes):
        return gpu.module.step_milliseconds(plan(nbytes), PRODUCTS, device=CUDA, folder=tmp_path)

    per_byte = 10.0 / gpu.module._COPIED_BYTES
    assert step(MEMORY + 1000) == pytest.approx(8.0)
    assert step(MEMORY + (1 << 30)) == pytest.approx(per_byte * (1 << 30))


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("full"), RuntimeError("cannot pin"), None])
def test_what_cannot_be_timed_has_no_time(gpu, tmp_path, monkeypatch, fault):
    def failing(calls, device):
        if fault is not None:
            raise fault
        return {}, {name: RuntimeError("no kernel") for name in calls}

    monkeypatch.setattr(gpu.module, "milliseconds", failing)
    assert gpu.module.step_milliseconds(plan(MEMORY), PRODUCTS, device=CUDA, folder=tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("device", "kind"), [(torch.device("cpu"), "diffusion_model"), (CUDA, "text_encoder")])
def test_on_a_cpu_and_of_a_text_encoder_nothing_is_timed(gpu, tmp_path, device, kind):
    assert gpu.module.step_milliseconds(plan(MEMORY, kind), PRODUCTS, device=device, folder=tmp_path) is None
    assert not gpu.timed


@pytest.mark.parametrize("name", ["keep", "int8", "int8_convrot_fast", "int4_asym_fast", "fp4_scaled_fast"])
def test_the_call_that_is_timed_is_the_product_itself(core_modules, name):
    from lowbit.host.weights.linear_times import _product_call

    out = _product_call(StepProduct(3, (64, 256), name), torch.device("cpu"))()
    assert out.shape == (3, 64)
    assert out.isfinite().all()
