"""Each loader on each tiny architecture, every format on the first of a kind: sampled, decoded, finite and near the bf16 result."""

from __future__ import annotations

import fnmatch
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lowbit.ops.formats import FORMATS, STORAGES
from testing import graphs, tiny
from testing.cases import CASES, in_formats
from testing.measure import relative_error

MEASURED = json.loads((Path(__file__).parent / "tolerances.json").read_text())["largest_error"]
SEED = 1
UMT5 = graphs.conditioning_from_text(graphs.load_text_encoder("umt5.safetensors", "wan"))


def wan(name: str, format: str | None = None, seed: int = SEED, **options) -> graphs.Graph:
    """Wan text-to-video from this file."""
    return graphs.wan_t2v(graphs.load_diffusion_model(name, format, **options), UMT5, seed=seed)


@dataclass(frozen=True)
class Made:
    """What a case gave in a format: its value, the decoded images where it has some, and what each Linear was."""

    value: torch.Tensor
    images: torch.Tensor | None
    layers: dict[str, dict[str, str | None]]


@pytest.fixture(scope="session")
def made(bench):
    """(case, format) -> `Made`, run when first asked for; format None takes core's loader on the bf16 file."""

    class Runs(dict):
        def __missing__(self, key):
            case, facts = CASES[key[0]], f"facts of {key[0]} in {key[1]}"
            graph, values = case.graph(key[1], SEED), {"value": case.value}
            graph["facts"] = graphs.node("TinyFacts", value=[case.loader, 0], name=facts)
            if case.decodes:
                graph, values = graph | graphs.decode(), values | {"image": ["images", 0]}
            out = bench.tensors(graph, **values)
            layers = json.loads((bench.output / f"{facts}.json").read_text())["layers"]
            self[key] = Made(out["value"], out.get("image"), layers)
            return self[key]

    return Runs()


ALIKE = ("wan_i2v_21", "wan_i2v_22", "qwen25_vl")


@pytest.mark.parametrize(("name", "format"), in_formats(*(name for name in CASES if name not in ALIKE), others=ALIKE))
def test_result_is_near_bf16(made, name, format):
    found = made[name, format]
    assert found.value.isfinite().all()
    assert found.images is None or found.images.isfinite().all()
    error = relative_error(found.value, made[name, None].value)
    assert MEASURED[name][format] / 3 < error < MEASURED[name][format] * 1.5


@pytest.mark.parametrize("name", CASES)
def test_format_none_gives_the_same_bits_as_core(made, name):
    assert made[name, "none"].value.equal(made[name, None].value)


@pytest.mark.parametrize("name", CASES)
def test_auto_is_the_format_for_this_processor_and_says_so(bench, made, name):
    """tests/ops/test_auto_format.py has every GPU; this server runs on the CPU."""
    case = CASES[name]
    expected = "int8_convrot_fast" if case.decodes else "int8"
    graph = case.graph("auto", SEED)
    assert f"Format {expected}: " in report_of(bench, {case.loader: graph[case.loader]}, case.loader)
    assert made[name, "auto"].value.equal(made[name, expected].value)


@pytest.mark.parametrize(
    ("name", "format"), in_formats("wan_t2v", "qwen_image", "infinitetalk", "umt5", others=["qwen25_vl"])
)
def test_linears_are_stored_in_the_format_and_multiply_through_the_pack(made, name, format):
    layers = made[name, format].layers
    quantized = {layer: facts for layer, facts in layers.items() if facts["weight"] == "QuantizedTensor"}
    row = FORMATS[format]
    allowed = {STORAGES[row.storage].core_format, STORAGES[row.substitute].core_format}
    modulation = {layer for layer in quantized if "_mod." in layer}
    assert len(quantized) >= 14
    assert bool(modulation) == (name == "qwen_image")
    assert {quantized[layer]["format"] for layer in quantized.keys() - modulation} <= allowed
    eight_bits = allowed if STORAGES[row.storage].bits == 8 else {STORAGES["int8"].core_format}
    assert {quantized[layer]["format"] for layer in modulation} <= eight_bits
    ours = "lowbit.host.weights.operations.QuantizedLinear.forward"
    assert all(layer["forward"].endswith(ours) for layer in quantized.values())


@pytest.mark.parametrize("format", ["fp8_e4m3fn_scaled", "int8", "fp4_scaled", "int4_asym_fast"])
def test_quantized_model_holds_as_few_bytes_as_its_format_promises(bench, format):
    def held(choice: str) -> int:
        return bench.facts({"model": wan("wan_t2v.safetensors", choice)["model"]}, ["model", 0])["bytes"]

    blocks = sum(
        tensor.numel()
        for key, tensor in tiny.wan_tensors().items()
        if key.startswith("blocks.") and tensor.dim() == 2 and "modulation" not in key
    )
    # On a CPU core holds in float32 what stays unquantized.
    saved = (held("none") - held(format)) / blocks
    assert saved == pytest.approx(4 - STORAGES[FORMATS[format].storage].bits / 8, abs=0.15)


STORED = {
    "wan_t2v_cast_e4m3fn": "fp8_e4m3fn",
    "wan_t2v_cast_e5m2": "fp8_e5m2",
    "wan_t2v_scaled_fp8_kijai": "fp8_e4m3fn_scaled",
    "wan_t2v_scaled_fp8_comfy": "fp8_e4m3fn_scaled",
    "wan_t2v_scaled_fp8_full_precision": "fp8_e4m3fn_scaled",
    "wan_t2v_scaled_e5m2": "fp8_e5m2_scaled",
    "wan_t2v_weight_scale": "fp8_e4m3fn_scaled",
    "wan_t2v_weight_scale_rows": "fp8_e4m3fn_scaled",
    "wan_t2v_quantization_metadata": "fp8_e4m3fn_scaled",
    "wan_t2v_comfy_quant": "fp8_e4m3fn_scaled",
}


@pytest.mark.parametrize("format", ["auto", "none", "int8"])
@pytest.mark.parametrize("name", STORED)
def test_file_that_is_quantized_already_is_taken_as_it_is(bench, made, name, format):
    value = bench.sample(wan(f"{name}.safetensors", format))["latent"]
    error = relative_error(value, made["wan_t2v", None].value)
    # A plain cast casts embeddings and projections too, which the keep rules would have left alone.
    allowance = 8 if "cast" in name else 1.5
    assert error < MEASURED["wan_t2v"][STORED[name]] * allowance
    layers = bench.facts({"model": wan(f"{name}.safetensors", format)["model"]}, ["model", 0])["layers"]
    stored = "float8_e5m2" if "e5m2" in name else "float8_e4m3fn"
    assert {layers[f"diffusion_model.blocks.0.{part}"]["format"] for part in ("self_attn.q", "ffn.0")} == {stored}


def test_text_encoder_with_old_scaled_fp8_keys_is_near_bf16(bench, made):
    clip = graphs.load_text_encoder("umt5_scaled_fp8.safetensors", "wan", "auto")
    graph = graphs.conditioning_from_text(clip, prompt="a red train ")
    value = bench.tensors(graph, value=["positive", 0])["value"]
    assert relative_error(value, made["umt5", None].value) < MEASURED["umt5"]["fp8_e4m3fn_scaled"] * 1.5


def test_text_encoder_on_the_cpu_gives_the_same_conditioning(bench):
    def encode(**options):
        clip = graphs.load_text_encoder("umt5.safetensors", "wan", "int8", **options)
        return bench.tensors(graphs.conditioning_from_text(clip), value=["positive", 0])["value"]

    assert encode(device="cpu").equal(encode())


@pytest.mark.parametrize("format", ["none", "int8", "fp4_scaled"])
def test_sharded_set_gives_the_same_bits_as_one_file(bench, made, format):
    whole = made["wan_t2v", format].value
    assert bench.sample(wan("wan_t2v_sharded.safetensors.index.json", format))["latent"].equal(whole)


@pytest.mark.parametrize(("precision", "tolerance"), [("auto", 0), ("fp32", 0), ("bf16", 0.05), ("fp16", 0.01)])
def test_vae_loader_decodes_in_each_precision(bench, precision, tolerance):
    reference = bench.sample(wan("wan_t2v.safetensors") | graphs.decode())["image"]
    loader = graphs.node("LowbitLoadVAE", vae_name="wan_vae.safetensors", precision=precision)
    image = bench.sample(wan("wan_t2v.safetensors") | graphs.decode(loader))["image"]
    assert image.isfinite().all()
    assert relative_error(image, reference) <= tolerance


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_model_node_gives_the_same_bits_as_the_loader(bench, made, format):
    graph = wan("wan_t2v.safetensors", format)
    quantize = graphs.node(
        "LowbitQuantizeModel",
        model=["core", 0],
        format=format,
        keep_rules="auto",
        dry_run=False,
        keep_quantized_file=True,
    )
    behind = graph | {"core": graphs.load_diffusion_model("wan_t2v.safetensors"), "model": quantize}
    assert bench.sample(behind)["latent"].equal(made["wan_t2v", format].value)


def report_of(bench, graph: graphs.Graph, loader: str = "model") -> str:
    """The text that this node gives beside what it loads."""
    preview = graphs.node("PreviewAny", source=[loader, 1])
    return bench.server.run(graph | {"preview": preview}).outputs["preview"]["text"][0]


def cached_files(bench) -> set[Path]:
    return set((bench.models / "lowbit_cache").glob("**/*.safetensors"))


def test_dry_run_lists_every_layer_and_neither_loads_nor_writes(bench):
    before = cached_files(bench)
    loader = graphs.load_diffusion_model("wan_ti2v_5b.safetensors", "fp4_scaled", dry_run=True)
    # Everything behind the loader is blocked: only the report comes out.
    text = report_of(bench, wan("wan_ti2v_5b.safetensors") | {"model": loader})
    assert "20 quantized, 6 kept" in text
    table = {line[:10].strip(): line[10:].split() for line in text.splitlines() if "%" in line and "MiB]" not in line}
    assert {title: row[1] for title, row in table.items()} == dict.fromkeys(("smallest", "balanced", "most exact"), "-")
    assert table["balanced"][3] == "int8_convrot_fast"
    # Alike layers share a line: blocks.*.ffn.* (2 layers).
    listed = [line.split()[0] for line in text.splitlines() if "MiB]" in line]
    shapes = tiny.wan.shapes(tiny.WAN_5B)
    layers = [key.removesuffix(".weight") for key, shape in shapes.items() if len(shape) == 2]
    assert [layer for layer in layers if not any(fnmatch.fnmatchcase(layer, pattern) for pattern in listed)] == []
    assert all("kept" in line for line in text.splitlines() if line.startswith(("head", "text_", "time_")))
    assert all("nvfp4" in line for line in text.splitlines() if line.startswith("blocks."))
    assert cached_files(bench) == before


def test_dry_run_of_the_quantizing_node_tells_the_same_and_blocks_what_is_behind(bench):
    before = cached_files(bench)
    quantize = graphs.node(
        "LowbitQuantizeModel",
        model=["core", 0],
        format="int4_convrot_fast",
        keep_rules="auto",
        dry_run=True,
        keep_quantized_file=True,
    )
    graph = wan("wan_ti2v_5b.safetensors") | {
        "core": graphs.load_diffusion_model("wan_ti2v_5b.safetensors"),
        "model": quantize,
    }
    loader = graphs.load_diffusion_model("wan_ti2v_5b.safetensors", "int4_convrot_fast", dry_run=True)
    assert report_of(bench, graph) == report_of(bench, wan("wan_ti2v_5b.safetensors") | {"model": loader})
    assert cached_files(bench) == before


def test_keep_rules_are_obeyed(bench):
    loader = graphs.load_diffusion_model("wan_t2v.safetensors", "int8", keep_rules="auto\nblocks.0.*.q\nblocks.1.ffn")
    layers = bench.facts({"model": loader}, ["model", 0])["layers"]
    kept = {name.removeprefix("diffusion_model.") for name, layer in layers.items() if layer["format"] is None}
    blocks = {name for name in kept if name.startswith("blocks.")}
    assert blocks == {"blocks.0.self_attn.q", "blocks.0.cross_attn.q", "blocks.1.ffn.0", "blocks.1.ffn.2"}


def test_kept_quantized_file_is_used_again_and_an_unkept_one_is_not_left_among_them(bench):
    source = bench.models / "diffusion_models" / "cached_twice.safetensors"
    shutil.copy(bench.models / "diffusion_models" / "wan_t2v.safetensors", source)
    made = {}
    for turn in (1, 2):
        bench.server.free()
        bench.sample(wan(source.name, "int8", seed=turn))
        made[turn] = {path: path.stat().st_mtime_ns for path in cached_files(bench) if source.stem in path.name}
    assert len(made[1]) == 1
    assert made[2] == made[1]
    bench.sample(wan(source.name, "fp4", keep_quantized_file=False))
    kept = [path for path in (bench.models / "lowbit_cache").glob("*.safetensors") if source.stem in path.name]
    assert kept == list(made[1])
    source.unlink()


def test_changed_source_is_quantized_anew_and_its_old_file_removed(bench):
    source = bench.models / "diffusion_models" / "changing.safetensors"
    shutil.copy(bench.models / "diffusion_models" / "wan_t2v.safetensors", source)
    first = bench.sample(wan(source.name, "int8"))["latent"]
    old = {path for path in cached_files(bench) if source.stem in path.name}
    tiny.write_file(source, tiny.draw(tiny.wan.shapes(tiny.WAN), seed=99), tiny.WAN.metadata())
    second = bench.sample(wan(source.name, "int8"))["latent"]
    reference = bench.sample(wan(source.name))["latent"]
    new = {path for path in cached_files(bench) if source.stem in path.name}
    assert relative_error(second, reference) < MEASURED["wan_t2v"]["int8"] * 3
    assert relative_error(first, reference) > 0.1
    assert len(new) == 1
    assert not new & old
    source.unlink()
