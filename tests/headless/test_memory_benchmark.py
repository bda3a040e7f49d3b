"""The memory benchmark's script runs from end to end on tiny checkpoints, and its rows hold what they say."""

from __future__ import annotations

import json
import types

import pytest
import torch
from safetensors import safe_open

from benchmarks import checkpoints, memory, memory_cases, memory_rig
from benchmarks.checkpoints import drop_from_page_cache, second_name, write_checkpoint
from benchmarks.memory_cases import CASES, COMPLETE, STOCK, STOCK_COPIES, Scale
from benchmarks.memory_group import create_group
from benchmarks.memory_rig import GIB, smaller_machine
from testing.server import ServerDiedError
from testing.tiny import infinitetalk, qwen_image, text_encoders, wan

RUN = (STOCK_COPIES, COMPLETE)
"""Stock without copies has less than the first of them, and the manager and format auto alone less than the last."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of checkpoints that all runs here share."""
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def cap():
    """Of the servers' main memory, in bytes; None where no memory cgroup can be made."""
    group = create_group(GIB)
    if group is not None:
        group.close()
    return group and 3 * GIB


@pytest.fixture(scope="module")
def results(work, cap):
    """Contenders with everything that one of them has on one case, and an InfiniteTalk run of four windows."""
    out = work / "memory.json"
    common = ["--tiny", "--out", str(out), "--work", str(work)]
    names = [contender.name for contender in RUN]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "smaller_machine", lambda vram, host: smaller_machine(None, cap))
        assert memory.main([*common, "--only", "qwen_image", "--contenders", *names]) == 0
    assert memory.main([*common, "--only", "infinitetalk", "--windows", "4"]) == 0
    return json.loads(out.read_text())


def test_contenders_finish_and_are_measured(results):
    rows = {row["contender"]: row for row in results["rows"]}
    assert list(rows) == [contender.name for contender in RUN]
    for row in rows.values():
        assert row["completed"], row["error"]
        assert row["finite"]
        assert row["steps"] == 3
        assert row["usage"]["resident"] >= row["usage"]["anonymous"] > 100 << 20
        assert row["load_seconds"] > 0
        assert 0 < row["seconds_per_step"] < row["total_seconds"]
    assert rows[STOCK_COPIES.name]["report"] is None
    report = rows[COMPLETE.name]["report"]
    assert len(report["step_seconds"]) == 3
    assert report["device"] == "cpu (host memory)"


def test_the_quantized_copies_made_beforehand_are_those_that_the_loaders_look_for(results, work):
    """Else every server would make its own, tens of gigabytes each."""
    rows = {row["contender"]: row for row in results["rows"]}
    assert rows[STOCK_COPIES.name]["quantize_seconds"] > 0, "the first that needs them makes them"
    assert rows[COMPLETE.name]["quantize_seconds"] is None
    copies = [path.name.split(".")[0] for path in (work / "models" / checkpoints.CACHE).glob("*.safetensors")]
    assert sorted(copies) == ["qwen25_vl", "qwen_image"]
    logs = "".join(log.read_text() for log in work.glob("base-*/benchmark-memory-manager-*.log"))
    assert logs.count("Using the quantized file") == 2


def test_the_last_contender_samples_with_manager_and_attention(work):
    for case, sampler in (("qwen_image", "sample"), ("wan_2_2", "sample_high")):
        graph = CASES[case].graph(Scale(True, None, 1, 1), COMPLETE)
        chain, name = [], sampler
        while "model" in graph[name]["inputs"]:
            name = graph[name]["inputs"]["model"][0]
            chain.append(graph[name]["class_type"])
        assert [kind for kind in chain if kind.startswith("Lowbit")] == [
            "LowbitAttention",
            "LowbitMemoryManager",
            "LowbitLoadDiffusionModel",
        ]


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


def test_many_tensors_and_large_ones_are_drawn_from_the_pool(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_POOL", 1009)
    shapes = {"a.weight": (64, 64), "b.weight": (64, 64), "a.bias": (64,), "c.weight": (3, 1009)}
    with safe_open(write_checkpoint(tmp_path / "a.safetensors", shapes), "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in shapes}
    assert not tensors["a.weight"].equal(tensors["b.weight"])
    assert tensors["a.weight"].std().item() == pytest.approx(1 / 8, rel=0.1)
    assert tensors["c.weight"].std().item() == pytest.approx(1009**-0.5, rel=0.1)
    assert tensors["a.weight"].unique(dim=0).shape[0] == 64


def test_a_file_that_is_there_is_not_written_again(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors", {"a.weight": (4, 4)})
    before = path.stat().st_mtime_ns
    write_checkpoint(path, {"a.weight": (4, 4)})
    other = second_name(tmp_path / "b.safetensors", path)
    assert path.stat().st_mtime_ns == before
    drop_from_page_cache([path, other])
    assert other.read_bytes() == path.read_bytes()


def test_the_real_dimensions_are_the_real_ones():
    def billions(shapes) -> float:
        return sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9

    assert billions(qwen_image.shapes(memory_cases.QWEN_IMAGE)) == pytest.approx(20.4, abs=0.3)
    assert billions(text_encoders.qwen25_shapes(memory_cases.QWEN25)) == pytest.approx(7.7, abs=0.3)
    assert billions(wan.shapes(memory_cases.WAN_14B)) == pytest.approx(14.3, abs=0.3)
    assert billions(wan.shapes(memory_cases.WAN_TALK)) == pytest.approx(16.4, abs=0.4)
    assert billions(text_encoders.umt5_shapes(memory_cases.UMT5)) == pytest.approx(5.7, abs=0.2)
    assert billions(infinitetalk.shapes(memory_cases.TALK)) == pytest.approx(2.5, abs=0.3)


def test_without_cgroups_a_cap_on_main_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory_rig, "create_group", lambda nbytes: None)
    with pytest.raises(RuntimeError, match="no cgroup"), smaller_machine(None, GIB):
        pass


@pytest.fixture
def capped(cap):
    """Leaves a test out where no memory cgroup can be made."""
    if cap is None:
        pytest.skip("needs a memory cgroup")
    return cap


def test_a_capped_server_takes_the_cap_for_the_machine_and_is_measured_in_it(capped, results, work):
    for row in results["rows"]:
        assert 100 << 20 < row["usage"]["unreclaimable"] <= row["usage"]["charged"] <= capped
        assert row["usage"]["kills"] == 0
    logs = [log.read_text() for log in work.glob("base-*/benchmark-*auto*.log")]
    assert len(logs) == len(RUN)
    assert all(f"total RAM {capped >> 20} MB" in log for log in logs)


def test_a_server_that_the_kernel_kills_is_a_row_that_says_so(capped, results, monkeypatch, work):
    site, scale = memory.make_site(work, "disk"), Scale(True, None, 1, 1)
    monkeypatch.setattr(memory, "smaller_machine", lambda vram, host: smaller_machine(None, 300 << 20))
    row = memory.measure(CASES["qwen_image"], STOCK, None, site, scale)
    assert not row.completed
    assert row.error == "killed by the kernel: out of main memory"


def test_a_server_that_does_not_come_up_is_a_row_with_the_reason(monkeypatch, tmp_path):
    """On a machine made small stock ComfyUI may not even start; the cases after it still count."""

    def dies(*arguments, **options):
        raise ServerDiedError("ComfyUI did not come up; the end of its log:\nTotal VRAM 16384 MB\nMemoryError: no room")

    monkeypatch.setattr(memory, "Server", dies)
    site = memory.make_site(tmp_path, "disk")
    row = memory.measure(CASES["qwen_image"], STOCK, None, site, Scale(True, None, 1, 1))
    assert not row.completed
    assert row.error == "ServerDiedError: MemoryError: no room"
    assert row.seconds_per_step is None
    assert row.finite is None


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
    site = memory.make_site(tmp_path, "disk")
    found = memory.measure_growth(memory_cases.LONG["50_generations"], site, Scale(True, None, 50, 1))
    assert found["runs"] == 5
    assert found["growth_over_third"]["allocated"] == pytest.approx(105 / 103 - 1)
    assert "TimeoutError" in found["error"]


def test_the_work_folder_may_be_a_relative_path(monkeypatch, tmp_path):
    """The server runs in ComfyUI's own folder and must find it all the same."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def measure(case, contender, cap, site, scale):
        seen.append(site)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        memory.main(["--tiny", "--out", "out.json", "--work", "work", "--only", "qwen_image"])
    assert seen[0].base.is_absolute()
    assert seen[0].models == tmp_path / "work" / "models"


def test_time_that_is_left_for_a_graph_can_be_chosen(monkeypatch, tmp_path):
    """A graph that takes longer is a row that says so, and the next one is measured."""
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
    assert memory.main([*common, "--only", "qwen_image", "overhead", "--contenders", STOCK.name]) == 0
    assert seen == [pytest.approx(77, abs=1)] * 2
    results = json.loads(out.read_text())
    assert results["rows"][0]["error"] == "TimeoutError: not done"
    assert "TimeoutError" in results["overhead"][0]["error"]
    assert results["environment"]["comfyui"] == "0.33.0"
    assert results["environment"]["comfy-aimdo"]
