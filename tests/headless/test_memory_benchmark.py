"""The memory benchmark's script runs from end to end on tiny checkpoints, and its rows hold what they say."""

from __future__ import annotations

import contextlib
import json
import time
import types
from collections import deque

import psutil
import pytest
import torch
from safetensors import safe_open

from benchmarks import memory, memory_cases, memory_files, memory_parallel, memory_rig
from benchmarks.memory_cases import CASES, COMPLETE, CONTENDERS, MANAGED, QUANTIZED, STOCK, STOCK_COPIES, Scale
from benchmarks.memory_files import drop_from_page_cache, second_name, write_checkpoint
from benchmarks.memory_group import create_group
from benchmarks.memory_rig import GIB, SmallerMachine, Usage, Watch
from testing.server import ServerDiedError
from testing.tiny import infinitetalk, qwen_image, text_encoders, wan


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of checkpoints that all runs here share."""
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def results(work):
    """All contenders on one case, and an InfiniteTalk run of four windows."""
    out = work / "memory.json"
    common = ["--tiny", "--out", str(out), "--work", str(work)]
    assert memory.main([*common, "--only", "qwen_image"]) == 0
    assert memory.main([*common, "--only", "infinitetalk", "--windows", "4"]) == 0
    return json.loads(out.read_text())


def test_contenders_finish_and_are_measured(results):
    rows = {row["contender"]: row for row in results["rows"]}
    assert list(rows) == [contender.name for contender in CONTENDERS]
    for row in rows.values():
        assert row["completed"], row["error"]
        assert row["finite"]
        assert row["steps"] == 3
        assert row["usage"]["resident"] >= row["usage"]["anonymous"] > 100 << 20
        assert row["load_seconds"] > 0
        assert 0 < row["seconds_per_step"] < row["total_seconds"]
    assert rows[STOCK.name]["report"] is None
    report = rows[MANAGED.name]["report"]
    assert len(report["step_seconds"]) == 3
    assert report["device"] == "cpu (host memory)"


def test_the_quantized_copies_made_beforehand_are_those_that_the_loaders_look_for(results, work):
    """Else every server would make its own, tens of gigabytes each."""
    rows = {row["contender"]: row for row in results["rows"]}
    assert rows[STOCK_COPIES.name]["quantize_seconds"] > 0, "the first that needs them makes them"
    assert rows[QUANTIZED.name]["quantize_seconds"] is None
    assert rows[MANAGED.name]["quantize_seconds"] is None
    copies = [path.name.split(".")[0] for path in (work / "models" / memory_files.CACHE).glob("*.safetensors")]
    assert sorted(copies) == ["qwen25_vl", "qwen_image"]
    logs = "".join(log.read_text() for log in work.glob("base-*/benchmark-memory-manager-*.log"))
    assert logs.count("Using the quantized file") == 4


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
    monkeypatch.setattr(memory_files, "_POOL", 1009)
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


def test_without_cgroups_a_process_holds_the_rest_of_main_memory(monkeypatch):
    """The holder really takes the difference; what is free is given, since other programs take and give while this runs."""
    free, held = 8 << 30, 256 << 20
    monkeypatch.setattr(memory_rig, "available_host_bytes", lambda: free)
    with SmallerMachine(None, free - held, group=lambda _: None) as machine:
        assert machine.host_cap_by == "holder"
        assert machine.launcher == []
        holder = machine._holder
        taken = psutil.Process(holder.pid).memory_info().rss
        assert held <= taken < 2 * held
    assert holder.poll() is not None


@pytest.fixture
def cgroups():
    """Leaves a test out where no memory cgroup can be made."""
    group = create_group(GIB)
    if group is None:
        pytest.skip("needs a memory cgroup")
    group.close()


def test_a_capped_server_takes_the_cap_for_the_machine_and_is_measured_in_it(cgroups, results, work):
    site, scale, usage = memory.make_site(work, True, "disk"), Scale(True, None, 1, 1), Usage()
    with SmallerMachine(None, 3 * GIB) as machine:
        assert machine.host_cap_by == "cgroup"
        with memory.run_server(site, STOCK, scale, machine) as server:
            watch = Watch(server.process.pid, None, usage, machine.group)
            server.run(CASES["qwen_image"].graph(scale, STOCK))
            system = server.get_json("/system_stats")["system"]
            watch.close()
        folder = machine.group.folder
    assert system["ram_total"] == 3 * GIB
    assert 0 < system["ram_free"] < 3 * GIB - (100 << 20)
    assert 100 << 20 < usage.unreclaimable <= usage.charged <= 3 * GIB
    assert usage.kills == 0
    assert not folder.exists()


def test_a_server_that_the_kernel_kills_is_a_row_that_says_so(cgroups, results, monkeypatch, work):
    site, scale = memory.make_site(work, True, "disk"), Scale(True, None, 1, 1)
    monkeypatch.setattr(memory, "SmallerMachine", lambda vram, host: SmallerMachine(None, 300 << 20))
    row = memory.measure(CASES["qwen_image"], STOCK, None, site, scale)
    assert not row.completed
    assert row.error == "killed by the kernel: out of main memory"
    assert row.host_cap_by == "cgroup"


def test_a_server_that_does_not_come_up_is_a_row_with_the_reason(monkeypatch, tmp_path):
    """On a machine made small stock ComfyUI may not even start; the cases after it still count."""

    def dies(*arguments, **options):
        raise ServerDiedError("ComfyUI did not come up; the end of its log:\nTotal VRAM 16384 MB\nMemoryError: no room")

    monkeypatch.setattr(memory, "Server", dies)
    site = memory.make_site(tmp_path, True, "disk")
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
    site = memory.make_site(tmp_path, True, "disk")
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
    assert memory.main([*common, "--only", "qwen_image", "overhead", "--contenders", STOCK.name]) == 0
    assert seen == [pytest.approx(77, abs=1)] * 2
    results = json.loads(out.read_text())
    assert results["rows"][0]["error"] == "TimeoutError: not done"
    assert "TimeoutError" in results["overhead"][0]["error"]
    assert results["environment"]["comfyui"] == "0.33.0"
    assert results["environment"]["comfy-aimdo"]


def test_what_there_is_no_time_for_is_no_row(monkeypatch, tmp_path, capsys):
    """A later call measures it; a row that says it timed out would be taken for the contender's fault."""
    out = tmp_path / "out.json"
    common = ["--tiny", "--out", str(out), "--work", str(tmp_path / "work"), "--only", "qwen_image", "overhead"]
    assert memory.main([*common, "--budget", "30"]) == 0
    assert not out.exists()
    assert capsys.readouterr().out.count("no time left") == len(CONTENDERS) + 1


def test_rows_run_beside_each_other_and_are_merged(tmp_path, capsys):
    """Two processes, one of which writes what the other waits for."""
    out = tmp_path / "memory.json"
    options = ["--work", str(tmp_path / "work"), "--out", str(out), "--seconds", "400", "--files", "cache"]
    assert memory_parallel.main(["tiny", *options]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["contender"]: row["completed"] for row in rows} == {STOCK.name: True, QUANTIZED.name: True}
    shown = capsys.readouterr().out
    assert "[gpu 0] ended with 0" in shown
    assert "[gpu 1] ended with 0" in shown


@pytest.mark.parametrize(("rate", "chosen"), [(0.9, "cache"), (3.5, "disk")])
def test_files_are_read_from_the_disk_where_it_is_fast(monkeypatch, tmp_path, rate, chosen):
    monkeypatch.setattr(memory_files, "disk_rates", lambda folder: {"from_disk": rate})
    assert memory_parallel.choose_files(tmp_path) == chosen


def test_disk_rates_are_measured_and_leave_nothing(tmp_path):
    assert all(rate > 0 for rate in memory_files.disk_rates(tmp_path, 1 << 26).values())
    assert list(tmp_path.iterdir()) == []


def test_the_newest_of_a_key_stays_when_parts_are_merged(tmp_path):
    row = {"case": "a", "contender": "b", "dynamic_vram": True, "vram_cap": 1, "completed": False}
    parts = []
    for index, rows in enumerate(([row, row | {"vram_cap": 2}], [row | {"completed": True}])):
        parts.append(tmp_path / f"{index}.json")
        parts[-1].write_text(json.dumps({"environment": {"gpu": "x"}, "rows": rows, "growth": [], "overhead": []}))
    (tmp_path / "2.json").write_text('{"rows": [')
    memory_parallel.write_merged([*parts, tmp_path / "2.json"], tmp_path / "out.json")
    merged = json.loads((tmp_path / "out.json").read_text())
    assert [(row["vram_cap"], row["completed"]) for row in merged["rows"]] == [(1, True), (2, False)]
    assert merged["environment"] == {"gpu": "x"}


def test_a_part_that_cannot_be_read_stops_no_queue(tmp_path, monkeypatch):
    """A process that was killed while it wrote, or writes now: the GPUs' other entries run all the same."""
    started = []
    monkeypatch.setattr(memory_parallel.Lane, "run_one", lambda self, entry, part, left: started.append(entry))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "1.json").write_text('{"rows": [')
    entries = [("--only", "overhead"), ("--only", "qwen_image", "--caps", "16", "--contenders", STOCK.name)]
    deadline = time.monotonic() + 100
    memory_parallel.run_plan([memory_parallel.Lane(0, deque(entries), tmp_path, (), deadline)], deadline)
    assert started == entries


def test_every_row_of_a_case_is_in_its_plan_once():
    for name, case in (("qwen", "qwen_image"), ("wan", "wan_2_2")):
        rows = []
        for entry in memory_parallel.PLANS[name]:
            names = entry[entry.index("--contenders") + 1 :]
            rows += [(int(entry[entry.index("--caps") + 1]), contender) for contender in names]
        assert sorted(rows) == sorted((cap, one.name) for cap in CASES[case].vram for one in CONTENDERS)


def test_gpus_take_entries_from_one_list(tmp_path, monkeypatch):
    """A long entry on one GPU leaves the others to the other."""
    taken = {0: [], 1: []}

    def run_one(lane, entry, part, left):
        taken[lane.gpu].append(entry[-1])
        time.sleep(1.0 if entry[-1] == "a" else 0.01)

    monkeypatch.setattr(memory_parallel.Lane, "run_one", run_one)
    entries, deadline = deque(("--write", name) for name in "abcd"), time.monotonic() + 100
    memory_parallel.run_plan([memory_parallel.Lane(gpu, entries, tmp_path, (), deadline) for gpu in (0, 1)], deadline)
    assert sorted(taken.values()) == [["a"], ["b", "c", "d"]]


def test_a_later_call_measures_only_the_contenders_that_are_missing(tmp_path):
    row = {"case": "qwen_image", "dynamic_vram": True, "vram_cap": 16 * GIB, "completed": True}
    part = {"environment": {}, "rows": [], "growth": [], "overhead": [{"case": "overhead", "error": None}]}
    path = tmp_path / "0.json"
    caps, names = ("--only", "qwen_image", "--caps", "16", "--contenders"), [one.name for one in CONTENDERS]
    for measured in range(len(CONTENDERS) + 1):
        part["rows"] = [row | {"contender": contender.name} for contender in CONTENDERS[:measured]]
        path.write_text(json.dumps(part))
        left = names[measured:]
        assert memory_parallel.remaining((*caps, *names), [path]) == ((*caps, *left) if left else None)
    assert memory_parallel.remaining(("--only", "overhead"), [path]) is None
    assert memory_parallel.remaining(("--only", "infinitetalk"), [path]) == ("--only", "infinitetalk")
    assert memory_parallel.remaining(("--write", "qwen_image"), [path]) == ("--write", "qwen_image")


@pytest.mark.parametrize(("seconds", "touched"), [(20, 1), (0, 0)])
def test_only_memory_that_was_touched_counts(monkeypatch, seconds, touched):
    """Rows with it show their load times: time may be over, or the kernel end a filler, before all of it was."""
    monkeypatch.setattr(memory_parallel, "FILLERS", 1)
    monkeypatch.setattr(memory_parallel, "FILL_SECONDS", seconds)
    assert memory_parallel.fill_memory(1) == touched


def test_memory_is_touched_after_the_files_are_written(tmp_path, monkeypatch):
    """Files in memory would take what was touched, and the first row pay for its own."""
    done = []
    monkeypatch.setattr(memory_parallel, "fill_memory", lambda gib: done.append(f"fill {gib}") or 300)
    monkeypatch.setattr(memory_parallel, "run_plan", lambda lanes, deadline: done.append(lanes[0].common))
    options = ["--work", str(tmp_path), "--out", str(tmp_path / "out.json"), "--files", "cache", "--fill", "400"]
    assert memory_parallel.main(["write_qwen", "qwen", "growth", *options]) == 0
    common = ("--files", "cache", "--touched")
    assert done == [(*common, "0"), "fill 400", (*common, "300"), (*common, "300")]


def test_what_runs_past_the_deadline_is_ended_with_everything_it_started(tmp_path, monkeypatch):
    """A command that is lent ten minutes must not leave a server behind."""
    started = tmp_path / "started"
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    popen = memory_parallel.subprocess.Popen
    monkeypatch.setattr(
        memory_parallel.subprocess, "Popen", lambda command, **options: popen([command[0], "-c", program], **options)
    )
    monkeypatch.setattr(memory_parallel, "GRACE", 2)
    deadline = time.monotonic() + 6
    lane = memory_parallel.Lane(0, deque([("--write", "x")]), tmp_path, (), deadline)
    memory_parallel.run_plan([lane], deadline)
    assert time.monotonic() < deadline + 2
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(started.read_text()))
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline + 4
            time.sleep(0.1)
