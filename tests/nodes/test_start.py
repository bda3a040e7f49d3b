"""What the pack does when ComfyUI loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_what_a_killed_comfyui_left_half_written_in_the_cache_is_removed(described: dict[str, Any], cache: Path):
    assert described["nodes"]
    assert list(cache.iterdir()) == []
