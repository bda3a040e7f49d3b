"""Runs a script beside a module's tests in each of ComfyUI's ways to keep weights, and reads what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODES = {
    "dynamic": [],
    "legacy": ["--disable-dynamic-vram"],
    "legacy streamed": ["--disable-dynamic-vram", "--novram"],
}


@pytest.fixture(scope="module", params=MODES)
def run(request, tmp_path_factory):
    """The mode, and what the script that the module names in SCRIPT wrote in it."""
    out = tmp_path_factory.mktemp("core") / "out.json"
    script = Path(__file__).with_name(request.module.SCRIPT)
    subprocess.run([sys.executable, str(script), str(out), *MODES[request.param]], check=True, timeout=570)
    return request.param, json.loads(out.read_text())
