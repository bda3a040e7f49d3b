"""Every architecture with this pack's modulation, norms and rotary embeddings beside ComfyUI's own."""

from __future__ import annotations

import types
from collections import Counter

import pytest
import torch

from lowbit.kernels.rope import _layout
from testing.measure import relative_error
from testing.tiny.architectures import ARCHITECTURES

CALLED = {
    "Wan 2.2 T2V 14B": {"modulate_rows": 9, "normalize": 15, "rope": 4},
    "Wan VACE": {"modulate_rows": 13, "normalize": 22, "rope": 6},
    "Qwen-Image": {"modulate_rows": 12, "normalize": 18, "rope": 4},
    "Flux": {"modulate_rows": 11, "normalize": 23, "rope": 8},
}
"""Two blocks, of Flux two of each kind, and what stands around them; of other architectures it is not said."""


@pytest.fixture
def elementwise(host):
    from lowbit.host.weights import elementwise

    return elementwise


def rope_in_plain_torch(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor | None:
    """What the kernel would give for what it takes: it has no other form on a CPU."""
    if _layout(x, freqs) is None:
        return None
    return (freqs.float() * x.float().unflatten(-1, (-1, 1, 2))).sum(-1).flatten(-2).to(x.dtype)


def counted(elementwise, monkeypatch) -> Counter[str]:
    """Which of them is called how often from now on."""
    monkeypatch.setattr(elementwise, "rope", rope_in_plain_torch)
    calls: Counter[str] = Counter()
    for name in ("modulate_rows", "normalize", "rope"):
        function = getattr(elementwise, name)

        def called(*args, name=name, function=function, **options):
            out = function(*args, **options)
            calls[name] += out is not None
            assert type(out) in (torch.Tensor, types.NoneType)
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
