"""The memory benchmark's script runs from end to end on tiny checkpoints, and its rows hold what they say."""

from __future__ import annotations

import json
import types

import psutil
import pytest
import torch
from safetensors import safe_open

from benchmarks import memory, memory_rig
from benchmarks.memory_rig import SmallerMachine, write_checkpoint
from demo.server import ServerDiedError
from demo.tiny import infinitetalk, qwen_image, text_encoders, wan


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two contenders on one case, and three prompts in a row."""
    folder = tmp_path_factory.mktemp("benchmark")
    out = folder / "memory.json"
    common = ["--tiny", "--out", str(out), "--work", str(folder / "work")]
    contenders = ["--contenders", memory.STOCK.name, memory.MANAGED.name]
    assert memory.main([*common, "--only", "qwen_image", *contenders]) == 0
    assert memory.main([*common, "--only", "infinitetalk", "--windows", "4"]) == 0
    return json.loads(out.read_text())


def test_both_contenders_finish_and_are_measured(results):
    rows = {row["contender"]: row for row in results["rows"]}
    assert rows.keys() == {memory.STOCK.name, memory.MANAGED.name}
    for row in rows.values():
        assert row["completed"], row["error"]
        assert row["peak_resident"] >= row["peak_anonymous"] > 100 << 20
        assert row["load_seconds"] > 0
        assert 0 < row["seconds_per_step"] < row["total_seconds"]
    assert rows[memory.STOCK.name]["report"] is None
    report = rows[memory.MANAGED.name]["report"]
    assert len(report["step_seconds"]) == 3
    assert report["device"] == "cpu (host memory)"


def test_windows_are_compared_with_the_third(results):
    (growth,) = results["growth"]
    assert growth["runs"] == len(growth["marks"]) == 4
    third, fourth = growth["marks"][2:]
    assert growth["growth_over_third"]["allocated"] == pytest.approx(fourth["allocated"] / third["allocated"] - 1)


def test_the_results_say_that_they_are_a_test_of_the_script(results):
    assert results["environment"]["tiny"] is True
    assert results["environment"]["date"]


def test_checkpoints_are_read_back_as_they_were_meant(tmp_path):
    config = wan.WanConfig(layers=1)
    extra = {"spiece_model": torch.arange(100, dtype=torch.uint8)}
    path = write_checkpoint(tmp_path / "a.safetensors", wan.shapes(config), config.metadata(), extra)
    with safe_open(path, "pt") as file:
        assert file.metadata() == config.metadata()
        assert set(file.keys()) == {*wan.shapes(config), "spiece_model"}
        for name, shape in wan.shapes(config).items():
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == shape
            assert tensor.dtype == torch.bfloat16
        weight = file.get_tensor("blocks.0.ffn.0.weight").float()
        assert weight.std().item() == pytest.approx(config.dim**-0.5, rel=0.05)
        assert file.get_tensor("blocks.0.norm3.weight").float().mean().item() == pytest.approx(1, abs=0.05)
        assert file.get_tensor("spiece_model").equal(extra["spiece_model"])
        other = file.get_tensor("blocks.0.self_attn.q.weight")
        assert not other.equal(file.get_tensor("blocks.0.self_attn.k.weight"))


def test_the_real_dimensions_are_the_real_ones():
    def billions(shapes) -> float:
        return sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9

    assert billions(qwen_image.shapes(memory.QWEN_IMAGE)) == pytest.approx(20.4, abs=0.3)
    assert billions(text_encoders.qwen25_shapes(memory.QWEN25)) == pytest.approx(7.7, abs=0.3)
    assert billions(wan.shapes(memory.WAN_14B)) == pytest.approx(14.3, abs=0.3)
    assert billions(wan.shapes(memory.WAN_TALK)) == pytest.approx(16.4, abs=0.4)
    assert billions(text_encoders.umt5_shapes(memory.UMT5)) == pytest.approx(5.7, abs=0.2)
    assert billions(infinitetalk.shapes(memory.TALK)) == pytest.approx(2.5, abs=0.3)


def test_a_smaller_machine_has_less_main_memory_while_it_lasts(monkeypatch):
    """The holder really takes the difference; what is free is given, since other programs take and give while this runs."""
    free, held = 8 << 30, 256 << 20
    monkeypatch.setattr(memory_rig, "available_host_bytes", lambda: free)
    with SmallerMachine(None, free - held) as machine:
        (holder,) = machine._holders
        taken = psutil.Process(holder.pid).memory_info().rss
        assert held <= taken < 2 * held
    assert holder.poll() is not None


def test_a_server_that_does_not_come_up_is_a_row_with_the_reason(monkeypatch, tmp_path):
    """On a machine made small stock ComfyUI may not even start; the cases after it still count."""

    def dies(*arguments, **options):
        raise ServerDiedError("ComfyUI did not come up; the end of its log:\nTotal VRAM 16384 MB\nMemoryError: no room")

    monkeypatch.setattr(memory, "Server", dies)
    scale = memory.Scale(True, None, 1, 1)
    row = memory.measure(memory.CASES["qwen_image"], memory.STOCK, True, None, tmp_path, scale)
    assert not row.completed
    assert row.error == "ServerDiedError: MemoryError: no room"
    assert row.seconds_per_step is None


def test_a_growth_run_that_is_cut_short_keeps_what_it_measured(monkeypatch, tmp_path):
    """Fifty generations take long: what was measured before the time was over is written down."""

    class Server:
        def __init__(self, *arguments, **options):
            self.runs = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def run(self, graph, timeout, on_event=None):
            self.runs += 1
            if self.runs > 5:
                raise TimeoutError(f"prompt was not done after {timeout} s")
            sample = {"phase": "sampled", "allocated": 100 + self.runs, "reserved": 200, "host_resident": 300}
            return types.SimpleNamespace(outputs={"json": {"text": [json.dumps({"notes": [], "samples": [sample]})]}})

    monkeypatch.setattr(memory, "Server", Server)
    found = memory.measure_growth("50_generations", tmp_path, memory.Scale(True, None, 50, 1))
    assert found["runs"] == 5
    assert found["growth_over_third"]["allocated"] == pytest.approx(105 / 103 - 1)
    assert "TimeoutError" in found["error"]


def test_the_work_folder_may_be_a_relative_path(monkeypatch, tmp_path):
    """The server runs in ComfyUI's own folder and must find it all the same."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def measure(case, contender, dynamic, cap, base, scale):
        seen.append(base)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        memory.main(["--tiny", "--out", "out.json", "--work", "work", "--only", "qwen_image"])
    assert seen == [tmp_path / "work"]


def test_time_that_is_left_for_a_graph_can_be_chosen(monkeypatch, tmp_path):
    """A machine that is lent for ten minutes a command leaves less than that for a graph."""
    seen = []

    class Server:
        process = types.SimpleNamespace(pid=1)

        def __init__(self, *arguments, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def run(self, graph, timeout, on_event=None):
            seen.append(timeout)
            raise TimeoutError("not done")

    monkeypatch.setattr(memory, "Server", Server)
    out = tmp_path / "out.json"
    common = ["--tiny", "--out", str(out), "--work", str(tmp_path / "work"), "--seconds", "77"]
    assert memory.main([*common, "--only", "qwen_image", "overhead", "--contenders", memory.STOCK.name]) == 0
    assert seen == [pytest.approx(77, abs=1)] * 2
    results = json.loads(out.read_text())
    assert results["rows"][0]["error"] == "TimeoutError: not done"
    assert "TimeoutError" in results["overhead"][0]["error"]
    assert results["environment"]["comfyui"] == "0.33.0"
    assert results["environment"]["comfy-aimdo"]
