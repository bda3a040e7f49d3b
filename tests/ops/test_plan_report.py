"""Claims about the dry run's words: each layer's own product is what is judged."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import DeviceInfo
from lowbit.ops.formats import FORMATS
from lowbit.ops.keep_rules import parse_rules
from lowbit.ops.layer_errors import layer_errors
from lowbit.ops.plan import make_plan
from lowbit.ops.plan_report import plan_report
from lowbit.ops.stream import quantize_checkpoint

AMPERE = DeviceInfo("RTX 3090", (8, 6), 24 << 30)
HOPPER = DeviceInfo("H200", (9, 0), 140 << 30)


def verdicts(checkpoint, name: str, rules: str, device: DeviceInfo) -> dict[str, str]:
    plan = make_plan(checkpoint, FORMATS[name], parse_rules(rules))
    lines = [line.strip() for line in plan_report(checkpoint, plan, device, "").splitlines() if line.startswith("  ")]
    return {label: verdict.split(":")[0] for label, verdict in (line.split(": ", 1) for line in lines)}


def test_a_format_that_a_rule_asks_for_is_judged_by_its_own_product(save):
    checkpoint = open_checkpoint(save({f"blocks.{n}.{n}.weight": torch.randn(64, 64) for n in range(2)}))
    found = verdicts(checkpoint, "int8_fast", "blocks.1 = fp8_e4m3fn_scaled", AMPERE)
    assert found == {"int8, fast": "native", "float8_e4m3fn": "native"}
    found = verdicts(checkpoint, "int8", "blocks.1 = fp8_e4m3fn_scaled_fast", AMPERE)
    assert found == {"int8": "native", "float8_e4m3fn, fast": "emulated"}


def test_a_rotated_layer_of_the_file_is_named_as_the_pack_names_it(save, tmp_path):
    checkpoint = open_checkpoint(save({f"blocks.{n}.q.weight": torch.randn(64, 256) for n in range(2)}))
    rules = parse_rules("blocks.1 = int8")
    quantize_checkpoint(
        checkpoint, make_plan(checkpoint, FORMATS["int8_convrot_fast"], rules), tmp_path / "out.safetensors"
    )
    stored = open_checkpoint(tmp_path / "out.safetensors")
    plan = make_plan(stored, None, None)
    report = plan_report(stored, plan, AMPERE, "")
    assert "  int8_convrot, fast: native" in report
    assert "blocks.0.q  64x256  as stored int8_convrot: " in report
    assert "blocks.1.q  64x256  as stored int8: " in report
    assert [row.stored_as for row in layer_errors(stored, checkpoint)] == ["int8_convrot", "int8"]


def test_a_text_encoder_is_judged_by_its_16_bit_product(save):
    names = ("shared", "encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.o")
    checkpoint = open_checkpoint(save({f"{name}.weight": torch.randn(64, 64) for name in names}))
    assert verdicts(checkpoint, "fp8_e4m3fn_scaled_fast", "auto", AMPERE) == {"float8_e4m3fn": "native"}


@pytest.mark.parametrize("available", [True, False])
def test_whether_comfy_kitchens_kernels_are_there_is_asked_not_assumed(save, monkeypatch, available):
    asked = []
    monkeypatch.setattr("lowbit.ops.plan_report.kitchen_cuda_available", lambda: asked.append(1) or available)
    given = {}
    real = "lowbit.ops.plan_report.describe_linear"
    monkeypatch.setattr(real, lambda layout, **options: given.update(options) or "native: so")
    verdicts(open_checkpoint(save({"a.weight": torch.randn(64, 64)})), "int8_fast", "auto", HOPPER)
    assert asked
    assert given["kitchen_cuda"] is available
