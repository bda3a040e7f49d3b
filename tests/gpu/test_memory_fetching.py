"""Weights that are fetched a block ahead give the same latents as those that stream layer by layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.headless, pytest.mark.slow]

BLOCKS, STEPS, RUNS = 4, 2, 2
FORMATS = ("none", "int8_convrot_fast", "fp8_e4m3fn_scaled")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("fetch") / "out.json"
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fetch_process.py")), str(out)], check=True, timeout=300
    )
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", ["", ", LoRA", ", strangers"])
@pytest.mark.parametrize("name", FORMATS)
def test_latents_are_equal_to_the_bit(rows, name, case):
    row = rows[name + case]
    assert row["equal"]
    assert row["finite"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_block_is_fetched_at_every_step_where_it_is_asked_for(rows, name):
    behind, ahead = rows[name]["fetched"]
    assert behind == 0
    assert ahead >= BLOCKS * (STEPS * RUNS - 1), "all but the first forward of a cold model, which is core's"
