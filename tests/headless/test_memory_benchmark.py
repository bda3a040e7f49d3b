"""The memory benchmark's script runs from end to end on tiny checkpoints, and its rows hold what they say."""

from __future__ import annotations

import json

import psutil
import pytest
import torch
from safetensors import safe_open

from benchmarks import memory, memory_rig
from benchmarks.memory_rig import SmallerMachine, write_checkpoint
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
