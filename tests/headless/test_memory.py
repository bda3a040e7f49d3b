"""The memory manager in a real ComfyUI: policies, releases, limits and reports, on the CPU and on a fake GPU."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from testing import graphs
from testing.measure import relative_error
from testing.server import GraphFailedError

from .memory_bench import (
    FAKE_NAME,
    GRAPHS,
    NEAR,
    ROOMY,
    UMT5,
    managed,
    released,
    wan,
    weights,
)

LARGE, LARGE_MIB = {"size": 256, "frames": 17}, 88.5
"""A video, and core's estimate of its working memory with one prompt at a time."""

LEFT_BEHIND = 0.1
"""Part of a tiny model's weights that core does not move: parameters outside its Linear and Conv layers."""

POLICIES = ("auto", "speed", "balanced", "lowest")


@pytest.mark.parametrize(
    ("policy", "gpu_mib"),
    [("auto", 0.0), *((policy, ROOMY) for policy in POLICIES)],
    ids=["auto on the CPU", *POLICIES],
)
@pytest.mark.parametrize("graph", GRAPHS)
def test_no_policy_changes_the_result(memory, graph, policy, gpu_mib):
    want = memory.run(GRAPHS[graph](seed=3)).tensors
    got = memory.run(managed(GRAPHS[graph](seed=3), gpu_mib=gpu_mib, policy=policy))
    for name in want:
        assert relative_error(got.tensors[name], want[name]) < NEAR
    assert got.report["device"] == (FAKE_NAME if gpu_mib else "cpu (host memory)")
    assert len(got.report["step_seconds"]) == 2
    sampling = [sample for sample in got.report["samples"] if sample["phase"] == "sampling"]
    assert all(sum(sample["components"].values()) == sample["allocated"] for sample in sampling)


def test_release_on_an_edge_releases_just_then_and_the_next_prompt_is_right(memory):
    want = memory.run(wan(seed=21, conditioning=UMT5)).tensors
    graph = managed(wan(seed=21, conditioning=UMT5), gpu_mib=ROOMY, policy="speed")
    graph = released(graph, ["positive", 0], "after_encoding", text_encoder=True)
    graph = released(graph, ["sample", 0], "before_decode", diffusion_model=True)
    got = memory.run(graph)
    assert [sorted(entry["names"]) for entry in got.report["releases"]] == [["text encoder"], ["diffusion model"]]
    assert got.state["loaded"]["VAE"] > 0
    most = {name: weights(got, name) for name in ("text encoder", "diffusion model")}
    for entry, (name, nbytes) in zip(got.report["releases"], most.items(), strict=True):
        assert got.state["loaded"][name] < LEFT_BEHIND * nbytes
        assert entry["freed"] > (1 - LEFT_BEHIND) * nbytes > 0
    sampling = next(sample for sample in got.report["samples"] if sample["phase"] == "sampling")
    assert sampling["components"]["text encoder"] < LEFT_BEHIND * most["text encoder"]
    for name in want:
        assert got.tensors[name].equal(want[name])
    graph["sample"]["inputs"]["seed"] = 22
    again = memory.run(graph).tensors
    assert again["latent"].equal(memory.run(wan(seed=22, conditioning=UMT5)).tensors["latent"])


def test_without_a_gpu_there_is_nothing_to_release(memory):
    graph = released(managed(wan(seed=23)), ["sample", 0], diffusion_model=True)
    got = memory.run(graph)
    assert got.report["releases"] == []
    assert got.state["loaded"]["diffusion model"] > 0


@pytest.mark.parametrize(
    ("policy", "gpu_mib", "releases"),
    [
        ("auto", ROOMY, False),
        ("speed", ROOMY, False),
        ("balanced", ROOMY, True),
        ("lowest", ROOMY, True),
        ("auto", 16.0, True),
    ],
)
def test_policies_release_always_never_or_under_pressure(memory, policy, gpu_mib, releases):
    memory.server.free()
    got = memory.run(managed(wan(seed=24, conditioning=UMT5), gpu_mib=gpu_mib, policy=policy))
    names = [name for entry in got.report["releases"] for name in entry["names"]]
    assert ("text encoder" in names) is releases
    assert ("diffusion model" in names) is releases
    assert (got.state["loaded"]["diffusion model"] < LEFT_BEHIND * weights(got, "diffusion model")) is releases


@pytest.mark.parametrize(("sequential", "batches"), [("off", {2}), ("auto", {2}), ("on", {1})])
def test_sequential_cfg_runs_the_prompts_one_at_a_time(memory, sequential, batches):
    want = memory.run(wan(seed=25, decode=False)).tensors["latent"]
    got = memory.run(
        managed(wan(seed=25, decode=False), gpu_mib=ROOMY, sequential_cfg=sequential, fault={"name": sequential})
    )
    assert set(got.state["batches"][sequential]) == batches
    assert relative_error(got.tensors["latent"], want) < NEAR
    assert got.state["overridden"] == []


def test_auto_runs_prompts_one_at_a_time_where_the_batch_does_not_fit(memory):
    graph = wan(seed=26, steps=1, decode=False, **LARGE)
    roomy = memory.run(managed(graph, gpu_mib=ROOMY, fault={"name": "roomy"}))
    assert set(roomy.state["batches"]["roomy"]) == {2}
    graph["sample"]["inputs"]["seed"] = 27
    pressed = memory.run(managed(graph, gpu_mib=1.5 * LARGE_MIB, fault={"name": "pressed"}))
    assert set(pressed.state["batches"]["pressed"]) == {1}
    assert "one at a time" in pressed.notes


@pytest.mark.parametrize("limited", [False, True])
def test_what_cannot_fit_is_refused_before_the_first_step(memory, limited):
    graph = wan(seed=28, steps=1, decode=False, **LARGE)
    room = {"gpu_mib": ROOMY, "vram_limit_gib": 0.3 * LARGE_MIB / 1024} if limited else {"gpu_mib": 0.3 * LARGE_MIB}
    with pytest.raises(GraphFailedError) as failed:
        memory.run(managed(graph, fault={"name": f"refused {limited}"}, **room))
    message = failed.value.exception_message
    assert failed.value.node_type == "KSampler"
    assert "256x256, 17 frames" in message
    assert "MiB" in message
    assert ("raise vram_limit_gib to" in message) is limited
    assert "make" in message
    assert message.count("; or ") == 2
    after = memory.run(managed(wan(seed=29), gpu_mib=ROOMY))
    assert after.state["batches"][f"refused {limited}"] == []


def test_the_limit_holds_for_its_own_prompt_only(memory):
    limit = 0.25
    got = memory.run(managed(wan(seed=30), gpu_mib=ROOMY, vram_limit_gib=limit))
    assert got.report["limit_bytes"] == got.state["limit"] == limit * 2**30
    assert sorted(got.state["hooked"]) == ["get_free_memory", "get_total_memory"]
    assert got.state["free"] <= limit * 2**30 - sum(got.state["loaded"].values())
    after = memory.run(wan(seed=31))
    assert after.state["hooked"] == []
    assert after.state["limit"] is None
    assert after.state["free"] > limit * 2**30
    assert after.state["reserve"] == got.state["reserve"]


def test_a_manager_that_is_removed_or_a_model_loaded_anew_leaves_nothing_behind(memory):
    settings = {"policy": "lowest", "vram_limit_gib": 0.5}
    memory.run(managed(wan(seed=32, decode=False), gpu_mib=ROOMY, fault={"name": "before"}, **settings))
    plain = wan(seed=33, decode=False)
    plain["count"] = graphs.node("TestOutOfMemory", model=["model", 0], at="nowhere", call=1, times=0, name="plain")
    plain["sample"]["inputs"]["model"] = ["count", 0]
    got = memory.run(plain)
    assert set(got.state["batches"]["before"]) == {1}
    assert set(got.state["batches"]["plain"]) == {2}
    assert got.state["hooked"] == []


@pytest.mark.parametrize(("clearing", "every", "clearings"), [("off", 1, 0), ("every N", 2, 2), ("every N", 1, 5)])
def test_step_clearing_happens_as_often_as_asked(memory, clearing, every, clearings):
    graph = managed(
        wan(seed=34, steps=5, decode=False),
        gpu_mib=ROOMY,
        idle_mib=3000.0,
        step_clearing=clearing,
        every_n_steps=every,
    )
    assert memory.run(graph).report["clearings"] == clearings


@pytest.mark.parametrize(("idle_mib", "clearings"), [(3900.0, 1), (100.0, 0)])
def test_automatic_clearing_clears_once_what_passes_the_threshold(memory, idle_mib, clearings):
    graph = managed(wan(seed=35, steps=5, decode=False), gpu_mib=ROOMY, idle_mib=idle_mib)
    assert memory.run(graph).report["clearings"] == clearings


def test_a_decode_that_does_not_fit_is_tiled_on_the_device(memory):
    want = memory.run(wan(seed=36, steps=1, size=512, frames=1)).tensors["image"]
    got = memory.run(managed(wan(seed=36, steps=1, size=512, frames=1), gpu_mib=1200.0))
    assert "tiles of 256 pixels" in got.notes
    assert got.tensors["image"].shape == want.shape
    assert relative_error(got.tensors["image"], want) < 0.05


@pytest.mark.parametrize("policy", ["auto", "lowest"])
def test_a_managed_and_an_unmanaged_sampler_share_all_components(memory, policy):
    """As of two samplers in one graph: the same model, text encoder and VAE, once behind the manager and once not."""
    want = memory.run(wan(seed=37, conditioning=UMT5)).tensors
    graph = managed(wan(seed=37, conditioning=UMT5), gpu_mib=ROOMY, policy=policy, vram_limit_gib=1.0)
    plain = wan(seed=37, conditioning=UMT5)
    for name in ("positive", "negative", "sample", "images"):
        inputs = {
            key: [f"plain_{link[0]}", 0]
            if isinstance(link, list) and link[0] in ("positive", "negative", "sample")
            else link
            for key, link in plain[name]["inputs"].items()
        }
        graph[f"plain_{name}"] = plain[name] | {"inputs": inputs}
    graph = graphs.dump(graph, f"plain-{policy}", plain_image=["plain_images", 0])
    got = memory.run(graph)
    for name in want:
        assert relative_error(got.tensors[name], want[name]) < NEAR
    (image,) = (memory.server.base / "output" / f"plain-{policy}").glob("plain_image*.safetensors")
    assert relative_error(next(iter(load_file(image).values())), want["image"]) < NEAR
    assert got.state["overridden"] == []
