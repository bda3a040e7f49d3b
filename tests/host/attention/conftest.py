"""The host modules of attention, for the tests of this folder."""

from __future__ import annotations

import pytest

from . import support


@pytest.fixture(scope="module")
def host(core_modules):
    """The host modules."""
    return support.load()
