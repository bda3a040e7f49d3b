"""Layers as other tools store them open as plain weights, exact to float32, and what cannot be read is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit.cli import main
from lowbit.errors import CheckpointError
from lowbit.ops.checkpoint import decoded, open_checkpoint
from lowbit.ops.device_info import DeviceInfo
from lowbit.ops.formats import FORMATS, STORAGES
from lowbit.ops.plan import make_plan
from lowbit.ops.plan_report import plan_report
from lowbit.ops.quantize import core_config_tensor, quantize_weight
from lowbit.ops.stream import quantize_checkpoint
from testing.tiny import nunchaku_files
from testing.tiny.foreign_files import SCHEMES, awq, blocks, four_bit, gptq, nvfp4, packed_integers, stored_as

HOPPER = DeviceInfo("NVIDIA H200", (9, 0), 140 << 30)
LAYER = "blocks.0.ffn.0"


def below(layer: str, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{layer}.{suffix}": part.contiguous() for suffix, part in parts.items()}


def float_weight(checkpoint, name: str) -> torch.Tensor:
    return decoded(checkpoint.entries[name], checkpoint.read_stored(name))


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_layer_opens_as_one_weight_of_the_numbers_it_stands_for(scheme, tmp_path, data):
    row = SCHEMES[scheme]
    rows = data.draw(st.integers(1, max(1, 300 // row.rows))) * row.rows
    columns = data.draw(st.integers(1, max(1, 600 // row.columns))) * row.columns
    torch.manual_seed(rows * 1000 + columns)
    parts, exact = row.store(torch.randn(rows, columns))
    scale = next((part.shape for name, part in parts.items() if name.startswith("weight_scale")), None)
    # One scale, or one a row: what core multiplies with.
    # Nor is a square of scales per column, alone, one of either.
    assume(scale != (1, rows) or rows != columns)
    assume(not (scale in ((1, 1), (rows, 1)) and "weight_scale" in parts and "weight_zero_point" not in parts))
    bias = torch.randn(rows)
    save_file({**below(LAYER, parts), f"{LAYER}.bias": bias, "norm.weight": torch.ones(3)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert set(checkpoint.entries) == {f"{LAYER}.weight", f"{LAYER}.bias", "norm.weight"}
    entry = checkpoint.entries[f"{LAYER}.weight"]
    assert (entry.shape, entry.dtype) == ((rows, columns), torch.bfloat16)
    weight = float_weight(checkpoint, f"{LAYER}.weight")
    assert weight.dtype == torch.float32
    assert (weight.double() - exact).abs().max() <= 2e-6 * exact.abs().max()
    assert torch.equal(checkpoint.read(f"{LAYER}.weight"), weight.to(torch.bfloat16))
    assert torch.equal(checkpoint.read(f"{LAYER}.bias"), bias)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if not scheme.startswith("gptq")])
def test_a_layer_is_decoded_where_its_bytes_are(scheme, save):
    """On the device that quantizes: all tables are made there. GPTQ looks at numbers, which the meta device has not."""
    parts, _ = SCHEMES[scheme].store(torch.randn(256, 512))
    checkpoint = open_checkpoint(save(below(LAYER, parts)))
    elsewhere = checkpoint.read_stored(f"{LAYER}.weight").to("meta")
    weight = decoded(checkpoint.entries[f"{LAYER}.weight"], elsewhere)
    assert (weight.device.type, weight.dtype, weight.shape) == ("meta", torch.float32, (256, 512))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_report_says_in_one_sentence_what_becomes_of_them(scheme, save):
    tensors = {f"blocks.{number}.q.weight": torch.randn(256, 512).bfloat16() for number in range(3)}
    theirs, _ = stored_as(tensors, ["blocks.0.q", "blocks.1.q"], SCHEMES[scheme])
    checkpoint = open_checkpoint(save({name: tensor.contiguous() for name, tensor in theirs.items()}))
    report = plan_report(checkpoint, make_plan(checkpoint, FORMATS["int8"], None), HOPPER, "int8")
    what = SCHEMES[scheme].what
    assert f"2 layers are {what}, which ComfyUI cannot multiply with: they are decoded and stored anew." in report
    assert "blocks.*.q (3 layers)  256x512  quantized int8" in report


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3fn_scaled", "fp4_scaled", "none"])
@pytest.mark.parametrize("scheme", ["fp8 blocks", "nf4", "awq", "nvfp4 lightx2v"])
def test_the_file_that_is_made_is_that_of_the_same_numbers_in_float32(save, tmp_path, overlaps, scheme, format):
    layers = ["blocks.0.q", "blocks.1.q"]
    tensors = {f"{layer}.weight": torch.randn(64, 256) for layer in layers} | {"head.weight": torch.randn(64, 32)}
    theirs, _ = stored_as(tensors, layers, SCHEMES[scheme])
    foreign = open_checkpoint(
        save({name: tensor.contiguous() for name, tensor in theirs.items()}, "theirs.safetensors")
    )
    plain = open_checkpoint(save({name: float_weight(foreign, name) for name in foreign.entries}, "plain.safetensors"))
    made = []
    for checkpoint in (foreign, plain):
        plan = make_plan(checkpoint, None if format == "none" else FORMATS[format], None)
        quantize_checkpoint(checkpoint, plan, tmp_path / "made.safetensors")
        made.append(load_file(tmp_path / "made.safetensors"))
    assert made[0].keys() == made[1].keys()
    for name, tensor in made[0].items():
        # What is kept was decoded to 16 bits.
        wanted = made[1][name].to(tensor.dtype)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), name


def test_what_core_multiplies_with_stays_as_it_is(save):
    tensors = {}
    for storage in STORAGES:
        tensors |= below(storage, quantize_weight(torch.randn(256, 512), storage))
    code = torch.randn(256, 512).to(torch.float8_e4m3fn)
    scales = {"tensor": torch.tensor(0.5), "rows": torch.rand(256), "column": torch.rand(256, 1)}
    for name, scale in scales.items():
        tensors |= {f"{name}.weight": code.clone(), f"{name}.weight_scale": scale}
        tensors |= {f"8{name}.weight": code.view(torch.int8).clone(), f"8{name}.weight_scale": scale.clone()}
    tensors |= {"cast.weight": code.clone(), "conv.weight": torch.ones(4, 4, 3, 3).to(torch.float8_e4m3fn)}
    tensors |= {"conv.weight_scale": torch.tensor(2.0), "plain.weight": torch.randn(4, 4), "plain.scale": torch.ones(4)}
    path = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.entries) == set(tensors)
    assert not any(entry.decoded_from for entry in checkpoint.entries.values())


@pytest.mark.parametrize("in_header", ["a", "model.diffusion_model.a", "elsewhere"])
def test_what_the_header_describes_is_taken_at_its_word(save, in_header):
    parts = quantize_weight(torch.randn(128, 64), "nvfp4")
    config = json.loads(parts.pop("comfy_quant").numpy().tobytes())
    metadata = {"_quantization_metadata": json.dumps({"layers": {in_header: config}})}
    checkpoint = open_checkpoint(save(below("a", parts), metadata=metadata))
    assert set(checkpoint.entries) == {"a.weight", "a.weight_scale", "a.weight_scale_2"}


def test_nvfp4_that_nothing_describes_is_refused(save):
    """modelopt's has the names of core's, and most often the shapes; scales and codes lie in another order."""
    parts = quantize_weight(torch.randn(128, 64), "nvfp4")
    del parts["comfy_quant"]
    with pytest.raises(CheckpointError, match="weight_scale_2"):
        make_plan(open_checkpoint(save(below("a", parts))), FORMATS["int8"], None)


@pytest.mark.parametrize("less", [0, 24])
@pytest.mark.parametrize(
    "store", [gptq(4, 128), gptq(8, 128), packed_integers(4, 128, True), packed_integers(8, 128, False)]
)
def test_a_last_group_may_be_smaller(save, store, less):
    """As many groups as some smaller size would give too."""
    parts, exact = store(torch.randn(16, 1056 - less))
    checkpoint = open_checkpoint(save(below("a", {name: part for name, part in parts.items() if name != "g_idx"})))
    assert torch.allclose(float_weight(checkpoint, "a.weight").double(), exact, rtol=1e-5, atol=1e-6)


def test_scales_of_a_square_weight_are_those_of_the_columns_where_another_layers_are(save):
    tensors = {"blocks.0.q.weight": torch.randn(64, 64), "blocks.0.up.weight": torch.randn(96, 64)}
    theirs, exact = stored_as(tensors, ["blocks.0.q", "blocks.0.up"], SCHEMES["fp8 columns"])
    checkpoint = open_checkpoint(save({name: tensor.contiguous() for name, tensor in theirs.items()}))
    assert torch.allclose(float_weight(checkpoint, "blocks.0.q.weight"), exact["blocks.0.q.weight"], rtol=1e-5)
    assert checkpoint.entries["blocks.0.up.weight"].decoded_from == "FP8 with a scale per column"


def test_a_set_of_shards_may_hold_a_layer_in_several_of_them(tmp_path):
    parts, exact = SCHEMES["nf4"].store(torch.randn(64, 96))
    for number, names in enumerate((list(parts)[:3], list(parts)[3:]), 1):
        save_file(
            below(LAYER, {name: parts[name] for name in names}), tmp_path / f"m-0000{number}-of-00002.safetensors"
        )
    checkpoint = open_checkpoint(tmp_path / "m-00001-of-00002.safetensors")
    weight = float_weight(checkpoint, f"{LAYER}.weight")
    assert (weight.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_weights_of_any_dimensions_come_out_of_bitsandbytes(save):
    weight = torch.randn(8, 3, 5, 7)
    parts, exact = four_bit("nf4")(weight)
    checkpoint = open_checkpoint(save(below("conv", parts)))
    assert checkpoint.entries["conv.weight"].shape == (8, 3, 5, 7)
    assert torch.allclose(float_weight(checkpoint, "conv.weight").double(), exact, rtol=1e-5, atol=1e-6)


def _without(parts, name):
    return {suffix: part for suffix, part in parts.items() if suffix != name}


def _state(parts, **changes):
    name = "weight.quant_state.bitsandbytes__nf4"
    state = {**json.loads(bytes(parts[name].tolist())), **changes}
    return {**parts, name: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def _weight(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (64, 128)))


DAMAGED = {
    "no absmax": (
        lambda: _without(SCHEMES["nf4"].store(_weight())[0], "weight.absmax"),
        "its 'weight.absmax' is missing",
    ),
    "no quant_map": (
        lambda: _without(SCHEMES["nf4"].store(_weight())[0], "weight.quant_map"),
        "'weight.quant_map' is missing",
    ),
    "no nested absmax": (
        lambda: _without(SCHEMES["nf4"].store(_weight())[0], "weight.nested_absmax"),
        "'weight.nested_absmax' is missing",
    ),
    "another shape": (
        lambda: _state(SCHEMES["nf4"].store(_weight())[0], shape=[64, 130]),
        "'weight' of shape .* does not fit",
    ),
    "a shape that is none": (
        lambda: _state(SCHEMES["nf4"].store(_weight())[0], shape=[64, -1]),
        "quant_state cannot be read",
    ),
    "a block of nothing": (
        lambda: _state(SCHEMES["nf4"].store(_weight())[0], blocksize=0),
        "quant_state cannot be read",
    ),
    "absmax in 8 bits without what they stand for": (
        lambda: {**four_bit("nf4", nested=False)(_weight())[0], "weight.absmax": torch.ones(128, dtype=torch.uint8)},
        "'weight.absmax' of shape .* does not fit",
    ),
    "a state that is no JSON": (
        lambda: {
            **SCHEMES["nf4"].store(_weight())[0],
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
        },
        "quant_state cannot be read",
    ),
    "LLM.int8 with too few": (
        lambda: {**SCHEMES["llm.int8"].store(_weight())[0], "SCB": torch.ones(63)},
        r"'SCB' of shape \(63,\) and float32 does not fit",
    ),
    "LLM.int8 in tiles": (
        lambda: {**SCHEMES["llm.int8"].store(_weight())[0], "weight_format": torch.tensor(2, dtype=torch.uint8)},
        "in the tiles of one GPU",
    ),
    "zero points of another shape": (
        lambda: {
            **SCHEMES["int8 groups, zeros"].store(_weight())[0],
            "weight_zero_point": torch.zeros(64, 3).to(torch.int8),
        },
        "'weight_zero_point' of shape .* does not fit",
    ),
    "packed integers of another shape": (
        lambda: {**packed_integers(4, 32, False)(_weight())[0], "weight_shape": torch.tensor([64, 300])},
        "'weight_packed' of shape .* does not fit",
    ),
    "packed integers with scales of other rows": (
        lambda: {**packed_integers(4, 32, False)(_weight())[0], "weight_scale": torch.ones(63, 4)},
        "'weight_scale' of shape .* does not fit",
    ),
    "NVFP4 with too few scales": (
        lambda: {
            **nvfp4("compressed-tensors")(_weight())[0],
            "weight_scale": torch.ones(64, 7).to(torch.float8_e4m3fn),
        },
        "'weight_scale' of shape .* does not fit",
    ),
    "GPTQ with groups of other columns": (
        lambda: {**gptq(4)(_weight())[0], "g_idx": torch.zeros(100, dtype=torch.int32)},
        "'g_idx' of shape .* does not fit",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_layer_is_one_sentence(case, save):
    make, reason = DAMAGED[case]
    path = save(below(LAYER, make()))
    with pytest.raises(CheckpointError, match=reason) as raised:
        open_checkpoint(path)
    sentence = str(raised.value)
    assert sentence.startswith(f"model.safetensors: the layer '{LAYER}' is ")
    assert "\n" not in sentence


def _integers(*shape: int) -> torch.Tensor:
    return torch.randint(-1000, 1000, shape, dtype=torch.int32)


REFUSED = {
    "HQQ": ({"W_q": _integers(64, 16), "scale": torch.ones(64, 4), "zero": torch.ones(64, 4)}, "a.W_q"),
    "EXL2": ({"q_weight": _integers(16, 64), "q_scale": _integers(4, 8)}, "a.q_weight"),
    "EXL3": ({"trellis": _integers(4, 4, 8).to(torch.int16), "suh": torch.ones(64)}, "a.trellis"),
    "quanto": (
        {"weight._data": _integers(64, 16).to(torch.uint8), "weight._scale": torch.ones(64, 1)},
        "a.weight._data",
    ),
    "torchao": (
        {"_weight_qdata": _integers(64, 16).to(torch.int8), "_weight_scale": torch.ones(64, 1)},
        "a._weight_qdata",
    ),
    "Marlin": ({"weight": _integers(4, 64), "weight_scale": torch.ones(1, 64)}, "'a' is stored as int32"),
    "packed by two of three dimensions": ({"qweight": _integers(4, 64), "scales": torch.ones(1, 64)}, "a.qweight"),
    "a row of scales for the outputs": (
        {"weight": torch.randn(32, 48).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1, 32)},
        "a.weight_scale",
    ),
    "a row of scales for outputs that divide the inputs": (
        {"weight": torch.randn(32, 128).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1, 32)},
        "a.weight_scale",
    ),
    "a row of scales for outputs of which blocks could be made": (
        {"weight": torch.randn(64, 1024).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1, 64)},
        "a.weight_scale",
    ),
    "a row of scales for as many outputs as inputs": (
        {"weight": torch.randn(64, 64).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1, 64)},
        "a.weight_scale",
    ),
    "block scales in the other order": (
        {"weight": torch.randn(512, 2048).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(16, 4)},
        "a.weight_scale_inv",
    ),
    "groups of one size or another": (
        {"weight": _integers(32, 200).to(torch.int8), "weight_scale": torch.ones(32, 4)},
        "a.weight_scale",
    ),
    "powers of two in tiles, with columns to spare": (
        {
            "weight": torch.randn(128, 160).to(torch.float8_e4m3fn),
            "weight_scale": torch.ones(128, 8).to(torch.float8_e8m0fnu),
        },
        "a.weight_scale",
    ),
    "AWQ whose last group is smaller": (awq(torch.randn(16, 160), 128)[0], "a.qweight"),
    "GPTQ beside a plain weight": ({**gptq(4)(_weight())[0], "weight": torch.randn(64, 128)}, "a.qweight"),
    "GPTQ of some size or another": (_without(gptq(4, 64)(torch.randn(16, 200))[0], "g_idx"), "a.qweight"),
    "smoothed FP8 in blocks": (
        {**blocks(128, 128)(_weight())[0], "pre_quant_scale": torch.ones(128)},
        "a.weight_scale_inv",
    ),
    "FP8 in blocks with a part of low rank": (
        {**blocks(128, 128)(_weight())[0], "lora_down": torch.ones(4, 128), "lora_up": torch.ones(64, 4)},
        "a.weight_scale_inv",
    ),
    "INT8 with a part of low rank": (
        {
            "weight": _integers(64, 128).to(torch.int8),
            "weight_scale": torch.ones(64, 1),
            "svd_down": torch.ones(4, 128),
            "svd_up": torch.ones(64, 4),
        },
        "a.svd_down",
    ),
    "FP8 with the order of its columns": (
        {
            "weight": torch.randn(64, 128).to(torch.float8_e4m3fn),
            "weight_scale": torch.ones(64, 1),
            "weight_g_idx": torch.arange(128),
        },
        "a.weight_g_idx",
    ),
    "FP8 in blocks that core's description says nothing of": (
        {**blocks(128, 128)(_weight())[0], "comfy_quant": core_config_tensor({"format": "float8_e4m3fn"})},
        "a.weight_scale_inv",
    ),
    "uint8 without a zero point": (
        _without(SCHEMES["uint8 groups, zeros"].store(_weight())[0], "weight_zero_point"),
        "'a' is stored as uint8",
    ),
    "NF4 without its state": (
        _without(SCHEMES["nf4"].store(_weight())[0], "weight.quant_state.bitsandbytes__nf4"),
        "a.weight.absmax",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_before_a_byte_is_written(case, save, tmp_path):
    parts, named = REFUSED[case]
    checkpoint = open_checkpoint(save(below("a", parts)))
    with pytest.raises(CheckpointError, match="use the 16-bit file") as raised:
        make_plan(checkpoint, FORMATS["int8"], None)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("group", [-1, 4])
def test_a_column_of_a_group_that_is_not_there_is_said(save, tmp_path, group):
    parts, _ = gptq(4)(_weight())
    parts["g_idx"][5] = group
    checkpoint = open_checkpoint(save(below("blocks.0.q", parts)))
    with pytest.raises(CheckpointError, match=r"'blocks.0.q' has columns of a group that has no scale"):
        quantize_checkpoint(checkpoint, make_plan(checkpoint, FORMATS["int8"], None), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_bytes_that_bitsandbytes_keeps_as_16_bit_numbers_are_read(save):
    parts, exact = four_bit("nf4")(_weight())
    parts["weight"] = parts["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    checkpoint = open_checkpoint(save(below("a", parts)))
    assert torch.allclose(float_weight(checkpoint, "a.weight").double(), exact, rtol=1e-5, atol=1e-6)


def test_inspect_measures_each_layer_against_its_original(save, capsys):
    tensors = {"blocks.0.q.weight": torch.randn(64, 128), "head.weight": torch.randn(8, 8)}
    theirs, _ = stored_as(tensors, ["blocks.0.q"], SCHEMES["nf4"])
    original = save(tensors, "original.safetensors")
    assert main(["inspect", str(save(theirs)), "--against", str(original)]) == 0
    out = capsys.readouterr().out
    assert "1 layer is NF4 of bitsandbytes, which ComfyUI cannot multiply with: it is decoded and stored anew." in out
    line = next(line for line in out.splitlines() if line.endswith("blocks.0.q") and "NF4" in line and "e-0" in line)
    assert 0.05 < float(line.split()[0]) < 0.13


def test_zero_points_that_either_format_of_gptq_could_mean_are_refused(save):
    parts, _ = gptq(4)(_weight())
    parts["qzeros"] = _integers(*parts["qzeros"].shape)
    with pytest.raises(CheckpointError, match="GPTQ with zero points of its own"):
        open_checkpoint(save(below("a", parts)))


def test_a_scale_that_is_no_number_is_said(save, tmp_path):
    parts, _ = blocks(128, 128)(_weight())
    parts["weight_scale_inv"][0, 0] = torch.nan
    checkpoint = open_checkpoint(save(below(LAYER, parts)))
    for format in ("int8", None):
        with pytest.raises(CheckpointError, match=rf"{LAYER}.weight holds NaN"):
            quantize_checkpoint(
                checkpoint, make_plan(checkpoint, FORMATS[format] if format else None, None), tmp_path / "o.safetensors"
            )


_WHOLE = {name: row.store(torch.randn(128, 512))[0] for name, row in SCHEMES.items()}
_WHOLE |= {
    "svdquant": nunchaku_files.svdquant(torch.randn(128, 512), torch.randn(128), fp4=False)[0],
    "svdquant in nvfp4": nunchaku_files.svdquant(torch.randn(128, 512), torch.randn(128), fp4=True, older=True)[0],
    "w4a16": nunchaku_files.awq_four_rows(torch.randn(128, 512))[0],
    "w4a16 of t5": nunchaku_files.awq_four_rows(torch.randn(128, 512), names=("scales", "scaled_zeros"))[0],
}
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.uint8,
    torch.int8,
    torch.int64,
)


def _changed(part: torch.Tensor, data: st.DataObject) -> torch.Tensor:
    """Other numbers, another dtype or another shape."""
    dtype = data.draw(st.sampled_from((part.dtype, part.dtype, *_DTYPES)))
    shape = list(part.shape)
    if data.draw(st.booleans()):
        shape = data.draw(st.lists(st.sampled_from((0, 1, 2, 3, 64, 128, 512)), max_size=3))
    elif shape:
        place = data.draw(st.integers(0, len(shape) - 1))
        shape[place] = data.draw(st.sampled_from((shape[place], 0, 1, shape[place] + 1, shape[place] * 2)))
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_layer_with_anything_changed_is_decoded_or_refused_in_a_sentence(data, tmp_path):
    scheme = data.draw(st.sampled_from(sorted(_WHOLE)))
    parts = dict(_WHOLE[scheme])
    for _ in range(data.draw(st.integers(1, 2))):
        suffix = data.draw(st.sampled_from(sorted(parts)))
        changed = _changed(parts.pop(suffix), data)
        if data.draw(st.integers(0, 3)):
            parts[suffix] = changed
    # One of the models whose layers nunchaku renames.
    file = {
        **below("transformer_blocks.0.attn.to_out.0", parts),
        "transformer_blocks.0.img_mod.1.weight": torch.ones(12, 4),
    }
    save_file(file, tmp_path / "any.safetensors")
    said = "any.safetensors"
    try:
        checkpoint = open_checkpoint(tmp_path / "any.safetensors")
        make_plan(checkpoint, FORMATS["int8"], None)
        for name, entry in checkpoint.entries.items():
            assert checkpoint.read(name).shape == entry.shape
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
    assert "any.safetensors" in said or "to_out.0" in said
