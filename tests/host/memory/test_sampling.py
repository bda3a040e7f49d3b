"""The memory manager's hooks around a sampling run: weights kept, room reserved, batches split, memory given back."""

from __future__ import annotations

import types

import pytest

from .support import GIB, device, hooks, host

__all__ = ["device", "host"]


@pytest.mark.parametrize(("policy", "share"), [("auto", None), ("speed", None), ("balanced", 0.8), ("lowest", 0.1)])
def test_dynamic_vram_keeps_no_more_weights_than_the_policys_share(host, device, policy, share):
    calls = []
    pages = types.SimpleNamespace(
        set_watermark=lambda nbytes: calls.append(("mark", nbytes)),
        free_memory=lambda nbytes: calls.append(("free", nbytes)),
        loaded_size=lambda: 20 * GIB,
    )
    patcher = types.SimpleNamespace(is_dynamic=lambda: True, _vbar_get=lambda: pages)
    hooks(host, policy=policy).loaded(patcher, None, 0, False, False)
    if share is None:
        assert calls == []
    else:
        mark = int(share * 24 * GIB)
        assert calls == [("free", 20 * GIB - mark), ("mark", mark)]
    legacy = types.SimpleNamespace(is_dynamic=lambda: False, _vbar_get=lambda: pytest.fail("there is no VBAR"))
    hooks(host, policy=policy).loaded(legacy)
    old = types.SimpleNamespace(is_dynamic=lambda: True, _vbar_get=lambda: types.SimpleNamespace())
    hooks(host, policy=policy).loaded(old)


def test_the_reserve_is_larger_for_the_length_of_a_load_even_when_it_fails(host):
    before = host.core.EXTRA_RESERVED_VRAM

    def load():
        with host.sampling._more_reserved(5 * GIB):
            assert before + 5 * GIB == host.core.EXTRA_RESERVED_VRAM
            raise ValueError("in the load")

    with pytest.raises(ValueError, match="in the load"):
        load()
    assert before == host.core.EXTRA_RESERVED_VRAM


def test_core_is_told_of_no_room_for_a_batch_only_while_it_asks(host):
    class Patcher:
        def get_free_memory(self, device):
            return 7

    patcher = Patcher()

    def call():
        with host.sampling._batch_of_one(patcher, True):
            with host.sampling._batch_of_one(patcher, True):
                assert patcher.get_free_memory("cpu") == 0
            assert patcher.get_free_memory("cpu") == 0, "an inner call must not undo the outer one"
            raise ValueError("in the call")

    with pytest.raises(ValueError, match="in the call"):
        call()
    assert patcher.get_free_memory("cpu") == 7
    with host.sampling._batch_of_one(patcher, False):
        assert patcher.get_free_memory("cpu") == 7
