"""Every architecture with this pack's modulation and norms of heads beside ComfyUI's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from testing.measure import relative_error
from testing.tiny.architectures import ARCHITECTURES

CALLED = {
    "Wan 2.2 T2V 14B": {"modulate_rows": 9, "norm_heads": 8},
    "Wan VACE": {"modulate_rows": 13, "norm_heads": 12},
    "Qwen-Image": {"modulate_rows": 12, "norm_heads": 9},
    "Flux": {"modulate_rows": 11, "norm_heads": 12},
}
"""Two blocks, of Flux two of each kind, and what stands around them; of other architectures it is not said."""


@pytest.fixture
def elementwise(host):
    from lowbit.host.weights import elementwise

    return elementwise


def counted(elementwise, monkeypatch) -> Counter[str]:
    """Which of the two is called how often from now on."""
    calls: Counter[str] = Counter()
    for name in ("modulate_rows", "norm_heads"):
        function = getattr(elementwise, name)

        def called(*args, name=name, function=function):
            calls[name] += 1
            out = function(*args)
            assert type(out) is torch.Tensor
            return out

        monkeypatch.setattr(elementwise, name, called)
    return calls


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_gives_what_it_gave(elementwise, monkeypatch, name):
    of = ARCHITECTURES[name]
    model = of.small()
    model.load_state_dict(of.weights(), strict=False)
    elementwise.speed_up_elementwise(model)
    calls = counted(elementwise, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(elementwise, "_stays_with_torch", lambda: True)
        want = of.run(model)
        assert not calls
    got = of.run(model)
    assert relative_error(got, want) < 1e-5
    assert calls == CALLED.get(name, calls)
