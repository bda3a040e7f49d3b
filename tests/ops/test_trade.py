"""Claims about the dry run's table: what each row is, and times only where something was measured."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lowbit.errors import CapabilityError
from lowbit.ops.auto_format import FormatChooser
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import DeviceInfo
from lowbit.ops.formats import FORMATS
from lowbit.ops.plan import make_plan
from lowbit.ops.sampled_errors import sampled_errors
from lowbit.ops.trade import TOKENS, StepProduct, product_of, trade_table
from testing.tiny.tensors import draw
from testing.tiny.text_encoders import Umt5Config, umt5_shapes

from .conftest import wan_like

SHORT = DeviceInfo("RTX 4090", (8, 9), 1 << 20)
MEASURE = partial(sampled_errors, device="cpu", folder=None)


def rows_of(lines: list[str]) -> dict[str, list[str]]:
    return {line[:10].strip(): line[10:].split() for line in lines[1:-1]}


def test_smallest_balanced_and_most_exact_are_in_that_order(save):
    checkpoint = open_checkpoint(save(wan_like(blocks=4)))
    roomy = DeviceInfo("RTX 4090", (8, 9), 1 << 30)
    rows = rows_of(trade_table(FormatChooser(checkpoint, roomy, None, MEASURE)))
    assert list(rows) == ["smallest", "balanced", "most exact"]
    gib, times, errors, *_ = zip(*rows.values(), strict=False)
    assert list(map(float, gib)) == sorted(map(float, gib))
    assert list(times) == ["-"] * 3, "nothing was measured"
    found = [float(error.rstrip("%")) for error in errors]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0 < found[1]
    assert rows["balanced"][3:] == ["int8_convrot_fast"]
    plans = FormatChooser(checkpoint, roomy, None, MEASURE).two_plans
    assert float(gib[1]) == pytest.approx(plans.eight_bits.nbytes_after / 2**30, rel=0.01)
    assert found[1] == pytest.approx(100 * plans.error(plans.eight_bits), abs=0.01)


def test_where_memory_is_short_balanced_is_the_mix_that_auto_makes(save):
    checkpoint = open_checkpoint(save(wan_like(blocks=4)))
    rows = rows_of(trade_table(FormatChooser(checkpoint, SHORT, None, MEASURE)))
    assert rows["balanced"] == rows["smallest"]
    assert rows["balanced"][3:] == ["int4_asym_fast", "and", "int8_convrot_fast"]


def test_a_text_encoder_is_balanced_in_its_own_8_bits(save):
    tensors = draw(umt5_shapes(Umt5Config()))
    for device in (SHORT, DeviceInfo("CPU", None, 0), DeviceInfo("NVIDIA B200", (10, 0), 180 << 30)):
        rows = rows_of(trade_table(FormatChooser(open_checkpoint(save(tensors)), device, None, MEASURE)))
        assert rows["balanced"][3:] == ["int8"]
        assert float(rows["smallest"][2].rstrip("%")) > float(rows["balanced"][2].rstrip("%")) > 0


def test_layers_are_measured_once_for_the_whole_table(save, wan_tensors):
    asked = []
    measure = lambda checkpoint, formats: asked.append(1) or MEASURE(checkpoint, formats)  # noqa: E731
    assert trade_table(FormatChooser(open_checkpoint(save(wan_tensors)), SHORT, None, measure))
    assert len(asked) == 1


def test_a_time_is_asked_of_every_layer_in_the_format_it_has(save, wan_tensors):
    asked = {}

    def milliseconds(plan, products):
        asked[plan.nbytes_after] = products
        return float(len(products))

    checkpoint = open_checkpoint(save(wan_tensors))
    lines = trade_table(FormatChooser(checkpoint, DeviceInfo("H200", (9, 0), 1 << 40), None, MEASURE), milliseconds)
    assert {row[1] for row in rows_of(lines).values()} == {f"{len(products):.1f}" for products in asked.values()}
    eight_bits = asked[make_plan(checkpoint, FORMATS["int8_convrot_fast"], None).nbytes_after]
    assert StepProduct(TOKENS, (512, 256), "int8_convrot_fast") in eight_bits
    assert StepProduct(1, (1536, 256), "keep") in eight_bits
    assert all(product.weight_format == "keep" for product in asked[max(asked)])


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("blocks.0.ffn.0", TOKENS),
        ("double_blocks.3.img_mod.lin", 1),
        ("time_embedding.0", 1),
        ("blocks.1.attn.q", TOKENS),
    ],
)
def test_modulation_and_conditioning_see_one_row(save, name, rows):
    checkpoint = open_checkpoint(save({f"{name}.weight": torch.randn(64, 64)}))
    (layer,) = make_plan(checkpoint, FORMATS["int8"], ()).layers.values()
    assert product_of(layer) == StepProduct(rows, (64, 64), "int8")


def test_there_is_no_table_where_there_is_nothing_to_choose(save, wan_tensors, monkeypatch):
    stored = open_checkpoint(save({"blocks.0.q.weight": torch.randn(64, 64).to(torch.float8_e4m3fn)}))
    assert trade_table(FormatChooser(stored, SHORT, None, MEASURE)) == []

    def too_old(*given, **named):
        raise CapabilityError("comfy-kitchen is too old")

    monkeypatch.setattr(FormatChooser, "choose", too_old)
    whole = open_checkpoint(save(wan_tensors, "whole.safetensors"))
    assert trade_table(FormatChooser(whole, SHORT, None, MEASURE)) == []
