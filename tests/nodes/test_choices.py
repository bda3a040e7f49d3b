"""What the combos offer first, and what they say of it."""

from __future__ import annotations

import pytest

from lowbit.attention.backends import BACKENDS
from lowbit.ops.formats import AS_STORED, AUTO, FORMAT_CHOICES, FORMATS, RECOMMENDED, SMALLEST

pytestmark = pytest.mark.headless

FOR_FEW = {
    "LowbitAttention": {"if_unavailable", "pair_with_weights", "exact_first_steps", "exact_last_steps", "exact_blocks"},
    "LowbitLoadDiffusionModel": {"keep_rules", "dry_run", "keep_quantized_file"},
    "LowbitLoadTextEncoder": {"keep_rules", "dry_run", "keep_quantized_file", "device"},
    "LowbitMemoryManager": {"step_clearing", "every_n_steps", "sequential_cfg"},
    "LowbitOptimize": set(),
}
"""Node -> inputs that must be advanced."""


def test_auto_and_the_recommended_formats_come_first_and_none_is_lost(nodes):
    assert FORMAT_CHOICES[: 2 + len(RECOMMENDED)] == (AUTO, SMALLEST, *RECOMMENDED)
    assert sorted(FORMAT_CHOICES) == sorted((AUTO, SMALLEST, AS_STORED, *FORMATS))
    with_format = [node for node in nodes.values() if "format" in node.options]
    assert len(with_format) == 4
    for node in with_format:
        assert node.options["format"] == FORMAT_CHOICES
        recommended, rest = node.inputs["format"].split("Recommended: ")[1].split(f" {AS_STORED}: ")
        assert all(f": {FORMATS[name].summary}." in recommended for name in RECOMMENDED)
        places = [recommended.index(f"{name}, for ") for name in RECOMMENDED]
        assert places == sorted(places)
        assert "see the help" in rest


@pytest.mark.parametrize(("name", "key"), [("LowbitMemoryManager", "policy"), ("LowbitOptimize", "preset")])
def test_a_tooltip_explains_every_choice_in_order(nodes, name, key):
    node = nodes[name]
    places = [node.inputs[key].index(f". {choice}: ") for choice in node.options[key]]
    assert places == sorted(places)


def test_formats_without_an_advantage_are_not_recommended():
    """Plain casts and block scales alone: a scaled sibling is as large and more accurate."""
    assert not {"fp8_e4m3fn", "fp8_e5m2", "fp4"} & set(RECOMMENDED)


def test_a_backend_that_we_never_ran_says_so(nodes):
    never_run = [backend.name for backend in BACKENDS if not backend.tested_on]
    assert {"sageattn_3", "sageattn_3_fp4"} <= set(never_run)
    assert f"Not run by us: {', '.join(never_run)}." in nodes["LowbitAttention"].inputs["backend"]


@pytest.mark.parametrize("name", FOR_FEW)
def test_inputs_that_few_need_are_advanced(described, name):
    inputs = described["nodes"][name]["input"]
    entries = {**inputs.get("required", {}), **inputs.get("optional", {})}
    advanced = {key for key, entry in entries.items() if len(entry) > 1 and entry[1].get("advanced")}
    assert FOR_FEW[name] <= advanced
    assert len(entries) - len(advanced) <= 5
