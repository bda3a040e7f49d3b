"""An incomplete or foreign file is named when it is loaded; a scale on what is no Linear is multiplied out, never dropped."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lowbit.errors import CheckpointError
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.plan import make_plan
from lowbit.ops.quantize import core_config_tensor
from lowbit.ops.stream import quantize_checkpoint
from testing import tiny
from testing.tiny import quantized
from testing.tiny.tensors import linear_names

from .files import built, quantized_file, save

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


# --- scales on what is no Linear


def conv_file(tmp_path, dtype, suffix, scale_shape):
    """Wan whose patch embedding, a convolution, is stored with a scale; with the weight that it stands for."""
    tensors = dict(tiny.wan_tensors())
    weight = tensors["patch_embedding.weight"].float()
    rows = weight.shape[0]
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    flat = weight.reshape(rows, -1)
    scale = (flat.abs().amax(1) if -1 in scale_shape else flat.abs().amax()) / limit
    codes = flat / scale.reshape(-1, 1)
    codes = (codes.round() if dtype == torch.int8 else codes).to(dtype)
    tensors["patch_embedding.weight"] = codes.reshape(weight.shape)
    tensors[f"patch_embedding.{suffix}"] = scale.reshape(scale_shape)
    path = save(tensors, tmp_path / "conv.safetensors")
    return path, (codes.float() * scale.reshape(-1, 1)).reshape(weight.shape)


CONVOLUTIONS = pytest.mark.parametrize("dtype", [*FLOAT8, torch.int8], ids=str)
SUFFIXES = pytest.mark.parametrize("suffix", ["weight_scale", "scale_weight"])
SHAPES = pytest.mark.parametrize("scale_shape", [(), (1,), (-1,), (-1, 1), (-1, 1, 1, 1, 1)], ids=str)


@CONVOLUTIONS
@SUFFIXES
@SHAPES
def test_a_convolution_s_scale_is_multiplied_out_on_load(host, tmp_path, dtype, suffix, scale_shape):
    path, expected = conv_file(tmp_path, dtype, suffix, scale_shape)
    torch.testing.assert_close(built(host, path).patch_embedding.weight.float(), expected, rtol=1e-6, atol=0)


@CONVOLUTIONS
@SUFFIXES
def test_a_convolution_s_scale_is_multiplied_out_in_a_file_that_is_written(tmp_path, dtype, suffix):
    path, expected = conv_file(tmp_path, dtype, suffix, ())
    checkpoint = open_checkpoint(path)
    quantize_checkpoint(checkpoint, make_plan(checkpoint, FORMATS["int8"], None), tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(written["patch_embedding.weight"].float(), expected, rtol=1e-6, atol=0)
    assert [name for name in written if name.startswith("patch_embedding.")] == [
        "patch_embedding.bias",
        "patch_embedding.weight",
    ]


def test_a_convolution_that_the_file_describes_is_multiplied_out_too(host, tmp_path):
    path, expected = conv_file(tmp_path, torch.float8_e4m3fn, "weight_scale", ())
    tensors = load_file(path)
    tensors["patch_embedding.comfy_quant"] = core_config_tensor({"format": "float8_e4m3fn"})
    path = save(tensors, tmp_path / "described.safetensors")
    torch.testing.assert_close(built(host, path).patch_embedding.weight.float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_a_convolution_s_scale_that_does_not_fit_is_refused_by_name(host, tmp_path, shape):
    path, _ = conv_file(tmp_path, torch.float8_e4m3fn, "weight_scale", ())
    tensors = load_file(path) | {"patch_embedding.weight_scale": torch.ones(shape)}
    with pytest.raises(CheckpointError, match=r"bad.safetensors: 'patch_embedding.weight'.*scale of shape"):
        built(host, save(tensors, tmp_path / "bad.safetensors"))


def test_an_integer_convolution_without_a_scale_is_refused_by_name(host, tmp_path):
    path, _ = conv_file(tmp_path, torch.int8, "weight_scale", ())
    tensors = load_file(path)
    del tensors["patch_embedding.weight_scale"]
    with pytest.raises(CheckpointError, match=r"'patch_embedding' is stored as int8"):
        built(host, save(tensors, tmp_path / "bad.safetensors"))


class MatrixOfItsOwn(torch.nn.Module):
    """As Wan Animate's motion encoder has them: a matrix that is multiplied by hand, which knows no scale."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, 256))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("format_name", ["fp8_e4m3fn_scaled", "fp8_e5m2_scaled", "int8", "int8_convrot_fast"])
def test_a_matrix_that_is_no_linear_gets_its_scale(host, format_name, assign):
    from lowbit.host.weights.checked import settle, watched
    from lowbit.ops.formats import STORAGES
    from lowbit.ops.quantize import assemble, quantize_weight

    row = FORMATS[format_name]
    parts = quantize_weight(torch.randn(64, 256), row.storage, fast=row.fast)
    expected = assemble(parts, row.storage, (64, 256), torch.float32).dequantize()
    assert STORAGES[row.storage].bits == 8
    model = torch.nn.ModuleDict({"motion_encoder": MatrixOfItsOwn()})
    with watched("file.safetensors") as arrivals:
        state_dict = {f"motion_encoder.{suffix}": part for suffix, part in parts.items()}
        if assign:
            # As dynamic VRAM loads: the parameter becomes the file's own codes.
            model["motion_encoder"].weight = torch.nn.Parameter(parts["weight"], requires_grad=False)
        model.load_state_dict(state_dict, strict=False, assign=assign)
    settle(arrivals, "file.safetensors")
    torch.testing.assert_close(model["motion_encoder"].weight.float(), expected, rtol=1e-6, atol=1e-9)
    assert model["motion_encoder"].weight.is_floating_point()


def test_a_matrix_that_is_no_linear_and_packed_is_refused_by_name(host):
    from lowbit.host.weights.checked import settle, watched
    from lowbit.ops.quantize import quantize_weight

    parts = quantize_weight(torch.randn(64, 256), "mxfp8")
    model = torch.nn.ModuleDict({"motion_encoder": MatrixOfItsOwn()})
    with watched("file.safetensors") as arrivals:
        model.load_state_dict({f"motion_encoder.{suffix}": part for suffix, part in parts.items()}, strict=False)
    with pytest.raises(CheckpointError, match=r"file.safetensors: 'motion_encoder' is stored as mxfp8"):
        settle(arrivals, "file.safetensors")
    assert torch.nn.Module.load_state_dict.__qualname__ == "Module.load_state_dict"


def test_weights_of_another_size_are_said_in_one_sentence(host, tmp_path):
    from lowbit.host.weights.checked import watched

    model = torch.nn.ModuleDict({"x": torch.nn.Linear(4, 4)})
    said = pytest.raises(CheckpointError, match=r"^f\.safetensors does not fit the model.*size mismatch for x\.weight")
    with said, watched("f.safetensors"):
        model.load_state_dict({"x.weight": torch.zeros(4, 2), "x.bias": torch.zeros(4)}, strict=False)


# --- missing and foreign weights


LINEARS = ["blocks.1.ffn.2", "blocks.0.cross_attn.v", "time_embedding.2", "head.head", "text_embedding.0"]


@pytest.mark.parametrize("layer", LINEARS)
@pytest.mark.parametrize("form", ["16 bits", "scaled FP8", "core format"])
def test_a_linear_without_its_weight_is_named(host, tmp_path, layer, form):
    tensors = tiny.wan_tensors()
    if form == "scaled FP8":
        tensors = quantized.scaled_fp8(tensors)
    elif form == "core format":
        tensors = load_file(quantized_file(tmp_path, "int8"))
    tensors = {name: tensor for name, tensor in tensors.items() if name != f"{layer}.weight"}
    with pytest.raises(CheckpointError, match=rf"lost.safetensors.*{layer}"):
        built(host, save(tensors, tmp_path / "lost.safetensors"))


@pytest.mark.parametrize("form", ["16 bits", "core format"])
def test_biases_that_a_file_lacks_are_zero_and_not_what_lies_in_memory(host, tmp_path, form, caplog, monkeypatch):
    tensors = load_file(quantized_file(tmp_path, "int8")) if form == "core format" else tiny.wan_tensors()
    lost = ["blocks.0.ffn.0.bias", "head.head.bias", "patch_embedding.bias"]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **more: empty(*size, **more).fill_(3))
    model = built(host, save({name: tensors[name] for name in tensors if name not in lost}, tmp_path / "f.safetensors"))
    assert not any(model.get_parameter(name).any() for name in lost)
    assert model.get_parameter("blocks.0.ffn.2.bias").any()
    assert "f.safetensors lacks the biases of 3 layers, " in caplog.text


def test_a_convolution_without_its_weight_is_named(host, tmp_path):
    from lowbit.host.weights.checked import settle, watched

    model = torch.nn.ModuleDict({"patch": torch.nn.Conv3d(4, 4, 2)})
    with watched("f.safetensors") as arrivals:
        model.load_state_dict({"patch.bias": torch.zeros(4)}, strict=False)
    with pytest.raises(CheckpointError, match=r"f.safetensors has no weight for the model's layer 'patch'"):
        settle(arrivals, "f.safetensors")


def test_any_one_lost_tensor_is_an_error_of_ours_or_harmless(host, tmp_path):
    """Never core's bare KeyError: it tells models apart by tensors that may be the lost one."""
    whole = quantized.scaled_fp8(tiny.wan_tensors())
    said = {}
    for lost in [name for name in whole if name != "scaled_fp8" and not name.startswith("blocks.1.")]:
        path = save({name: whole[name] for name in whole if name != lost}, tmp_path / "lost.safetensors")
        try:
            built(host, path)
        except CheckpointError as error:
            said[lost] = str(error)
        else:
            said[lost] = "nothing"
    linears = {f"{name}.weight" for name in linear_names(whole)}
    assert linears
    assert {
        name: text for name, text in said.items() if name in linears and name.removesuffix(".weight") not in text
    } == {}
    assert {text for text in said.values() if text != "nothing" and not text.startswith("lost.safetensors")} == set()


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("qweight", torch.int32), ("weight_packed", torch.int32), ("W_q", torch.uint8), ("q_weight", torch.int32)],
)
def test_another_tool_s_weights_are_named(host, tmp_path, suffix, dtype):
    tensors = dict(tiny.wan_tensors())
    for layer in [name.removesuffix(".weight") for name in tensors if name.startswith("blocks.") and "ffn" in name]:
        if f"{layer}.weight" in tensors:
            rows, columns = tensors.pop(f"{layer}.weight").shape
            tensors[f"{layer}.{suffix}"] = torch.zeros(columns // 8, rows, dtype=dtype)
            tensors[f"{layer}.scales"] = torch.ones(columns // 128, rows)
    path = save(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=rf"foreign.safetensors: it holds 'blocks.0.ffn.0.{suffix}'"):
        built(host, path)
    with pytest.raises(CheckpointError, match=rf"foreign.safetensors: it holds 'blocks.0.ffn.0.{suffix}'"):
        host.preparing.plan_diffusion_model(path, host.preparing.Request("int8"))


@pytest.mark.parametrize("layer", ["blocks.0.ffn.0", "blocks.1.ffn.0"])
def test_a_tool_that_nobody_knows_is_named_by_what_it_left(host, tmp_path, layer):
    """Whether core tells models apart by that layer or not."""
    tensors = dict(tiny.wan_tensors())
    tensors[f"{layer}.mystery"] = tensors.pop(f"{layer}.weight")
    with pytest.raises(CheckpointError, match=rf"foreign.safetensors.*{layer}.*but '{layer}.mystery'"):
        built(host, save(tensors, tmp_path / "foreign.safetensors"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32, torch.int16])
def test_a_matrix_of_integers_that_nothing_describes_is_refused_by_name(host, tmp_path, dtype):
    tensors = dict(tiny.wan_tensors()) | {"blocks.0.ffn.0.weight": torch.zeros(512, 32, dtype=dtype)}
    with pytest.raises(CheckpointError, match=r"'blocks.0.ffn.0' is stored as"):
        built(host, save(tensors, tmp_path / "foreign.safetensors"))


class Encoder(torch.nn.Module):
    """A text encoder with a tower for images, a projection that files leave out, and blocks."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.visual = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))})
        self.text_projection = torch.nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        (("visual.", "text_projection."), None),
        (("text_projection.",), None),
        (("layers.1.weight",), "layers.1"),
        (("visual.blocks.2.weight", "text_projection."), "visual.blocks.2"),
    ],
)
def test_a_text_encoder_may_lack_a_whole_part_but_no_block_of_one(host, left_out, named, caplog):
    from lowbit.host.weights.checked import settle, watched

    model = Encoder()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(left_out)}
    with watched("te.safetensors") as arrivals:
        model.load_state_dict(tensors, strict=False)
    if named is None:
        settle(arrivals, "te.safetensors", optional_parts=True)
        assert not caplog.text
        return
    with pytest.raises(CheckpointError, match=rf"te.safetensors has no weight for the model's layer '{named}'"):
        settle(arrivals, "te.safetensors", optional_parts=True)


def test_a_model_that_two_files_fill_lacks_what_neither_has(host):
    from lowbit.host.weights.checked import settle, watched

    model = Encoder()
    whole = model.state_dict()
    for left_out in ("", "layers.1."):
        with watched("two.safetensors") as arrivals:
            for half in ("visual.", "layers."):
                tensors = {name: tensor for name, tensor in whole.items() if name.startswith(half)}
                kept = {
                    name: tensor for name, tensor in tensors.items() if not left_out or not name.startswith(left_out)
                }
                model.load_state_dict(kept, strict=False)
        if left_out:
            with pytest.raises(CheckpointError, match=r"'layers.1'"):
                settle(arrivals, "two.safetensors", optional_parts=True)
        else:
            settle(arrivals, "two.safetensors", optional_parts=True)


# --- the sizes of quantized matrices


@pytest.mark.parametrize(
    ("shape", "fits"), [((250, 512), True), ((506, 512), False), ((122, 512), False), ((250, 768), False)]
)
@pytest.mark.parametrize(
    "format_name",
    ["fp8_e4m3fn_scaled", "int8_convrot_fast", "mxfp8", "fp4_scaled", "int4_convrot_fast", "int4_asym_fast"],
)
def test_a_quantized_weight_of_another_size_than_its_layer_is_refused_by_name(host, format_name, shape, fits):
    """Block formats cut it to the layer's size, and multiply by what is left."""
    import comfy.ops

    from lowbit.host.weights.checked import settle, watched
    from lowbit.ops.quantize import quantize_weight

    row = FORMATS[format_name]
    linear = comfy.ops.mixed_precision_ops({}, torch.bfloat16).Linear(512, 250, False, "cpu", torch.bfloat16)
    parts = quantize_weight(torch.randn(shape), row.storage, unit_scale=row.unit_scale, fast=row.fast)

    def load() -> None:
        with watched("te.safetensors") as arrivals:
            torch.nn.ModuleDict({"q": linear}).load_state_dict({f"q.{end}": part for end, part in parts.items()})
        settle(arrivals, "te.safetensors", optional_parts=True)

    if fits:
        load()
        return
    with pytest.raises(CheckpointError, match=r"te\.safetensors does not fit the model .*: use another file\.$"):
        load()


def test_a_quantized_table_may_have_other_rows_than_the_model_has_tokens(host):
    import comfy.ops

    from lowbit.host.weights.checked import settle, watched
    from lowbit.ops.quantize import quantize_weight

    table = comfy.ops.mixed_precision_ops({}, torch.bfloat16).Embedding(96, 64, device="cpu", dtype=torch.bfloat16)
    state_dict = {f"shared.{end}": part for end, part in quantize_weight(torch.randn(80, 64), "int8").items()}
    with watched("te.safetensors") as arrivals:
        torch.nn.ModuleDict({"shared": table}).load_state_dict(state_dict)
    settle(arrivals, "te.safetensors", optional_parts=True)
    assert hasattr(table.weight, "dequantize")
    assert table(torch.tensor([79])).shape == (1, 64)
