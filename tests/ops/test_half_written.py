"""Claims about what a killed run leaves half-written: gone at the next start, and never while it is being written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.cli import main
from lowbit.ops.cache import quantized_file
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.plan import make_plan
from lowbit.ops.writer import CheckpointWriter, remove_half_written

WRITING = """
    import sys, time
    from pathlib import Path
    import torch
    from lowbit.ops.writer import CheckpointWriter
    writer = CheckpointWriter(Path(sys.argv[1]), name_bytes=100, name_count=1, metadata={})
    writer.add("a", torch.ones(1024))
    print("writing", flush=True)
    sys.stdin.readline()
    writer.close()
    print("written", flush=True)
"""


@pytest.fixture
def writing():
    """Starts processes that write a file, and wait with it half-written for a line of input; ends them after the test."""
    started = []

    def start(path) -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(WRITING), str(path)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "writing\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()


def left(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".lowbit-"))


def test_the_command_line_removes_what_killed_runs_left_beside_its_target(writing, tmp_path):
    source, folder = tmp_path / "model.safetensors", tmp_path / "out"
    save_file({"blocks.0.attn.weight": torch.randn(64, 256).bfloat16()}, source)
    folder.mkdir()
    for _ in range(3):
        kill(writing(folder / "model.safetensors"))
    alive = writing(folder / "another.safetensors")
    assert len(left(folder)) == 8
    assert main(["quantize", str(source), str(folder / "model.safetensors"), "--format", "int8"]) == 0
    assert len(left(folder)) == 2
    alive.stdin.write("\n")
    alive.stdin.flush()
    assert alive.stdout.readline() == "written\n"
    assert left(folder) == []
    assert load_file(folder / "another.safetensors")["a"].sum() == 1024


def test_the_cache_removes_what_killed_runs_left(writing, tmp_path):
    source, folder = tmp_path / "model.safetensors", tmp_path / "cache"
    save_file({"blocks.0.attn.weight": torch.randn(64, 256).bfloat16()}, source)
    kill(writing(folder / "a.safetensors"))
    assert len(left(folder)) == 2
    checkpoint = open_checkpoint(source)
    quantized_file(checkpoint, make_plan(checkpoint, FORMATS["int8"], None), folder)
    assert left(folder) == []


def test_a_full_disk_is_looked_at_after_the_leftovers_are_gone(writing, tmp_path, monkeypatch):
    """Else they would refuse the run that removes them."""
    source, folder = tmp_path / "model.safetensors", tmp_path / "out"
    save_file({"blocks.0.attn.weight": torch.randn(64, 256).bfloat16()}, source)
    kill(writing(folder / "model.safetensors"))

    def usage(path):
        return type("Usage", (), {"free": 0 if left(folder) else 1 << 40})

    monkeypatch.setattr("lowbit.ops.writer.shutil.disk_usage", usage)
    assert main(["quantize", str(source), str(folder / "model.safetensors"), "--format", "int8"]) == 0


def test_a_file_that_this_process_writes_is_left_alone_however_old(tmp_path):
    with CheckpointWriter(tmp_path / "a.safetensors", name_bytes=9, name_count=1, metadata={}) as writer:
        writer.add("a", torch.ones(8))
        for path in tmp_path.iterdir():
            os.utime(path, (0, 0))
        remove_half_written(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_removing_and_writing_at_once_never_lose_a_file(tmp_path):
    """Also not between the making of a lock file and its locking."""
    stop = threading.Event()

    def removes():
        while not stop.is_set():
            remove_half_written(tmp_path)

    threads = [threading.Thread(target=removes) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(200):
            with CheckpointWriter(
                tmp_path / f"{number}.safetensors", name_bytes=9, name_count=1, metadata={}
            ) as writer:
                writer.add("a", torch.full((8,), float(number)))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    remove_half_written(tmp_path)
    assert sorted(int(path.stem) for path in tmp_path.iterdir()) == list(range(200))


def test_a_file_system_without_locks_can_be_written_and_nothing_is_removed_from_it(tmp_path, monkeypatch):
    def refuses(*args):
        raise OSError(95, "Operation not supported")

    lock = "msvcrt.locking" if sys.platform == "win32" else "fcntl.flock"
    monkeypatch.setattr(f"lowbit.ops.lock_file.{lock}", refuses)
    writer = CheckpointWriter(tmp_path / "a.safetensors", name_bytes=9, name_count=1, metadata={})
    remove_half_written(tmp_path)
    assert len(left(tmp_path)) == 2
    writer.add("a", torch.ones(3))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
