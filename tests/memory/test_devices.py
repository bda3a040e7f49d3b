"""What a container may use of main memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lowbit.memory import devices

GIB = 1 << 30


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Writes cgroup files; None leaves one out."""

    def write(limit, used, cache=0):
        for name, value in (("memory.max", limit), ("memory.current", used)):
            if value is not None:
                (tmp_path / name).write_text(f"{value}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nactive_file 0\n")
        monkeypatch.setattr(devices, "_CGROUP_FOLDERS", (tmp_path,))
        machine = SimpleNamespace(total=64 * GIB, available=50 * GIB)
        monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: machine)

    return write


def test_a_containers_limit_counts(container):
    container(16 * GIB, 10 * GIB)
    assert devices.total_host_bytes() == 16 * GIB
    assert devices.available_host_bytes() == 6 * GIB


def test_page_cache_of_a_container_can_be_taken(container):
    container(16 * GIB, 10 * GIB, cache=7 * GIB)
    assert devices.available_host_bytes() == 13 * GIB


def test_a_container_never_has_more_than_the_machine(container):
    container(60 * GIB, GIB)
    assert devices.available_host_bytes() == 50 * GIB


@pytest.mark.parametrize("limit", ["max", str(1 << 63), None])
def test_without_a_limit_the_machine_counts(container, limit):
    container(limit, GIB)
    assert devices.total_host_bytes() == 64 * GIB
    assert devices.available_host_bytes() == 50 * GIB


def test_a_gpu_is_read_through_pytorchs_counters_and_the_driver(monkeypatch):
    """The counters have the form that torch.cuda.memory_stats_as_nested_dict gives them."""
    counters = {
        "allocated_bytes": {"all": {"current": 3 * GIB, "peak": 5 * GIB}, "large_pool": {"current": 1, "peak": 1}},
        "reserved_bytes": {"all": {"current": 4 * GIB, "peak": 6 * GIB}},
    }
    calls = []
    cuda = devices.torch.cuda
    monkeypatch.setattr(cuda, "current_device", lambda: 1)
    monkeypatch.setattr(cuda, "memory_stats_as_nested_dict", lambda index: counters if index == 1 else {})
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: (7 * GIB, 24 * GIB) if index == 1 else (0, 0))
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda index: calls.append(("peak", index)))
    monkeypatch.setattr(cuda, "synchronize", lambda index: calls.append(("wait", index)))
    monkeypatch.setattr(cuda, "empty_cache", lambda: calls.append(("empty",)))
    device = devices.CudaDevice(devices.torch.device("cuda"), lambda: 8 * GIB)
    reading = device.read()
    assert (device.name, device.holds_models) == ("cuda:1", True)
    assert reading == devices.Reading(11 * GIB, 12 * GIB, 13 * GIB, 7 * GIB, 8 * GIB)
    assert reading.idle == GIB
    device.reset_peak()
    device.clear()
    assert calls == [("peak", 1), ("wait", 1), ("empty",)]


def test_resident_memory_is_counted_in_the_machines_own_pages(tmp_path, monkeypatch):
    """64 KiB on many ARM machines."""
    (tmp_path / "statm").write_text("900 300 20 1 0 80 0\n")
    monkeypatch.setattr(devices, "_STATM", tmp_path / "statm")
    monkeypatch.setattr(devices.mmap, "PAGESIZE", 65536)
    assert devices.resident_bytes() == 300 * 65536
