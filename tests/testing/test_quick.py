"""What tests do not wait for: only where they ask for it."""

from __future__ import annotations

import os
import sys
import types

import pytest


@pytest.mark.parametrize("asked", [False, True])
def test_the_disk_and_a_megapixel_are_not_waited_for_where_that_is_asked(core_modules, monkeypatch, asked):
    from testing.shims import quick

    source = "import math\nclass Node:\n    @classmethod\n    def execute(cls, value): return math.sqrt(value)\n"
    module: dict = {}
    exec(source, module)
    waited = []
    monkeypatch.setattr(os, "fsync", waited.append)
    core = types.SimpleNamespace(NODE_CLASS_MAPPINGS={"TextEncodeQwenImageEdit": module["Node"], "Other": object()})
    monkeypatch.setitem(sys.modules, "nodes", core)
    monkeypatch.setenv(quick.QUICK, "1" if asked else "")
    quick.install()
    os.fsync(3)
    assert waited == ([] if asked else [3])
    assert module["Node"].execute(64.0) == (8.0 / quick.SIDE if asked else 8.0)
