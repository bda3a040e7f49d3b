"""Claims about formats mixed in one model: bytes, exactness, what stays, what is measured, and the file that comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.ops import mixed_plan, sampled_errors
from lowbit.ops.auto_format import FormatChooser
from lowbit.ops.cache import cached_path, quantized_file
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import DeviceInfo
from lowbit.ops.formats import FORMATS
from lowbit.ops.keep_rules import GENERIC, parse_rules
from lowbit.ops.layer_errors import layer_errors
from lowbit.ops.plan import make_plan
from lowbit.ops.stream import read_origin

from .conftest import wan_like

ADA = DeviceInfo("RTX 4090", (8, 9), 24 << 30)
NVFP4_GPU = DeviceInfo("RTX 5090", (12, 0), 32 << 30)
PROMOTED, LOWERED = "in more bits", "in fewer bits"


def measuring(folder=None):
    return partial(sampled_errors.sampled_errors, device="cpu", folder=folder)


def made_up(seed: int):
    """Errors of a model nobody has: any format may be off by anything."""

    def measure(checkpoint, formats):
        draw = torch.Generator().manual_seed(seed)
        return {
            layer: {name: 0.001 + torch.rand((), generator=draw).item() for name in sorted(names)}
            for layer, names in formats.items()
        }

    return measure


def formats_of(plan) -> dict[str, str]:
    return {name: layer.weight_format for name, layer in plan.layers.items()}


@pytest.mark.parametrize("device", [ADA, NVFP4_GPU], ids=lambda device: device.name)
def test_in_the_bytes_of_4_bits_the_mix_is_much_more_exact(save, wan_tensors, device):
    plans = FormatChooser(open_checkpoint(save(wan_tensors)), device, None, measuring()).two_plans
    mixed = plans.within(plans.four_bits.nbytes_after)
    assert mixed.nbytes_after <= plans.four_bits.nbytes_after
    assert plans.error(mixed) < 0.8 * plans.error(plans.four_bits)
    assert plans.error(plans.eight_bits) < plans.error(mixed)
    reasons = {name: layer.reason for name, layer in mixed.layers.items()}
    assert reasons["time_projection.1"].startswith(LOWERED)
    assert any(reason.startswith(PROMOTED) for reason in reasons.values())


def test_with_bytes_enough_it_is_the_8_bit_plan(save, wan_tensors):
    plans = FormatChooser(open_checkpoint(save(wan_tensors)), ADA, None, measuring()).two_plans
    assert plans.within(plans.eight_bits.nbytes_after) == plans.eight_bits
    assert plans.within(plans.eight_bits.nbytes_after - 1) != plans.eight_bits


@settings(max_examples=25)
@given(st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_whatever_the_errors_no_mix_is_too_large_or_less_exact_than_4_bits(tmp_path_factory, seed, room):
    path = tmp_path_factory.getbasetemp() / "made_up.safetensors"
    if not path.exists():
        from safetensors.torch import save_file

        save_file(wan_like(), path)
    plans = FormatChooser(open_checkpoint(path), ADA, None, made_up(seed)).two_plans
    limit = plans.four_bits.nbytes_after + room
    mixed = plans.within(limit)
    assert mixed.nbytes_after <= limit
    if mixed.mix is not None:
        assert plans.error(mixed) < plans.error(plans.four_bits)


def test_queries_and_keys_give_up_bits_first_and_early_blocks_before_late_ones(save):
    checkpoint = open_checkpoint(save(wan_like(blocks=12)))
    plans = FormatChooser(checkpoint, ADA, None, lambda checkpoint, formats: dict.fromkeys(formats, ERRORS)).two_plans
    missing = plans.eight_bits.nbytes_after - (256 * 256 // 4) * 12 * 3
    few = formats_of(plans.within(missing))
    lowered = {name for name, chosen in few.items() if chosen == "int4_asym_fast"}
    assert lowered
    assert {name.rpartition(".")[2] for name in lowered} <= {"q", "k", "o"}
    assert all("attn" in name for name in lowered)
    least = plans.within(0)
    assert set(formats_of(least).values()) == {ERRORS_4, mixed_plan.BELOW_16_BITS}
    more = formats_of(plans.within(least.nbytes_after + 9 * 60_000))
    blocks = sorted({int(name.split(".")[1]) for name, chosen in more.items() if "ffn" in name and chosen == ERRORS_4})
    assert blocks == list(range(len(blocks)))
    assert 0 < len(blocks) < 12


ERRORS_4 = "int4_asym_fast"
ERRORS = {"int8_convrot_fast": 0.008, "int8": 0.008, ERRORS_4: 0.073}


def test_what_the_user_keeps_and_what_must_be_exact_stays(save, wan_tensors, monkeypatch):
    checkpoint = open_checkpoint(save(wan_tensors))
    plans = FormatChooser(
        checkpoint, ADA, parse_rules("time_projection\nself_attn.q = int4_asym_fast\nauto"), measuring()
    ).two_plans
    mixed = plans.within(plans.four_bits.nbytes_after)
    assert mixed.layers["time_projection.1"].action == "keep"
    assert formats_of(mixed)["blocks.0.self_attn.q"] == "int4_asym_fast"
    assert mixed.layers["head.head"].action == "quantize"
    family = replace(
        plans.eight_bits.family, rules=tuple(replace(rule, always=True) for rule in plans.eight_bits.rules)
    )
    firm = replace(plans, eight_bits=replace(plans.eight_bits, family=family, rules=family.rules))
    assert firm.within(plans.four_bits.nbytes_after).layers["head.head"].action == "keep"
    assert [rule.pattern for rule in GENERIC.rules if rule.always] == ["tokenizer"]


def test_rows_are_measured_once_and_anew_when_the_file_changes(save, wan_tensors, tmp_path, monkeypatch):
    source, counted = save(wan_tensors), []
    real = sampled_errors._error
    monkeypatch.setattr(sampled_errors, "_error", lambda *given: counted.append(1) or real(*given))

    def errors():
        counted.clear()
        found = measuring(tmp_path / "cache")(open_checkpoint(source), {"blocks.0.ffn.0": ("int8", "fp4_scaled")})
        return found["blocks.0.ffn.0"], len(counted)

    first, measured = errors()
    assert measured == 2
    assert errors() == (first, 0)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.startswith("model.")
    assert json.loads(kept.read_text())
    wan_tensors["blocks.0.ffn.0.weight"][:, 0] = 50
    save(wan_tensors)
    changed, measured = errors()
    assert measured == 2
    assert changed != first


@pytest.mark.parametrize(
    "name", ["int8", "int8_convrot_fast", "fp8_e4m3fn_scaled_fast", "fp4_scaled", "int4_asym_fast"]
)
def test_a_samples_error_is_the_layers(save, tmp_path, name):
    checkpoint = open_checkpoint(save(wan_like(dim=512, blocks=1)))
    path = quantized_file(checkpoint, make_plan(checkpoint, FORMATS[name], None), tmp_path / "cache")
    whole = {row.layer: row.relative_error for row in layer_errors(open_checkpoint(path), checkpoint)}
    sampled = measuring()(checkpoint, dict.fromkeys(whole, (name,)))
    for layer, error in whole.items():
        assert sampled[layer][name] == pytest.approx(error, rel=0.1)


def test_the_file_of_a_mix_holds_every_layer_in_its_format_and_has_a_name_of_its_own(save, tmp_path):
    checkpoint = open_checkpoint(save(wan_like(blocks=4)))
    plans = FormatChooser(checkpoint, ADA, None, measuring()).two_plans
    mixed = plans.within(plans.four_bits.nbytes_after)
    path = quantized_file(checkpoint, mixed, tmp_path / "cache")
    assert ".mixed." in path.name
    made = open_checkpoint(path)
    assert read_origin(made.metadata)["format"] == "mixed"
    found = {row.layer: row.stored_as for row in layer_errors(made, checkpoint)}
    # A width that no rotation divides stays as it is.
    assert set(found.values()) == {"int4_asym", "int8_convrot", "int8"}
    for name, layer in mixed.layers.items():
        assert (name in found) is (layer.action == "quantize")
    assert sum(entry.nbytes for name, entry in made.entries.items() if not name.endswith("comfy_quant")) == (
        mixed.nbytes_after
    )
    other = plans.within(plans.four_bits.nbytes_after + 100_000)
    assert cached_path(checkpoint, other, tmp_path) != cached_path(checkpoint, mixed, tmp_path)
    assert mixed_plan.BELOW_16_BITS in formats_of(mixed).values()
