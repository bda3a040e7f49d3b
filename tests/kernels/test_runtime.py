"""What is made once and kept, and whether Triton can build anything at all."""

from __future__ import annotations

import logging
import threading
import types

import pytest
import torch

from lowbit.kernels import runtime


def test_what_is_kept_is_made_on_a_thread_of_its_own():
    """The warm-up of torch.compile's CUDA graphs sends a thread's allocations to the graphs' pool, and finds any left."""
    threads = []

    def make() -> torch.Tensor:
        threads.append(threading.get_ident())
        return torch.ones(3)

    with torch.inference_mode():
        made = runtime.made_to_keep(make)
    assert threads[0] != threading.get_ident()
    assert not made.is_inference()
    with pytest.raises(ZeroDivisionError):
        runtime.made_to_keep(lambda: 1 / 0)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("short_cut", [False, True])
def test_outputs_are_made_row_major_and_as_pytorch_would(short_cut, inference, monkeypatch):
    """Past the dispatcher, where PyTorch has the way."""
    monkeypatch.setattr(runtime, "_EMPTY_STRIDED", runtime._EMPTY_STRIDED if short_cut else {})
    shape = torch.empty(2, 1, 5).shape
    with torch.inference_mode(inference):
        make = runtime.maker_of(shape, torch.bfloat16, torch.device("cpu"))
        first, second = make(), make()
    assert (make.func is torch.empty) != short_cut
    assert first.data_ptr() != second.data_ptr()
    assert (first.shape, first.stride(), first.dtype) == ((2, 1, 5), (5, 5, 1), torch.bfloat16)
    assert first.is_inference() == inference
    assert not first.requires_grad


class _Driver:
    """Triton's driver: compiles a helper in C when it is first asked for, which needs gcc and Python's headers."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    @property
    def active(self) -> types.SimpleNamespace:
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(get_current_target=lambda: None)


@pytest.mark.parametrize("error", [None, RuntimeError("Failed to find C compiler."), OSError("Python.h")])
def test_triton_without_a_c_compiler_is_no_triton(error, monkeypatch, caplog):
    stand_in = types.SimpleNamespace(runtime=types.SimpleNamespace(driver=_Driver(error)))
    monkeypatch.setattr(runtime, "triton", stand_in)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    runtime.triton_builds.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "lowbit"):
            assert [runtime.kernels_run_on(on_gpu) for _ in range(3)] == [error is None] * 3
        assert len(caplog.records) == (error is not None)
        assert error is None or str(error) in caplog.text
    finally:
        runtime.triton_builds.cache_clear()
