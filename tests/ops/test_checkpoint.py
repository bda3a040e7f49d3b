"""Claims about reading: what safetensors wrote is read bit for bit, and no damaged file is believed."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lowbit.errors import CheckpointError
from lowbit.ops.checkpoint import DTYPES, open_checkpoint


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


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("not json", "is not a safetensors index"),
        ("{}", "is not a safetensors index"),
        ('{"weight_map": {"a": "../../etc/x.safetensors"}}', "outside its own folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "which is missing"),
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
    assert open_checkpoint(save(wan_tensors)).identity() != before
