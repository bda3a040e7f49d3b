"""A damaged or foreign file is named when it is loaded; a scale on what is no Linear is multiplied out, never dropped."""

from __future__ import annotations

import threading
import types
from concurrent import futures

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError
from lowbit.ops import finite
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.plan import make_plan
from lowbit.ops.quantize import core_config_tensor
from lowbit.ops.stream import quantize_checkpoint
from testing import tiny
from testing.tiny import quantized
from testing.tiny.tensors import linear_names

KEPT = "blocks.0.norm3.weight"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def save(tensors, path, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata or tiny.WAN.metadata())
    return path


def built(host, path) -> torch.nn.Module:
    return host.loading.load_diffusion_model(str(path)).model.diffusion_model


def quantized_file(tmp_path, format_name, tensors=None):
    source, target = (
        save(tensors or tiny.wan_tensors(), tmp_path / "source.safetensors"),
        tmp_path / "stored.safetensors",
    )
    checkpoint = open_checkpoint(source)
    quantize_checkpoint(checkpoint, make_plan(checkpoint, FORMATS[format_name], None), target)
    return target


def damaged(path, name, byte, count=1):
    """`path` with the last bytes of the tensor `name` overwritten, which is where whoever looks stops last."""
    entry = open_checkpoint(path).entries[name]
    with path.open("r+b") as file:
        file.seek(entry.offset + entry.nbytes - count)
        file.write(byte * count)
    return path


# --- no numbers


LAYER = "blocks.1.ffn.0"
NOT_NUMBERS = [
    ("fp8_e4m3fn_scaled", "weight", b"\xff"),
    ("fp8_e5m2_scaled", "weight", b"\x7c"),
    ("fp8_e4m3fn_scaled", "weight_scale", b"\xff"),
    ("mxfp8", "weight", b"\x7f"),
    ("mxfp8", "weight_scale", b"\xff"),
    ("int8", "weight_scale", b"\xff"),
    ("int8_convrot_fast", "weight_scale", b"\xff"),
    ("fp4_scaled", "weight_scale", b"\x7f"),
    ("fp4_scaled", "weight_scale_2", b"\xff"),
    ("int4_convrot_fast", "weight_scale", b"\xff"),
    ("int4_asym_fast", "weight_s_rel", b"\x7f"),
    ("int4_asym_fast", "weight_s_channel", b"\xff"),
]


@pytest.mark.parametrize(("format_name", "suffix", "byte"), NOT_NUMBERS)
def test_stored_codes_and_scales_that_are_no_numbers_are_named_at_load(host, tmp_path, format_name, suffix, byte):
    path = quantized_file(tmp_path, format_name)
    built(host, path)
    name = f"{LAYER}.{suffix}"
    count = open_checkpoint(path).entries[name].dtype.itemsize
    with pytest.raises(CheckpointError, match=rf"stored.safetensors: {name} holds NaN or Inf"):
        built(host, damaged(path, name, byte, count))


@pytest.mark.parametrize(("format_name", "suffix", "byte"), NOT_NUMBERS)
def test_and_when_such_a_file_is_quantized_further(host, tmp_path, format_name, suffix, byte):
    tensors = load_file(quantized_file(tmp_path, format_name))
    tensors["blocks.0.self_attn.q.weight"] = torch.randn(256, 256).bfloat16()
    for name in [name for name in tensors if name.startswith("blocks.0.self_attn.q.weight_")]:
        del tensors[name]
    del tensors["blocks.0.self_attn.q.comfy_quant"]
    path, name = save(tensors, tmp_path / "partly.safetensors"), f"{LAYER}.{suffix}"
    count = open_checkpoint(path).entries[name].dtype.itemsize
    planned = host.preparing.plan_diffusion_model(damaged(path, name, byte, count), host.preparing.Request("int8"))
    with pytest.raises(CheckpointError, match=rf"partly.safetensors: {name} holds NaN or Inf"):
        host.preparing.prepared_file(planned)


@pytest.mark.parametrize("name", ["blocks.0.ffn.0.weight", KEPT, "head.modulation"])
def test_a_16_bit_file_that_is_loaded_as_it_is_is_looked_at_too(host, tmp_path, name):
    path = save(tiny.wan_tensors(), tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match=rf"wan.safetensors: {name} holds NaN or Inf"):
        built(host, damaged(path, name, b"\xff", 2))


def test_a_file_is_looked_at_once_and_one_of_the_cache_was_when_it_was_written(host, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("lowbit.ops.finite._look", lambda piece: looked.extend(name for _, name in piece.members))
    path = save(tiny.wan_tensors(), tmp_path / "wan.safetensors")
    built(host, path)
    assert {name for name, tensor in tiny.wan_tensors().items() if tensor.is_floating_point()} == set(looked)
    looked.clear()
    built(host, path)
    cached = host.preparing.prepared_file(host.preparing.plan_diffusion_model(path, host.preparing.Request("int8")))
    looked.clear()
    built(host, cached)
    assert looked == []


def sample(patcher, steps=1):
    import comfy.sample

    latent = torch.zeros(1, 16, 1, 8, 8)
    text = [[torch.zeros(1, 4, tiny.WAN.text), {}]]
    return comfy.sample.sample(
        patcher, latent, steps, 1.0, "euler", "simple", text, text, latent, seed=1, disable_pbar=True
    )  # fmt: skip


def test_a_large_file_is_looked_at_while_it_is_used_and_said_before_anything_is_made_of_it(host, tmp_path, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_FILE", 0)
    path, name = quantized_file(tmp_path, "fp8_e4m3fn_scaled"), f"{LAYER}.weight"
    good = host.loading.load_diffusion_model(str(path))
    sample(good.clone())
    bad = host.loading.load_diffusion_model(str(damaged(path, name, b"\xff")))
    planned = host.preparing.plan_diffusion_model(path, host.preparing.Request("none"))
    for patcher in (bad, bad.clone(), bad, host.quantizing.quantize_model(good, planned)):
        comfy.model_management.load_models_gpu([patcher])
        with pytest.raises(CheckpointError, match=rf"stored.safetensors: {name} holds NaN or Inf"):
            sample(patcher)
        # As a node does that saves a model.
        with pytest.raises(CheckpointError, match=rf"stored.safetensors: {name} holds NaN or Inf"):
            comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)


def test_another_large_file_is_judged_when_its_model_is_put_on_its_device(host, tmp_path, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_FILE", 0)
    path, name = save(tiny.infinitetalk_tensors(), tmp_path / "talk.safetensors", {}), "audio_proj.proj1.weight"
    bad = host.loading.load_model_patch(str(damaged(path, name, b"\xff", 2)))
    with pytest.raises(CheckpointError, match=rf"talk.safetensors: {name} holds NaN or Inf"):
        comfy.model_management.load_models_gpu([bad])


def test_a_large_text_encoder_that_stays_in_main_memory_is_judged_at_once(host, tmp_path, monkeypatch):
    import comfy.sd

    from testing.shims import detection

    detection.install(monkeypatch.setattr)
    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_FILE", 0)
    path = save(tiny.umt5_tensors(), tmp_path / "umt5.safetensors", {})
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    with pytest.raises(CheckpointError, match=rf"umt5.safetensors: {name} holds NaN or Inf"):
        host.loading.load_text_encoder([str(damaged(path, name, b"\xff", 2))], comfy.sd.CLIPType.WAN)


@pytest.fixture
def evaluations(monkeypatch):
    """One entry for each evaluation of a model that is over."""
    import comfy.model_base

    over, evaluate = [], comfy.model_base.BaseModel._apply_model
    monkeypatch.setattr(
        comfy.model_base.BaseModel,
        "_apply_model",
        lambda *args, **kwargs: [evaluate(*args, **kwargs), over.append(1)][0],
    )
    return over


def test_a_large_diffusion_model_is_looked_at_once_its_weights_were_used(host, tmp_path, monkeypatch, evaluations):
    """Beside the first evaluation, which brings them to the GPU, a look would hold that one up."""
    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_FILE", 0)
    looked, look = [], finite._look
    monkeypatch.setattr(finite, "_look", lambda piece: looked.append(len(evaluations)) or look(piece))
    patcher = host.loading.load_diffusion_model(str(save(tiny.wan_tensors(), tmp_path / "wan.safetensors")))
    assert not looked
    sample(patcher, steps=3)
    assert looked
    assert min(looked) == 1
    count = len(looked)
    sample(patcher, steps=3)
    assert len(looked) == count, "once"


def test_what_was_found_is_said_in_the_step_that_finds_it_ready(host, tmp_path, monkeypatch, evaluations):
    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_FILE", 0)
    monkeypatch.setattr(finite.FiniteCheck, "answered", property(lambda check: not futures.wait(check._looks).not_done))
    path = damaged(save(tiny.wan_tensors(), tmp_path / "wan.safetensors"), KEPT, b"\xff", 2)
    with pytest.raises(CheckpointError, match=f"{KEPT} holds NaN or Inf"):
        sample(host.loading.load_diffusion_model(str(path)), steps=9)
    assert len(evaluations) == 1


def test_evaluations_at_once_begin_one_look(host, monkeypatch):
    from lowbit.host.weights import checked

    begun = []

    class Slow(finite.FiniteCheck):
        def __init__(self, *args):
            begun.append(threading.Event().wait(0.05))
            super().__init__(*args)

    monkeypatch.setattr(checked, "FiniteCheck", Slow)
    check = checked.NumbersCheck("a file", (), {}, {"a": torch.ones(4)}, {}, diffusion_model=True)
    with futures.ThreadPoolExecutor(4) as threads:
        assert [made.result() for made in [threads.submit(check._evaluated, int) for _ in range(4)]] == [0] * 4
    assert len(begun) == 1


def test_a_large_text_encoder_is_looked_at_while_core_builds_it(host, tmp_path, monkeypatch):
    import comfy.sd

    from testing.shims import detection

    detection.install(monkeypatch.setattr)
    looked, build = threading.Event(), comfy.sd.load_text_encoder_state_dicts
    monkeypatch.setattr(finite, "_look", lambda piece: looked.set())
    monkeypatch.setattr(
        comfy.sd, "load_text_encoder_state_dicts", lambda *args, **kwargs: looked.wait(10) and build(*args, **kwargs)
    )
    path = save(tiny.umt5_tensors(), tmp_path / "umt5.safetensors", {})
    host.loading.load_text_encoder([str(path)], comfy.sd.CLIPType.WAN)
    assert looked.is_set()


def test_of_a_file_that_main_memory_cannot_hold_the_scales_are_looked_at(host, tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.host.weights.checked._SMALL_TENSOR", 1024)
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=0))
    path = quantized_file(tmp_path, "fp8_e4m3fn_scaled")
    built(host, damaged(path, f"{LAYER}.weight", b"\xff"))
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight_scale holds NaN or Inf"):
        built(host, damaged(path, f"{LAYER}.weight_scale", b"\xff", 4))


def test_another_part_of_a_checkpoint_decides_nothing(host, tmp_path):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tiny.wan_tensors().items()}
    tensors["first_stage_model.x.weight"] = torch.full((4, 4), torch.nan)
    built(host, save(tensors, tmp_path / "all.safetensors"))


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
def test_a_text_encoder_may_lack_a_whole_part_but_no_block_of_one(host, left_out, named):
    from lowbit.host.weights.checked import settle, watched

    model = Encoder()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(left_out)}
    with watched("te.safetensors") as arrivals:
        model.load_state_dict(tensors, strict=False)
    if named is None:
        settle(arrivals, "te.safetensors", optional_parts=True)
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
