"""Bad input gets one clear sentence that names the file and the reason; the server lives on and nothing is left behind."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from testing import graphs, tiny
from testing.server import GraphFailedError, GraphRejectedError
from testing.tiny.quantized import scaled_fp8, write_sharded

COND = graphs.conditioning_random(width=256)


def header(entries: dict, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def whole() -> bytes:
    """A good file, to be damaged."""
    path = Path(tiny.write("diffusion_models/wan_t2v_small.safetensors", Path(whole.folder)))
    return path.read_bytes()


def _wan_with(key: str, value: float):
    tensors = dict(tiny.wan_tensors())
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[5] = value
    return tensors


def _write_bytes(data: bytes):
    return lambda path: path.write_bytes(data)


def _truncated(path: Path) -> None:
    data = whole()
    path.write_bytes(data[: len(data) * 2 // 3])


def _lying_offsets(path: Path) -> None:
    entry = {"dtype": "BF16", "shape": [256, 256], "data_offsets": [0, 1 << 40]}
    path.write_bytes(header({"blocks.0.self_attn.q.weight": entry}, bytes(1024)))


def _lying_shape(path: Path) -> None:
    entry = {"dtype": "BF16", "shape": [256, 256], "data_offsets": [0, 1024]}
    path.write_bytes(header({"blocks.0.self_attn.q.weight": entry}, bytes(1024)))


def _huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def _pickle(path: Path) -> None:
    torch.save({"weight": torch.zeros(4)}, path)


def _old_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": [1.0, 2.0]}, protocol=2))


def _unknown_architecture(path: Path) -> None:
    tiny.write_file(path, {"mystery.weight": torch.randn(64, 64), "mystery.bias": torch.randn(64)})


def _nan(path: Path) -> None:
    tiny.write_file(path, _wan_with("blocks.1.ffn.0.weight", float("nan")), tiny.WAN.metadata())


def _inf(path: Path) -> None:
    tiny.write_file(path, _wan_with("blocks.0.cross_attn.v.weight", float("inf")), tiny.WAN.metadata())


def _nan_code(path: Path) -> None:
    tensors = scaled_fp8(tiny.wan_tensors())
    tensors["blocks.1.ffn.0.weight"].view(torch.uint8).view(-1)[-1] = 0x7F
    tiny.write_file(path, tensors, tiny.WAN.metadata())


def _inf_scale(path: Path) -> None:
    tensors = scaled_fp8(tiny.wan_tensors())
    tensors["blocks.1.ffn.0.scale_weight"] = torch.tensor(torch.inf)
    tiny.write_file(path, tensors, tiny.WAN.metadata())


def _foreign(path: Path) -> None:
    tensors = dict(tiny.wan_tensors())
    del tensors["blocks.0.ffn.0.weight"]
    tensors["blocks.0.ffn.0.qweight"] = torch.zeros(32, 512, dtype=torch.int32)
    tiny.write_file(path, tensors, tiny.WAN.metadata())


BAD = {
    "empty": (_write_bytes(b""), "empty"),
    "garbage": (_write_bytes(b"\x93\x11not a model at all" * 99), ""),
    "web_page": (_write_bytes(b"<!DOCTYPE html><html><body>404</body></html>"), ""),
    "truncated": (_truncated, ""),
    "lying_offsets": (_lying_offsets, "blocks.0.self_attn.q.weight"),
    "lying_shape": (_lying_shape, "blocks.0.self_attn.q.weight"),
    "huge_header": (_huge_header, ""),
    "header_is_no_json": (_write_bytes(struct.pack("<Q", 9) + b"{not json" + bytes(64)), ""),
    "pickle": (_pickle, "pickle"),
    "old_pickle": (_old_pickle, "pickle"),
    "unknown_architecture": (_unknown_architecture, ""),
    "nan": (_nan, "blocks.1.ffn.0.weight"),
    "inf": (_inf, "blocks.0.cross_attn.v.weight"),
    "nan_code": (_nan_code, "blocks.1.ffn.0.weight"),
    "inf_scale": (_inf_scale, "blocks.1.ffn.0.scale_weight"),
    "foreign": (_foreign, "blocks.0.ffn.0.qweight"),
}


@pytest.fixture(scope="module", autouse=True)
def good_file_folder(models):
    whole.folder = models


def leftovers(bench) -> set[Path]:
    return {path for path in bench.models.rglob("*") if path.is_file()}


def _output() -> graphs.Graph:
    return {"output": graphs.node("TinyDump", value=["sample", 0], name="bad")}


def failure(bench, graph: graphs.Graph) -> GraphFailedError:
    """Runs the graph, which must fail, and then a good one, which must not."""
    with pytest.raises(GraphFailedError) as caught:
        bench.server.run(graph | _output() if "sample" in graph else graph)
    assert bench.server.alive
    good = graphs.wan_t2v(graphs.load_diffusion_model("wan_t2v.safetensors", "int8"), COND)
    assert bench.sample(good)["latent"].isfinite().all()
    return caught.value


def assert_clear(error: GraphFailedError, *parts: str) -> None:
    """One sentence of ours, that holds the parts."""
    assert error.exception_type.rpartition(".")[2] in (
        "CheckpointError",
        "FormatError",
        "CapabilityError",
        "StorageError",
    ), error.traceback
    message = error.exception_message
    assert "\n" not in message
    assert 20 < len(message) < 400
    assert message.endswith(".")
    for part in parts:
        assert part in message, message


def sampling(name: str, format: str = "fp4_scaled", **options) -> graphs.Graph:
    return graphs.wan_t2v(graphs.load_diffusion_model(name, format, **options), COND)


@pytest.mark.parametrize("format", ["int8", "none"])
@pytest.mark.parametrize("name", BAD)
def test_bad_diffusion_model_is_named_with_the_reason(bench, name, format):
    write, part = BAD[name]
    path = bench.models / "diffusion_models" / f"bad_{name}.safetensors"
    write(path)
    before = leftovers(bench)
    try:
        error = failure(bench, sampling(path.name, format))
        assert_clear(error, *([part] if part else []))
        assert part in error.exception_message
        assert path.name in error.exception_message
        assert {p for p in leftovers(bench) - before if "wan_t2v.int8" not in p.name} == set()
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("folder", "node"),
    [
        ("text_encoders", lambda name: graphs.load_text_encoder(name, "wan", "int8")),
        ("model_patches", lambda name: graphs.load_model_patch(name, "int8")),
        ("model_patches", lambda name: graphs.load_model_patch(name, "none")),
        ("vae", lambda name: graphs.node("LowbitLoadVAE", vae_name=name, precision="auto")),
    ],
)
@pytest.mark.parametrize("name", ["truncated", "garbage", "pickle", "unknown_architecture"])
def test_bad_file_is_named_by_every_other_loader(bench, folder, node, name):
    path = bench.models / folder / f"bad_{name}.safetensors"
    BAD[name][0](path)
    try:
        error = failure(
            bench, {"load": node(path.name), "use": graphs.node("TinyFacts", value=["load", 0], name="bad")}
        )
        assert_clear(error, path.name)
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["nan", "lost", "wide"])
def test_a_text_encoder_s_bad_weight_is_named(bench, name):
    layer = "encoder.block.1.layer.0.SelfAttention.q"
    tensors = scaled_fp8(tiny.umt5_tensors(), layers=("SelfAttention",))
    if name == "nan":
        tensors[f"{layer}.weight"].view(torch.uint8).view(-1)[-1] = 0xFF
    elif name == "wide":
        layer = "encoder.block.1.layer.0.layer_norm"
        tensors[f"{layer}.weight"] = torch.ones(8)
    else:
        del tensors[f"{layer}.weight"], tensors[f"{layer}.scale_weight"]
    path = bench.models / "text_encoders" / f"bad_{name}.safetensors"
    tiny.write_file(path, tensors)
    # The quantized file, of a name of its own, is what ComfyUI trips over.
    load = graphs.load_text_encoder(path.name, "wan", "int8" if name == "wide" else "none")
    try:
        error = failure(bench, {"load": load, "use": graphs.node("TinyFacts", value=["load", 0], name="bad")})
        assert_clear(error, path.name, layer)
    finally:
        path.unlink()


def test_a_vae_s_bad_weight_is_named(bench):
    path = tiny.write("vae/wan_vae.safetensors", bench.models)
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("decoder.") and name.endswith(".weight"))
    tensors[name].view(-1)[-1] = torch.nan
    path = tiny.write_file(bench.models / "vae" / "bad_nan.safetensors", tensors)
    load = graphs.node("LowbitLoadVAE", vae_name=path.name, precision="auto")
    try:
        error = failure(bench, {"load": load, "use": graphs.node("TinyFacts", value=["load", 0], name="bad")})
        assert_clear(error, path.name, name)
    finally:
        path.unlink()


def test_missing_shard_is_named(bench):
    folder = bench.models / "diffusion_models"
    write_sharded(folder, "holey", tiny.wan_tensors(), tiny.WAN.metadata())
    missing = folder / "holey-00002-of-00003.safetensors"
    missing.unlink()
    assert_clear(failure(bench, sampling("holey.safetensors.index.json")), missing.name)
    for path in folder.glob("holey*"):
        path.unlink()


def test_shard_index_cannot_reach_outside_its_folder(bench, tmp_path):
    outside = tiny.write_file(tmp_path / "outside.safetensors", tiny.wan_tensors())
    index = bench.models / "diffusion_models" / "escaping.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tiny.wan_tensors(), str(outside))}))
    assert_clear(failure(bench, sampling(index.name)), index.name)
    index.unlink()


def test_file_that_is_gone_is_named(bench):
    path = bench.models / "diffusion_models" / "soon_gone.safetensors"
    shutil.copy(bench.models / "diffusion_models" / "wan_t2v.safetensors", path)
    graph = sampling(path.name)
    bench.sample(graph)
    path.unlink()
    with pytest.raises((GraphRejectedError, GraphFailedError)) as caught:
        bench.server.run(sampling(path.name, "int8") | _output())
    assert path.name in str(caught.value)
    assert bench.server.alive


def test_unknown_format_is_refused_before_anything_runs(bench):
    with pytest.raises(GraphRejectedError, match="fp3"):
        bench.server.run(sampling("wan_t2v.safetensors", "fp3") | _output())


@pytest.mark.parametrize("rules", ["ffn = fp3", "= int8", "!"])
def test_bad_keep_rule_is_quoted(bench, rules):
    assert_clear(failure(bench, sampling("wan_t2v.safetensors", keep_rules=rules)), f"'{rules}'")


def test_cache_folder_that_cannot_be_written_is_named(bench):
    cache = bench.models / "lowbit_cache"
    aside = bench.models / "lowbit_cache_aside"
    bench.sample(sampling("wan_t2v.safetensors", "int8"))
    cache.rename(aside)
    cache.write_text("a file where the folder should be")
    try:
        with pytest.raises(GraphFailedError) as caught:
            bench.server.run(sampling("wan_t2v.safetensors", "fp8_e5m2_scaled") | _output())
        assert_clear(caught.value, "lowbit_cache")
    finally:
        cache.unlink()
        aside.rename(cache)
    assert bench.sample(sampling("wan_t2v.safetensors", "fp8_e5m2_scaled"))["latent"].isfinite().all()


def test_model_that_will_not_fit_on_the_disk_is_refused_before_it_is_written(bench):
    path = bench.models / "diffusion_models" / "sparse.safetensors"
    free = shutil.disk_usage(path.parent).free
    rows = free * 4 // (2 * 16384)
    entries, offset = {}, 0
    for key, tensor in tiny.wan_tensors().items():
        shape = [rows, 16384] if key == "blocks.0.ffn.0.weight" else list(tensor.shape)
        size = 2 * torch.Size(shape).numel()
        entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = header(entries)
    path.write_bytes(head)
    try:
        with path.open("r+b") as file:
            file.truncate(len(head) + offset)
    except OSError:
        path.unlink()
        pytest.skip("this file system has no sparse files of this size")
    before = leftovers(bench)
    try:
        with pytest.raises(GraphFailedError) as caught:
            bench.server.run(sampling(path.name) | _output())
        assert_clear(caught.value, "sparse", "free")
        assert leftovers(bench) == before
    finally:
        path.unlink()
