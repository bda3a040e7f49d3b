"""Claims about writing: aligned, readable by everyone, verified, with the user's own permissions, or not there at all."""

from __future__ import annotations

import errno
import io
import os
import stat
import time
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from lowbit.errors import StorageError
from lowbit.ops import writer
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.writer import CheckpointWriter, check_free_space, names_nbytes


def write(path, tensors, metadata=None, **options):
    with CheckpointWriter(
        path, name_bytes=names_nbytes(tensors), name_count=len(tensors), metadata=metadata or {}, **options
    ) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.int64]),
            st.lists(st.integers(0, 9), max_size=3),
        ),
        min_size=1,
        max_size=12,
    ),
    metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3),
)
def test_any_tensors_are_written_aligned_and_readable(tmp_path, tensors, metadata):
    made = {f"täg.{number}": torch.randint(0, 100, shape).to(dtype) for number, (dtype, shape) in enumerate(tensors)}
    path = tmp_path / "any.safetensors"
    write(path, made, metadata)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
    loaded = load_file(path)
    assert loaded.keys() == made.keys()
    for name, entry in open_checkpoint(path).entries.items():
        assert entry.offset % entry.dtype.itemsize == 0
        assert torch.equal(
            loaded[name].view(torch.uint8) if loaded[name].dim() else loaded[name],
            made[name].view(torch.uint8) if made[name].dim() else made[name],
        )


def test_names_of_any_script_fit_the_header(tmp_path):
    tensors = {f"{letter * 250}{number}": torch.zeros(8) for number, letter in enumerate("aé模🙂")}
    write(tmp_path / "names.safetensors", tensors)
    assert set(load_file(tmp_path / "names.safetensors")) == set(tensors)


@pytest.mark.parametrize("letter", ["a", "模"])
def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path, letter):
    suffix = ".safetensors"
    path = tmp_path / (letter * ((255 - len(suffix)) // len(letter.encode())) + suffix)
    write(path, {"a": torch.ones(3)})
    assert load_file(path)["a"].sum() == 3


@pytest.mark.parametrize("name", ["x" * 300, "folder"])
def test_a_name_that_cannot_be_is_said_before_the_work(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        CheckpointWriter(tmp_path / name, name_bytes=0, name_count=0, metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_file_has_the_permissions_of_any_other_and_the_process_keeps_its_mask(tmp_path, monkeypatch):
    def refuse(*arguments):
        pytest.fail("permissions were changed behind other threads' backs, or may fail")

    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", refuse)
            patch.setattr(os, "chmod", refuse)
            write(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


class Reluctant(io.FileIO):
    """Takes a few bytes at a time, as a raw file may."""

    def write(self, data):
        return super().write(bytes(data)[:7])


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.ops.writer.os.fdopen", lambda descriptor, mode, buffering: Reluctant(descriptor, mode))
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(4)}
    write(tmp_path / "a.safetensors", tensors, {"k": "v" * 50})
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "a.safetensors").items())


def test_a_disk_that_is_full_when_it_gets_what_was_written_is_named(tmp_path, monkeypatch):
    """The system takes more than the disk has room for: some say so only then."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lowbit.ops.writer._FLUSHED", 64)
    monkeypatch.setattr("lowbit.ops.writer._send_to_disk", full)
    with pytest.raises(StorageError, match="could not be written .*No space left on device"):
        write(tmp_path / "a.safetensors", {f"layer {index}": torch.ones(64) for index in range(4)})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def damaging(monkeypatch):
    """Has `damage` done to the half-written file after each piece of it."""
    monkeypatch.setattr("lowbit.ops.writer._CHUNK", 64)
    monkeypatch.setattr("lowbit.ops.writer._LOOK", 24)

    def damaging(damage):
        write_all = CheckpointWriter._write_all

        def write(writer, piece):
            write_all(writer, piece)
            damage(writer._temporary)

        monkeypatch.setattr(CheckpointWriter, "_write_all", write)

    return damaging


@pytest.mark.parametrize("begins", [True, False])
def test_where_linux_cannot_begin_to_write_it_writes(monkeypatch, begins):
    sent = []
    system = types.SimpleNamespace(sync_file_range=lambda *arguments: 0 if begins else -1)
    monkeypatch.setattr(writer.ctypes, "CDLL", lambda name: system)
    monkeypatch.setattr(writer.sys, "platform", "linux")
    monkeypatch.setattr(writer.os, "fdatasync", sent.append, raising=False)
    writer._send_to_disk(7)
    assert sent == ([] if begins else [7])


def test_what_was_written_is_sent_to_a_real_disk(tmp_path):
    with (tmp_path / "a").open("wb", buffering=0) as file:
        file.write(b"a" * 100)
        writer._send_to_disk(file.fileno())


def test_a_file_that_shrinks_while_it_is_verified_is_refused(tmp_path, damaging):
    damaging(lambda path: os.truncate(path, path.stat().st_size - 1))
    with pytest.raises(StorageError, match="'a' reads back differently"):
        write(tmp_path / "a.safetensors", {"a": torch.ones(8), "b": torch.ones(16)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("from_end", [1, 24, 25, 48, 63])
def test_a_file_that_reads_back_differently_is_refused(tmp_path, damaging, from_end, behind):
    """In whichever part of the last of several pieces."""

    def flip(path):
        with path.open("r+b") as file:
            file.seek(-from_end, os.SEEK_END)
            byte = file.read(1)
            file.seek(-from_end, os.SEEK_END)
            file.write(bytes([byte[0] ^ 16]))

    damaging(flip)
    with pytest.raises(StorageError, match="'a' reads back differently"):
        write(tmp_path / "a.safetensors", {"a": torch.randn(16 * 5 + 15)}, behind=behind)
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_reads_back_differently_is_refused(tmp_path, monkeypatch):
    write_header = CheckpointWriter._write_header

    def damaged(writer):
        write_header(writer)
        data = writer._temporary.read_bytes()
        writer._temporary.write_bytes(data.replace(b"F32", b"I32"))

    monkeypatch.setattr(CheckpointWriter, "_write_header", damaged)
    with pytest.raises(StorageError, match="header of a.safetensors reads back differently"):
        write(tmp_path / "a.safetensors", {"a": torch.ones(8)})
    assert list(tmp_path.iterdir()) == []


def test_a_piece_is_compared_before_its_memory_is_used_again(tmp_path, monkeypatch):
    """What comes from a GPU goes through one small piece of the host's."""
    staged, reads_back = torch.empty(64, dtype=torch.uint8), writer._reads_back

    def blocks(data):
        for block in data.split(64):
            yield block, staged[: block.numel()]

    def late(*piece):
        time.sleep(0.005)
        return reads_back(*piece)

    monkeypatch.setattr(writer, "host_blocks", blocks)
    monkeypatch.setattr(writer, "_CHUNK", 16)
    monkeypatch.setattr(writer, "_reads_back", late)
    tensor = torch.randn(100)
    write(tmp_path / "a.safetensors", {"a": tensor}, behind=True)
    assert load_file(tmp_path / "a.safetensors")["a"].equal(tensor)


def test_the_room_on_a_disk_is_asked_of_the_nearest_folder_that_can_be_looked_at(tmp_path, monkeypatch):
    """Python before 3.14 lets a forbidden folder's PermissionError through `Path.exists`."""

    def forbidden(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.exists", forbidden)
    check_free_space(tmp_path / "new" / "newer", 0, "Nothing")
