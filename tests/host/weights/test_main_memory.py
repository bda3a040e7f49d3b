"""A load that main memory cannot hold is refused before it starts."""

from __future__ import annotations

import types

import pytest

from lowbit.errors import MemoryBudgetError

GIB = 1 << 30


def planned(nbytes):
    entry = types.SimpleNamespace(shape=(nbytes // 2,))
    checkpoint = types.SimpleNamespace(path=types.SimpleNamespace(name="wan.safetensors"), entries={"w": entry})
    return types.SimpleNamespace(plan=types.SimpleNamespace(nbytes_after=nbytes), checkpoint=checkpoint)


def test_a_load_that_main_memory_cannot_hold_is_refused_before_it_starts(core_modules, monkeypatch):
    import comfy.memory_management

    from lowbit.host.weights import main_memory

    monkeypatch.setattr(main_memory, "available_host_bytes", lambda: 20 * GIB)
    monkeypatch.setattr(main_memory, "resident_bytes", lambda: 5 * GIB)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", False)
    main_memory.check_load(planned(22 * GIB))
    with pytest.raises(MemoryBudgetError, match=r"wan.safetensors takes 28.00 GiB .* 25.00 GiB are left"):
        main_memory.check_load(planned(28 * GIB))
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    main_memory.check_load(planned(28 * GIB))
