"""Reading ahead and writing behind: the same bytes, the same errors, bounded memory."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from lowbit.errors import CheckpointError, StorageError
from lowbit.ops import overlap, stream
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.overlap import WriteBehind, read_ahead
from lowbit.ops.plan import make_plan
from lowbit.ops.writer import CheckpointWriter

NAMES = ["a", "b", "c", "d"]


def test_the_next_tensor_is_read_while_one_is_worked_on():
    begun = {name: threading.Event() for name in NAMES}

    def read(name):
        begun[name].set()
        return torch.tensor(float(ord(name)))

    for name, take in read_ahead(NAMES, lambda name: 4, read):
        assert take().item() == ord(name)
        for later in NAMES[NAMES.index(name) + 1 :][:1]:
            assert begun[later].wait(300)
        assert not any(begun[later].is_set() for later in NAMES[NAMES.index(name) + 2 :])


def test_no_tensor_outlives_its_turn():
    alive = {}

    def read(name):
        tensor = torch.zeros(3)
        alive[name] = weakref.ref(tensor)
        return tensor

    for name, take in read_ahead(NAMES, lambda name: 4, read):
        tensor = take()
        assert alive[name]() is tensor
        del tensor
        gc.collect()
        assert alive[name]() is None


def test_a_large_tensor_is_read_in_its_own_turn(monkeypatch):
    monkeypatch.setattr(overlap, "MOST_AHEAD", 10)
    read = []
    for name, take in read_ahead(NAMES, lambda name: 99 if name == "c" else 4, lambda name: read.append(name) or name):
        if name == "b":
            take()
            assert read == ["a", "b"]
        else:
            take()
    assert sorted(read) == NAMES


def test_what_reading_raises_is_raised_in_its_turn():
    def read(name):
        if name == "b":
            raise CheckpointError("b is damaged")
        return name

    names = read_ahead(NAMES, lambda name: 4, read)
    assert next(names)[1]() == "a"
    _, take = next(names)
    with pytest.raises(CheckpointError, match="b is damaged"):
        take()
    names.close()


def test_writes_come_one_after_the_other_and_hold_no_more_than_allowed(monkeypatch):
    monkeypatch.setattr(overlap, "MOST_AHEAD", 10)
    gate, written = threading.Event(), []

    def write(number):
        gate.wait(300)
        written.append(number)

    behind = WriteBehind()
    for number in range(2):
        behind.add(5, lambda number=number: write(number))
    threading.Timer(0.2, gate.set).start()
    behind.add(5, lambda: write(2))
    assert written[:1] == [0]
    behind.add(99, lambda: write(3))
    assert written == [0, 1, 2, 3]
    behind.close()


def test_what_writing_raises_is_raised_by_the_next_call():
    def fail():
        raise StorageError("the disk is full")

    behind = WriteBehind()
    behind.add(5, fail)
    with pytest.raises(StorageError, match="the disk is full"):
        behind.wait()
    behind.close()


@pytest.fixture
def overlapping(monkeypatch):
    """The quantizer overlaps on the CPU, too."""
    monkeypatch.setattr(stream, "_overlaps", lambda device: True)


def _quantize(source, target, name="int8", **options):
    checkpoint = open_checkpoint(source)
    stream.quantize_checkpoint(checkpoint, make_plan(checkpoint, FORMATS[name], None), target, **options)


@pytest.mark.parametrize("name", ["int8", "fp4_scaled", "mxfp8"])
def test_files_are_the_same(name, save, wan_tensors, tmp_path, monkeypatch):
    source = save(wan_tensors, metadata={"config": "{}"})
    for which in (False, True):
        monkeypatch.setattr(stream, "_overlaps", lambda device, which=which: which)
        _quantize(source, tmp_path / f"{which}.safetensors", name)
    assert (tmp_path / "True.safetensors").read_bytes() == (tmp_path / "False.safetensors").read_bytes()


def test_a_full_disk_is_said_and_nothing_is_left(overlapping, save, wan_tensors, tmp_path, monkeypatch):
    real, left = CheckpointWriter._write_all, [20]

    def full(writer, piece):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(writer, piece)

    monkeypatch.setattr(CheckpointWriter, "_write_all", full)
    with pytest.raises(StorageError, match="No space left on device"):
        _quantize(save(wan_tensors), tmp_path / "made" / "out.safetensors")
    assert list((tmp_path / "made").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lowbit-")]
