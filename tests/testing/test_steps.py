"""The benchmark's step times, as the server's callback sees them."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("asked", [False, True])
def test_a_step_is_reported_when_the_gpu_is_done_with_it(core_modules, monkeypatch, asked):
    import latent_preview

    from testing.shims import steps

    order = []
    monkeypatch.setattr(latent_preview, "prepare_callback", lambda model, count: lambda *values: order.append(values))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("done"))
    monkeypatch.setenv(steps.SYNCHRONIZE, "1" if asked else "")
    steps.install()
    latent_preview.prepare_callback("model", 4)(0, "x0", "x", 4)
    assert order == [*(["done"] if asked else []), (0, "x0", "x", 4)]
