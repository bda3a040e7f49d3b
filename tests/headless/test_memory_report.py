"""What the memory nodes show: schema, report as text, JSON and chart, and the live meter's events."""

from __future__ import annotations

import io
import time

import pytest
from PIL import Image

from testing import graphs

from .memory_bench import FAKE_NAME, ROOMY, UMT5, managed, released, reported, wan

NODES = {
    "LowbitMemoryManager": "Memory Manager (Lowbit)",
    "LowbitReleaseComponent": "Release Component (Lowbit)",
    "LowbitMemoryReport": "Memory Report (Lowbit)",
}
COMPONENTS = {"diffusion model", "text encoder", "VAE", "audio encoder", "model patch", "scratch", "other"}


@pytest.mark.parametrize("name", NODES)
def test_every_input_and_output_has_a_tooltip(memory, name):
    info = memory.server.object_info(name)
    assert info["category"] == "lowbit"
    assert info["display_name"] == NODES[name]
    for group in ("required", "optional"):
        for key, spec in info["input"].get(group, {}).items():
            assert spec[1]["tooltip"], f"{name}.{key}"
    assert len(info["output_tooltips"]) == len(info["output"])
    assert all(info["output_tooltips"])


def test_the_report_says_the_same_as_text_json_and_picture(memory):
    graph = managed(wan(seed=81, steps=4, conditioning=UMT5), gpu_mib=ROOMY, vram_limit_gib=2.0, policy="balanced")
    graph["save"] = graphs.node("SaveImage", images=["report", 1], filename_prefix="chart")
    got = memory.run(graph)
    report = got.report
    assert report["device"] == FAKE_NAME
    assert report["limit_bytes"] == 2 * 2**30
    assert report["peak_bytes"] == max(sample["peak"] for sample in report["samples"]) > 0
    classes = [entry["class"] for entry in report["nodes"]]
    assert {"CLIPTextEncode", "KSampler", "VAEDecode"} <= set(classes)
    assert classes.index("CLIPTextEncode") < classes.index("KSampler") < classes.index("VAEDecode")
    for line in (FAKE_NAME, "limit 2.00 GiB", "4 steps", "KSampler (sample)", "text encoder", "releases"):
        assert line in got.text
    picture = Image.open(io.BytesIO(memory.server.fetch(got.result.outputs["save"]["images"][0])))
    on_the_node = Image.open(io.BytesIO(memory.server.fetch(got.result.outputs["report"]["images"][0])))
    assert on_the_node.tobytes() == picture.tobytes()
    assert picture.size == (1600, 900)
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(79, 140, 255), (160, 107, 255), (46, 196, 182)} <= colours, "diffusion model, text encoder and VAE"


def test_a_graph_without_a_manager_still_has_a_report(memory):
    got = memory.run(reported(wan(seed=82)))
    assert got.report["step_seconds"] == []
    assert got.report["device"] in got.text


def test_release_shows_what_it_freed(memory):
    graph = released(managed(wan(seed=83), gpu_mib=ROOMY, policy="speed"), ["sample", 0], diffusion_model=True)
    texts = []
    got = memory.run(graph, on_event=lambda event: texts.append(event))
    assert [entry["names"] for entry in got.report["releases"]] == [["diffusion model"]]
    assert "diffusion model: 8.7 MiB freed (asked for)" in got.text


def test_the_live_meter_sends_the_agreed_event_at_most_four_times_a_second(memory):
    seen = []

    def note(event) -> None:
        if event["type"] == "lowbit.memory":
            seen.append((time.monotonic(), event["data"]))

    steps = 100
    graph = managed(wan(seed=84, steps=steps, frames=81, decode=False), gpu_mib=ROOMY, vram_limit_gib=2.0)
    got = memory.run(graph, on_event=note)
    assert 2 <= len(seen) <= 4 * got.result.seconds + 2
    for _, data in seen:
        assert data.keys() == {
            "node_id",
            "prompt_id",
            "phase",
            "step",
            "steps",
            "seconds_per_step",
            "limit_bytes",
            "allocated_bytes",
            "reserved_bytes",
            "peak_bytes",
            "free_bytes",
            "device",
            "components",
        }
        assert data["node_id"] == "manager"
        assert data["prompt_id"] == got.result.prompt_id
        assert data["device"] == FAKE_NAME
        assert data["limit_bytes"] == 2 * 2**30
        assert data["components"].keys() == COMPONENTS
        assert sum(data["components"].values()) == data["allocated_bytes"] <= data["peak_bytes"]
    sampling = [data for _, data in seen if data["phase"] == "sampling"]
    assert sampling
    assert all(0 < data["step"] <= data["steps"] == steps for data in sampling)
    assert all(data["seconds_per_step"] > 0 for data in sampling[1:])


def test_measuring_stays_within_its_share_of_the_steps(memory):
    graph = managed(wan(seed=85, steps=60, frames=17, decode=False), gpu_mib=0.0)
    report = memory.run(graph).report
    # One measurement may be held up by other programs on the machine before it is made up for.
    assert report["measuring_steps_seconds"] < 0.005 * report["stepping_seconds"] + 0.05
