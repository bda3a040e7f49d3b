"""Claims about reading: what safetensors wrote is read bit for bit, and no damaged file is believed."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lowbit.errors import CheckpointError
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.header import DTYPES


def raw_file(header: object, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def test_every_dtype_is_read_bit_for_bit(tmp_path):
    tensors = {
        name: torch.randint(0, 2, (16,), dtype=torch.uint8).view(dtype)
        if dtype == torch.bool
        else torch.randint(0, 256, (48,), dtype=torch.uint8).view(dtype)
        for name, dtype in DTYPES.items()
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name).view(torch.uint8), tensor.view(torch.uint8))


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(save):
    """A length of 0x580 begins with the bytes of a protocol-5 pickle."""
    for size in range(1200, 1500):
        path = save({"a": torch.zeros(2)}, metadata={"pad": "x" * size})
        if path.read_bytes()[:2] == b"\x80\x05":
            assert open_checkpoint(path).read("a").shape == (2,)
            return
    pytest.fail("no padding gave that length")


def test_empty_and_scalar_tensors(save):
    path = save({"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "x": torch.arange(3)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.read("scalar").item() == 2.5
    assert checkpoint.read("empty").shape == (0, 7)


def test_a_sharded_set_is_read_whole_from_its_index_and_from_any_shard(tmp_path, wan_tensors):
    names = sorted(wan_tensors)
    parts = [names[0::3], names[1::3], names[2::3]]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        shard = f"wan-{number:05}-of-00003.safetensors"
        save_file({name: wan_tensors[name] for name in part}, tmp_path / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = tmp_path / "wan.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (index, tmp_path / "wan-00002-of-00003.safetensors"):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.entries) == set(names)
        assert all(torch.equal(checkpoint.read(name), wan_tensors[name]) for name in names)
    (tmp_path / "wan-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"needs the shard wan-00003-of-00003\.safetensors, which is missing"):
        open_checkpoint(index)


def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "2.safetensors")
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert torch.equal(open_checkpoint(index).read("a"), torch.ones(4))
    index.write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lists 'b', which 1\.safetensors does not hold"):
        open_checkpoint(index)


def shards(folder, pattern: str, index: str | None = None) -> list[str]:
    """Three shards of one tensor each, and an index of that name."""
    names = [pattern.format(number) for number in (1, 2, 3)]
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.full((4,), float(number))}, folder / name)
    if index is not None:
        weight_map = {f"t{number}": name for number, name in enumerate(names)}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return names


@pytest.mark.parametrize(
    ("pattern", "index"),
    [
        ("x-{:05}-of-00003.safetensors", None),
        ("x-{:05}-of-00003.sft", None),
        ("x.fp16-{:05}-of-00003.safetensors", "x.safetensors.index.fp16.json"),
        ("x-{:05}-of-00003.fp16.safetensors", "x.safetensors.index.fp16.json"),
        ("x.v1-{:05}-of-00003.safetensors", "x.v1.safetensors.index.json"),
    ],
)
def test_a_shard_never_opens_as_a_whole_model(tmp_path, pattern, index):
    names = shards(tmp_path, pattern, index)
    for name in (*names, *([index] if index else ())):
        checkpoint = open_checkpoint(tmp_path / name)
        assert [checkpoint.read(f"t{number}")[0].item() for number in range(3)] == [0.0, 1.0, 2.0]
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"shard {re.escape(names[1])}, which is missing|{names[1]} is missing"):
        open_checkpoint(tmp_path / names[0])


def test_a_set_without_an_index_that_holds_a_tensor_twice_is_refused(tmp_path):
    names = shards(tmp_path, "x-{:05}-of-00003.safetensors")
    save_file({"t0": torch.zeros(4)}, tmp_path / names[2])
    with pytest.raises(CheckpointError, match="both .* hold 't0'"):
        open_checkpoint(tmp_path / names[0])


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("not json", "is not a safetensors index"),
        ("{}", "is not a safetensors index"),
        ('{"weight_map": {"a": "../../etc/x.safetensors"}}', "outside its own folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "which is missing"),
        ('{"weight_map": {"a": 5}}', "is not a safetensors index"),
        ('{"weight_map": {"a": ""}}', "is not a safetensors index"),
        ('{"weight_map": ["a"]}', "is not a safetensors index"),
        ("[" * 200_000, "is not a safetensors index"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, index, reason):
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(path)


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a whole safetensors file"),
        (b"\x00" * 7, "is not a whole safetensors file"),
        (b"garbage that is long enough to look like something", "is not a whole safetensors file"),
        (raw_file(b"{]"), "no readable safetensors header"),
        (raw_file(b"\xff\xfe"), "no readable safetensors header"),
        (raw_file([1]), "is no table"),
        (raw_file(b'{"a": {}, "a": {}}'), "occurs twice"),
        (raw_file(b"[" * 200_000), "nested too deeply"),
        (raw_file(b'{"a":' * 20_000), "nested too deeply"),
        (raw_file({"a": F32 | {"shape": [2**63, 0], "data_offsets": [0, 0]}}), "beyond counting"),
        (raw_file({"a": F32 | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}), "beyond counting"),
        (raw_file({"a\ud800": F32}, b"\0" * 16), "its name is no text"),
        (raw_file({"__metadata__": {"a": "\ud800"}}), "metadata that is not text"),
        (raw_file({"a": F32}, b"\0" * 15), "is truncated"),
        (raw_file({"a": F32}, b"\0" * 17), "that no tensor claims"),
        (raw_file({"a": F32 | {"shape": [5]}}, b"\0" * 16), "the header lies"),
        (raw_file({"a": F32 | {"shape": [-4]}}, b"\0" * 16), "described wrongly"),
        (raw_file({"a": F32 | {"shape": [True]}}, b"\0" * 16), "described wrongly"),
        (raw_file({"a": F32 | {"dtype": "F7"}}, b"\0" * 16), "unknown or missing 'F7'"),
        (raw_file({"a": {"dtype": "F32"}}, b"\0" * 16), "unknown or missing 'shape'"),
        (raw_file({"a": 3}), "described wrongly"),
        (raw_file({"a": F32, "b": F32}, b"\0" * 16), "overlaps"),
        (raw_file({"a": F32 | {"data_offsets": [16, 32]}}, b"\0" * 32), "leaves a gap"),
        (raw_file({"__metadata__": {"a": 1}}), "metadata that is not text"),
        (pickle.dumps({"a": 1}), "is a pickle checkpoint"),
        (b"PK\x03\x04" + b"\0" * 100, "is a pickle checkpoint"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, content, reason):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as raised:
        open_checkpoint(path)
    assert "bad.safetensors" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_pickle_suffix_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "gone.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"\0" * 64)
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(tmp_path / "model.ckpt")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_in_a_header_never_crash_or_read_outside(tmp_path, data):
    save_file({"a": torch.randn(3, 5), "b": torch.randn(7).half()}, tmp_path / "ok.safetensors")
    content = bytearray((tmp_path / "ok.safetensors").read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError:
        return
    for name in checkpoint.entries:
        checkpoint.read(name)


def test_identity_follows_the_content(save, wan_tensors):
    path = save(wan_tensors)
    before = open_checkpoint(path).identity()
    assert open_checkpoint(path).identity() == before
    wan_tensors["head.head.weight"] = wan_tensors["head.head.weight"] + 1
    save(wan_tensors)
    # File systems stamp with a clock that ticks every few milliseconds.
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert open_checkpoint(path).identity() != before


@pytest.mark.parametrize("change", ["time", "size", "gone"])
def test_a_file_that_changes_after_it_was_opened_is_noticed(save, wan_tensors, change):
    path = save(wan_tensors)
    checkpoint = open_checkpoint(path)
    checkpoint.check_unchanged()
    if change == "time":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif change == "size":
        before = path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes() + b"x")
        os.utime(path, ns=(before, before))
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="changed while it was read" if change != "gone" else "no longer be read"):
        checkpoint.check_unchanged()


def test_a_file_that_goes_away_is_said_by_name(save):
    path = save({"a": torch.ones(4)})
    checkpoint = open_checkpoint(path)
    path.unlink()
    for use in (lambda: checkpoint.read("a"), checkpoint.identity):
        with pytest.raises(CheckpointError, match=r"model\.safetensors can no longer be read"):
            use()


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_file_name_that_is_no_text_is_opened_and_has_an_identity(save, tmp_path):
    name = os.fsdecode(b"caf\xe9.safetensors")
    save({"a": torch.ones(4)}).rename(tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    assert len(checkpoint.identity()) == 64


def test_a_file_without_tensors_is_refused(save):
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(save({}))


@pytest.mark.skipif(os.name == "nt", reason="Windows calls a folder a file without permission")
@pytest.mark.parametrize("name", ["a.safetensors", "a.gguf"])
def test_a_folder_is_called_one(tmp_path, name):
    if name.endswith("gguf"):
        pytest.importorskip("gguf")
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"^{name} is a folder: name a file in it"):
        open_checkpoint(tmp_path / name)
