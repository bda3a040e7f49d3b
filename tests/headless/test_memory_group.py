"""Memory cgroups of both versions, read from folders that look like them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import memory_group
from benchmarks.memory_group import MemoryGroup, create_group, launcher, limited_memory, memory_hierarchies

GIB = 1 << 30
V2 = {
    "memory.max": "max",
    "memory.swap.max": "max",
    "memory.current": str(5 * GIB),
    "memory.peak": str(6 * GIB),
    "memory.stat": f"anon {GIB}\nfile {3 * GIB}\nshmem 7\nactive_file {GIB}\ninactive_file {2 * GIB}\n",
    "memory.events": "low 0\noom 3\noom_kill 2\n",
}
V1 = {
    "memory.limit_in_bytes": "9223372036854771712",
    "memory.memsw.limit_in_bytes": "9223372036854771712",
    "memory.usage_in_bytes": str(5 * GIB),
    "memory.max_usage_in_bytes": str(6 * GIB),
    "memory.stat": f"rss 1\ntotal_rss {GIB}\ntotal_shmem 7\ntotal_active_file {GIB}\ntotal_inactive_file {2 * GIB}\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
}


@pytest.fixture(params=[V1, V2], ids=["version 1", "version 2"])
def group(request, tmp_path):
    for name, text in (request.param | {"cgroup.procs": ""}).items():
        (tmp_path / name).write_text(text)
    return MemoryGroup(tmp_path)


def test_counters_mean_the_same_in_both_versions(group):
    assert group.unreclaimable() == 2 * GIB
    assert group.peak() == 6 * GIB
    assert group.kills() == 2


def test_a_limit_leaves_no_swap(group):
    group.limit(GIB)
    assert (group.folder / group.layout.limit).read_text() == str(GIB)
    swap = (group.folder / group.layout.swap).read_text()
    assert swap == ("0" if group.layout == memory_group.V2 else str(GIB))


def test_psutil_tells_the_limit_and_what_the_group_leaves_of_it(group):
    told = limited_memory(group, 8 * GIB)()
    assert told.total == 8 * GIB
    assert told.available == told.free == 6 * GIB
    assert told.percent == 25.0
    assert isinstance(told, type(psutil.virtual_memory()))


def test_what_is_over_the_limit_leaves_nothing_rather_than_less(group):
    assert limited_memory(group, GIB)().available == 0


def test_the_hierarchy_that_counts_memory_is_found(tmp_path):
    one, two = tmp_path / "memory", tmp_path / "unified"
    (one / "user" / "shell").mkdir(parents=True)
    (two / "session").mkdir(parents=True)
    (two / "cgroup.controllers").write_text("cpu memory\n")
    mounts = (
        f"cgroup {one} cgroup rw,memory 0 0\ncgroup {tmp_path}/cpu cgroup rw,cpu 0 0\ncgroup2 {two} cgroup2 rw 0 0\n"
    )
    own = "4:memory:/user/shell\n1:cpu:/\n0::/session\n"
    assert memory_hierarchies(mounts, own) == [one / "user" / "shell", two / "session"]
    assert memory_hierarchies(mounts, "4:memory:/elsewhere\n0::/\n") == [one, two]
    (two / "cgroup.controllers").write_text("cpu\n")
    assert memory_hierarchies(mounts, own) == [one / "user" / "shell"]


def test_a_group_above_serves_where_ours_has_processes_of_others(tmp_path, monkeypatch):
    """cgroup v2 gives children of a group with processes no memory controller, but those of its parent may have it."""
    own = tmp_path / "shells" / "one"
    own.mkdir(parents=True)
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    (tmp_path / "shells" / "cgroup.subtree_control").write_text("cpu\n")
    (own / "cgroup.subtree_control").mkdir()  # cannot be written
    monkeypatch.setattr(memory_group, "memory_hierarchies", lambda *_: [own])
    assert memory_group._parents() == [tmp_path]


def test_without_a_place_for_groups_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_group, "_parents", lambda: [tmp_path / "absent"])
    assert create_group(GIB) is None


def test_a_launched_program_is_in_the_group_and_finds_its_own_modules(group, tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    (folder / "beside.py").write_text("VALUE = 41\n")
    (folder / "main.py").write_text(
        "import sys, psutil, beside\n"
        "print(__name__, sys.argv, beside.VALUE, psutil.virtual_memory().total, sys.path[0])\n"
    )
    command = [sys.executable, *launcher(group, 3 * GIB), "main.py", "--flag"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.split() == [
        "__main__",
        "['main.py',",
        "'--flag']",
        "41",
        str(3 * GIB),
        str(Path(folder).resolve()),
    ]
    assert int((group.folder / "cgroup.procs").read_text()) > 0
